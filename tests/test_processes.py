"""What torchrun starts computes what one process does, bit for bit: both stages and policies, two processes, gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_rlco import STATS

import data
from machines import share_out
from policy import load_policy

ROOT = Path(__file__).parent.parent
# The simulator's place is taken by noise that depends on the world and the time alone; in the second decision of three
# some worlds succeed, and the time of others is over.
SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
import torch
import envs, page, train_rlco, train_sft

class Noise:
    max_episode_steps = 12

    def __init__(self, task, domain, num_envs, share=(0, 1), **_):
        self.worlds = [share[0] + share[1] * i for i in range(num_envs)]

    def see(self, worlds):
        drawn = [torch.Generator().manual_seed(self.seed + 100 * self.time + i) for i in worlds]
        image = torch.stack([torch.randint(0, 256, (64, 64, 3), generator=g, dtype=torch.uint8) for g in drawn])
        state = torch.stack([torch.rand(7, generator=g) for g in drawn])
        return dict(image=image, state=state, prompt=["push the cube to the target"] * len(worlds))

    def reset(self, seed):
        self.seed, self.time = seed, 0
        return self.see(self.worlds)

    def step(self, actions):
        self.time += 1
        world = torch.tensor(self.worlds)
        terminated, truncated = ((world % 4 == k) & (self.time == 2) for k in (0, 1))
        final = self.see([i for i in self.worlds if i % 4 == 1]) if truncated.any() else None
        reward = terminated.float() + actions.sum((1, 2))
        return self.see(self.worlds), reward, terminated, truncated, dict(length=world * 0 + 4, final_obs=final)

    def close(self):
        pass

envs.VecEnv = Noise
page.validate = lambda *_: {{"eval/success_twin": 0.5, "eval/success_standin": 0.5}}
for name in {runs}:
    policy, bf16 = name.rsplit("-", 1)
    bf16 = bf16 == "True"
    demos = dict(real=Path("demos"), real_val=Path("demos"))
    sft = dict(steps=3, batch_size=8, save_every=1, sim=Path("demos"), out=Path("sft-" + name))
    train_sft.main(train_sft.Args(policy=policy, bf16=bf16, accumulate=2, **sft, **demos))
    rl = dict(num_envs=4, minibatch_size=6, anchor_batch_size=4, iterations={iterations}, critic_warmup=1, lr=1e-4)
    rl |= dict(policy=f"sft-{{name}}/last", target_kl=9, out=Path("rl-" + name))
    train_rlco.main(train_rlco.Args(bf16=bf16, accumulate=2, **rl, **demos))
"""
POLICIES = ("tiny-pi05-False", "tiny-openvla-True")  # and whether in bfloat16
RUNS = [f"{stage}-{policy}" for stage in ("sft", "rl") for policy in POLICIES]


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """A small dataset of noise."""
    folder = tmp_path_factory.mktemp("demos") / "demos"
    rng = np.random.default_rng(0)
    episode = dict(image=rng.integers(0, 256, (20, 64, 64, 3), np.uint8), state=rng.uniform(-1, 1, (20, 7)))
    episode["state"][:, 6] = action = rng.choice([-1.0, 1.0], 20)
    episode |= dict(action=np.c_[rng.uniform(-0.02, 0.02, (20, 6)), action], prompt="push the cube to the target")
    data.write_dataset(folder, [episode], fps=10)
    return folder


def train(folder, demos, processes, iterations):
    """Both stages in `folder`, or what is missing of them -> what was printed."""
    folder.mkdir(exist_ok=True)
    if not (folder / "demos").exists():
        (folder / "demos").symlink_to(demos)
    (folder / "run.py").write_text(SCRIPT.format(root=str(ROOT), runs=POLICIES, iterations=iterations))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *launch, "run.py"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def outcome(folder, run):
    weights = load_file(folder / run / "last/model.safetensors") | load_file(folder / run / "last/heads.safetensors")
    if run.startswith("rl"):
        metrics = json.loads((folder / run / "metrics.json").read_text())
        return weights, [{k: v for k, v in log.items() if not k.startswith("time/")} for log in metrics]
    return weights, None


def test_any_number_of_processes_compute_the_same_bit_for_bit(demos, tmp_path):
    """What one process begins and two end is what two begin and one ends: so each part is the same for both, and a run
    goes on with more processes or fewer."""
    for folder, processes in ((tmp_path / "12", (1, 2)), (tmp_path / "21", (2, 1))):
        for iterations, number in enumerate(processes, 1):
            printed = train(folder, demos, number, iterations=iterations)
        assert printed.count("resuming at iteration 1") == 2  # both policies, and one process talks
    for run in RUNS:
        (weights, metrics), (others, other_metrics) = outcome(tmp_path / "12", run), outcome(tmp_path / "21", run)
        assert weights.keys() == others.keys() and metrics == other_metrics, run
        assert all(torch.equal(weights[name], others[name]) for name in weights), run


def test_two_processes_evaluate_as_one(tmp_path):
    for name in ("tiny-pi05", "tiny-openvla"):
        load_policy(name, stats=STATS).save(tmp_path / name)
    options = "standin --policies tiny-pi05/ tiny-openvla/ --episodes 3 --num-envs 2 --videos 0".split()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    outcomes = []
    for out, launch in (("one", []), ("two", torchrun)):
        command = [sys.executable, *launch, str(ROOT / "eval_real.py"), *options, "--out", out]
        subprocess.run(command, cwd=tmp_path, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        outcomes.append(json.loads((tmp_path / out / "results.json").read_text())["results"])
    assert outcomes[0] == outcomes[1] and len(outcomes[0]) == 4


def test_weights_are_shared_out_evenly(monkeypatch):
    monkeypatch.setattr("machines.size", lambda: 3)
    owners = share_out([5, 1, 4, 3, 2, 3])
    assert [sum(s for s, o in zip([5, 1, 4, 3, 2, 3], owners) if o == r) for r in range(3)] == [6, 6, 6]
