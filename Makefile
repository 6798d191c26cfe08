# make demo: set-up, stage I, stage II, comparison.   make test: set-up, ruff, test suite.
# make base: the pretrained policies of bases/ anew, hours of two cores.
# make results: every run, table and figure of results/. A finished run is not run again, a killed one goes on.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.PHONY: demo test setup base results
PY := .venv/bin/python

demo: setup
	@set -x
	$(PY) train_sft.py --steps 1000
	$(PY) train_rlco.py
	$(PY) eval_real.py

test: setup .venv/robot
	@$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pytest tests -n 2 --dist loadfile --ignore tests/test_robot.py
	$(PY) -m pytest tests/test_robot.py  # in real time, so by itself

base: setup
	@$(PY) -m results.base

results: setup
	@$(PY) -m results.experiment
	$(PY) envs.py show --out results/domains.png

# openpi-client pins numpy < 2 and runs with numpy 2 all the same.
.venv/robot: requirements-robot.txt .venv/installed
	@$(PY) -m pip install -r requirements-robot.txt -c constraints.txt
	$(PY) -m pip install --no-deps openpi-client==0.1.2
	touch $@

# Touched last, so that an interrupted installation is taken up again. The constraints are the versions that were tested:
# what comes out later, here or among what these need, changes nothing.
.venv/installed: requirements.txt constraints.txt
	@if ! $(PY) -m pip --version &>/dev/null; then
	  for python in python3 python3.11 python3.12 ""; do
	    $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])' \
	      &>/dev/null && break
	  done
	  [ "$$python" ] || { echo "Needs Python 3.11 or 3.12 with venv and pip (Debian 12, Ubuntu 24.04:" \
	    "apt install python3-venv), then make again." >&2; exit 1; }
	  $$python -m venv --clear .venv
	fi
	$(PY) -m pip install -r requirements.txt -c constraints.txt
	touch $@

# A real picture: a device that is listed may still fail to render. SAPIEN's cheapest shader keeps it at half a second.
# OpenCV comes with SAPIEN, is imported by ManiSkill, and needs libraries that a bare system lacks.
define RENDER
import sys, cv2, sapien
sapien.render.set_camera_shader_dir("trivial")
scene = sapien.Scene([sapien.physx.PhysxCpuSystem(), sapien.render.RenderSystem(sapien.Device(sys.argv[1]))])
camera = scene.add_camera("", 8, 8, 1, 0.01, 1)
scene.update_render()
camera.take_picture()
camera.get_picture("Color")
endef
export RENDER

# SAPIEN needs VK_KHR_external_semaphore_fd, which Mesa's software Vulkan device, lavapipe, has from 24.3 on.
setup: .venv/installed
	@renders() { $(PY) -c "$$RENDER" $${1:-cpu}; }
	root() { if [ "$$(id -u)" = 0 ]; then "$$@"; else sudo -n "$$@"; fi; }
	apt() { root env DEBIAN_FRONTEND=noninteractive apt-get -y -o DPkg::Lock::Timeout=120 "$$@"; }
	mesa="mesa-vulkan-drivers" backports="bookworm-backports"
	candidate() { apt-cache "$$@" policy $$mesa 2>/dev/null | awk '/Candidate: [0-9]/ {print $$2}'; }
	new() { dpkg --compare-versions "$$(candidate "$$@")" ge 24.3; }
	lavapipe() {
	  if new; then apt install $$mesa; return; fi
	  list=/etc/apt/sources.list.d/bookworm-backports.list
	  mirror=$$(apt-get indextargets --format '$$(REPO_URI)' 'Origin: Debian' 'Codename: bookworm' | awk 'NR == 1')
	  if [ "$$mirror" ] && ! new -t $$backports; then
	    echo "deb $$mirror $$backports main" | root tee $$list
	    apt update
	    new -t $$backports || root rm $$list
	  fi
	  if new -t $$backports; then apt install -t $$backports $$mesa; fi
	}
	if ! renders &>/dev/null && type apt-get &>/dev/null && root true &>/dev/null; then
	  echo "SAPIEN cannot render yet: installing what it lacks"
	  apt update || true
	  $(PY) -c 'import cv2' &>/dev/null || apt install libgl1 libglib2.0-0 || true
	  renders &>/dev/null || lavapipe || true
	fi
	why=$$(renders 2>&1) || { echo "SAPIEN cannot render ($$(tail -n 1 <<<"$$why")). Install libgl1, libglib2.0-0 and" \
	  "Mesa's lavapipe >= 24.3 ($$mesa; on Debian 12 from $$backports), then make again." >&2; exit 1; }
	if type nvidia-smi &>/dev/null; then
	  where=$$(renders cuda 2>&1) && echo "--render auto is the GPU" || echo "--render auto is the CPU: the GPU renders no" \
	    "picture ($$(tail -n 1 <<<"$$where")). Containers need NVIDIA_DRIVER_CAPABILITIES with graphics."
	fi
