"""Mistakes with devices, found without a GPU: see pretend_cuda.py. What needs a real one is in test_gpu.py."""

import ctypes
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mani_skill.utils.structs import RenderCamera
from pretend_cuda import OnCuda, PretendCuda
from test_rlco import ARGS, STATS, make_rollout
from test_scripts import Noise

import envs
import machines
import train_rlco
import train_sft
from checkpoints import UserError
from machines import AdamW, find_device
from policy import apply_defaults, load_policy


@pytest.mark.parametrize("mistake", [lambda x: x.numpy(), np.asarray, lambda x: x + torch.ones(3), torch.ones(3).add])
def test_the_pretended_gpu_finds_mistakes(mistake):
    with PretendCuda():
        x = torch.arange(3.0, device="cuda")
        assert (x[1:] * 2).tolist() == [2, 4] and x.cpu().numpy().sum() == 3
        with pytest.raises((RuntimeError, TypeError), match="cuda:0"):
            mistake(x)


def test_a_device_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert str(find_device("auto")) == "cuda" and str(find_device("cuda:1")) == "cuda:1"
    for name in ("cuda:2", "gpu", "mps"):
        with pytest.raises(UserError, match=f"--device {name}"):
            find_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(find_device("auto")) == "cpu"
    with pytest.raises(UserError, match="finds no GPUs"):
        find_device("cuda")


def test_a_gpu_that_cannot_render_is_told_once(monkeypatch, capsys):
    """As in a container without NVIDIA's Vulkan files. The picture is really tried."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "7")
    envs.find_renderer.cache_clear()
    assert [envs.find_renderer(render) for render in ("auto", "auto", "cpu")] == ["cpu"] * 3
    said = capsys.readouterr().err
    assert said.count("rendered on the CPU: cuda:7 renders none") == 1 and said.count("\n") == 1
    with pytest.raises(UserError, match="--render gpu: cuda:7 renders no picture"):
        envs.find_renderer("gpu")
    envs.find_renderer.cache_clear()


@pytest.mark.parametrize("domain", [envs.TWIN, envs.STANDIN], ids=lambda domain: domain.name)
def test_pictures_of_a_gpu_come_to_the_physics_on_the_cpu(domain, monkeypatch):
    """ManiSkill hands them out as CUDA tensors; the stand-in's noise is drawn on the CPU."""
    get_picture = RenderCamera.get_picture
    env = envs.make("push_cube", domain)
    monkeypatch.setattr(RenderCamera, "get_picture", lambda *args: [x.to("cuda:0") for x in get_picture(*args)])
    with PretendCuda():
        seen = env.observe(env.reset(seed=[1])[0])
        assert seen["image"].numpy().shape == (1, 64, 64, 3) and not isinstance(seen["state"], OnCuda)
        env.step_chunk(torch.zeros(1, 2, 7))
        env.observe()["image"].numpy()
    env.close()


@pytest.mark.parametrize("name, part", [("tiny-pi05", "expert"), ("tiny-openvla", "llm")])
def test_an_iteration_of_stage_2_on_a_gpu(name, part):
    """Observations, actions and rewards cross from the simulator's CPU to the policy's GPU and back."""
    world = Noise("push_cube", envs.TWIN, num_envs=4)
    more = dict(
        max_grad_norm=1.0,
        target_kl=9.0,
        lr=1e-5,
        desired_kl=0.006,
        update_epochs=1,
        minibatch_size=6,
        accumulate=2,
        acting_groups=2,
        gamma=0.9,
        out="",
        seed=1,
        critic_warmup=0,
    )
    args = SimpleNamespace(**vars(ARGS), **more, gae_lambda=0.9)
    with PretendCuda():
        torch.manual_seed(0)
        policy = load_policy(name, stats=STATS, device="cuda:0")
        for train in (part, "all"):
            policy.set_trainable(train)
            trained = [p for p in policy.parameters() if p.requires_grad]
            optimizer = AdamW([dict(params=trained, lr=1e-5)])
            experience = train_rlco.rollout(policy, world, 0, decisions=3, groups=2)
            columns = ("reward", "value", "last_value", "truncated_value", "terminated", "truncated")
            assert all(isinstance(experience[key], OnCuda) for key in columns)
            columns = [experience[key] for key in columns]
            experience["advantage"], experience["returns"] = train_rlco.gae(*columns, args.gamma, args.gae_lambda)
            assert np.isfinite(list(train_rlco.rollout_metrics(experience, 1.0).values())).all()
            real = make_rollout(load_policy(name, stats=STATS), n=4)[1]
            before = trained[-1].detach().cpu().clone()
            log = train_rlco.update(policy, optimizer, experience, [real] * 9, 0, 0, args)
            assert log["time/updates"] == 2 and not torch.equal(trained[-1].detach().cpu(), before)


@pytest.mark.parametrize("name", ["tiny-pi05", "tiny-openvla"])
def test_small_pictures_are_refused_and_large_ones_scaled(name):
    policy = load_policy(name, stats=STATS)
    obs = make_rollout(policy, n=2)[0]["obs"]
    assert policy.image_size == 64
    large = dict(obs, image=obs["image"].repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert policy.act(large, sample=False).actions.shape == (2, 4, 7)
    with pytest.raises(UserError, match="pictures of 32 x 32 pixels for a policy that sees 64"):
        policy.act(dict(obs, image=obs["image"][:, ::2, ::2]), sample=False)


def test_defaults_follow_the_policy():
    args = train_rlco.Args(value_lr=7.0)
    large = load_policy("pi05", device="meta")
    apply_defaults(args, large, train_rlco.DEFAULTS)
    assert large.image_size == 224 and args.lr == 4e-6 and args.value_lr == 7.0
    args = train_sft.Args()
    apply_defaults(args, load_policy("tiny-openvla"), train_sft.DEFAULTS)
    assert args.lr == 1e-3


@pytest.mark.parametrize("users", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
@pytest.mark.parametrize("program", ["train_sft", "train_rlco", "eval_real"])
def test_threads_wait_as_set_before_torch_is_imported_and_not_over_the_users_own(program, users):
    code = f"""
import os, sys

class Look:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            os._exit(0)

sys.meta_path.insert(0, Look())
import {program}
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(envs.__file__).parent, env=clean | users, capture_output=True, text=True
    )
    assert said.stdout.strip() == {(): "3000", ("OMP_WAIT_POLICY",): "None", ("GOMP_SPINCOUNT",): "7"}[tuple(users)]


def test_who_is_left_behind_by_torchrun_does_not_wait_for_it(monkeypatch):
    """torchrun that is killed while its processes still import leaves them behind: each would wait for hours."""
    with socket.socket() as gone:
        gone.bind(("127.0.0.1", 0))
        address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(gone.getsockname()[1]))
    place = dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", TORCHELASTIC_USE_AGENT_STORE="True")
    for key, value in (address | place).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(machines, "RENDEZVOUS", 1)
    with pytest.raises(UserError, match="torchrun is gone"):
        machines.start("cpu")
    ctypes.CDLL(None).prctl(1, 0)  # these tests do not end with their parent
