"""Every script through its real command line, at tiny size, one after the other as a user runs them."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import envs
import train_rlco
import train_sft
from checkpoints import UserError
from policy import HEADS, load_policy

ROOT = Path(__file__).parent.parent
STAGE_1 = "train_sft.py --steps 6 --batch-size 8 --evaluations 2 --eval-episodes 2 --num-envs 1".split()
STAGE_2 = (
    "train_rlco.py --num-envs 1 --minibatch-size 4 --anchor-batch-size 4 --critic-warmup 1 --eval-every 2 "
    "--eval-episodes 2 --eval-envs 1"
).split()


def run(folder, *command, ok=True):
    """Run a script in `folder` -> its output; when it fails it must do so with one line."""
    result = subprocess.run(
        [sys.executable, str(ROOT / command[0]), *command[1:]],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    output = result.stdout + result.stderr
    assert (result.returncode == 0) == ok, output
    assert ok or "Traceback" not in output, output
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder after data.py, both stages and the evaluation."""
    folder = tmp_path_factory.mktemp("user")
    run(folder, *"data.py collect --num-twin 3 --num-real 2 --num-val 1 --workers 1".split())
    data = "--real demos/push_cube-standin --real-val demos/push_cube-standin-val".split()
    run(folder, *STAGE_1, "--sim", "demos/push_cube-twin", *data)
    run(folder, *STAGE_2, "--iterations", "2")
    run(folder, *"eval_real.py standin --episodes 3 --num-envs 1 --videos 1".split())
    return folder


def test_both_stages_leave_what_they_promise(folder):
    for name in ("sft", "rlco"):
        for checkpoint in ("best", "last"):
            files = {p.name for p in (folder / "runs" / name / checkpoint).iterdir()}
            assert {"config.json", "model.safetensors", "tokenizer.json", "stats.json"} <= files
        assert list((folder / "runs" / name / "tensorboard").iterdir())
        assert json.loads((folder / "runs" / name / "args.json").read_text())["out"] == f"runs/{name}"
        made_by = json.loads((folder / "runs" / name / "made_by_from_0.json").read_text())
        assert len(made_by["demos/push_cube-standin-val"]) == 64 and made_by["torch"] and made_by["args"]
    metrics = json.loads((folder / "runs/rlco/metrics.json").read_text())
    assert [m["iteration"] for m in metrics] == [0, 1, 2]
    assert metrics[0]["loss/anchor"] == 0 and metrics[1]["loss/anchor"] > 0  # the critic warms up first
    assert {
        "rollout/success",
        "rollout/return",
        "rollout/explained_variance",
        "loss/approx_kl",
        "loss/clip_fraction",
        "loss/entropy",
        "loss/ppo",
        "time/rollout_steps_per_second",
    } <= set(metrics[1])
    assert "eval/success_standin" in metrics[0] and "eval/real_loss" in metrics[2]
    assert (folder / "runs/rlco/learning_curve.png").stat().st_size > 5000


def test_evaluation_repeats_itself(folder):
    first = json.loads((folder / "runs/eval/results.json").read_text())
    assert [(r["policy"], r["domain"]) for r in first["results"]] == [
        (p, d) for d in ("twin", "standin") for p in ("runs/sft/best", "runs/rlco/best")
    ]
    assert all(len(r["success"]) == 3 for r in first["results"])
    assert len(list((folder / "runs/eval/videos").glob("*.mp4"))) == 4  # of one start, and the page shows them
    assert (folder / "runs/eval/index.html").read_text().count(".mp4") == 4
    output = run(folder, *"eval_real.py standin --episodes 3 --num-envs 1 --videos 0 --out again".split())
    again = json.loads((folder / "again/results.json").read_text())
    assert first["results"] == again["results"] and first["weights"] == again["weights"]
    assert all(len(digest) == 64 for digest in first["weights"].values())
    assert "not a real robot" in output and "of 3" in output
    run(
        folder,
        *"eval_real.py standin --episodes 3 --num-envs 1 --videos 0 --out alone --policies runs/rlco/best".split(),
    )
    alone = json.loads((folder / "alone/results.json").read_text())  # as beside another checkpoint
    assert alone["results"] == [r for r in first["results"] if r["policy"] == "runs/rlco/best"]


def test_a_second_run_reuses_and_a_killed_one_resumes(folder):
    assert "done already" in run(folder, *STAGE_2, "--iterations", "2")
    output = run(folder, *STAGE_2, "--iterations", "3")  # as if it had been killed in iteration 2
    assert "resuming at iteration 2" in output
    metrics = json.loads((folder / "runs/rlco/metrics.json").read_text())
    assert [m["iteration"] for m in metrics] == [0, 1, 2, 3] and "loss/ppo" in metrics[2]
    before = (folder / "runs/rlco/trainer.pt").read_bytes()
    assert "another beta" in run(folder, *STAGE_2, "--iterations", "4", "--beta", "0.9", ok=False)
    output = run(folder, *STAGE_2, "--iterations", "9", "--target-kl", "-1", "--out", "runs/stopped", ok=False)
    assert "--target-kl" in output and not (folder / "runs/stopped/trainer.pt").exists()
    assert (folder / "runs/rlco/trainer.pt").read_bytes() == before


def test_a_resumed_stage_1_ends_where_an_uninterrupted_one_does(folder, monkeypatch):
    """Bit for bit: weights, optimizer, schedule, random numbers and batches. Nothing is evaluated, which takes no part.
    Killed before the first checkpoint (at step 51), it begins anew; after it (at the end, 102), it goes on from 100."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train_sft.envs, "VecEnv", lambda *_, **__: SimpleNamespace(close=lambda: None))
    result = {"eval/success_twin": 0.5}
    for name, kills in (("straight", 0), ("resumed", 2)):
        validations = Mock(
            side_effect=[KeyboardInterrupt, result, KeyboardInterrupt, result] if kills else [result] * 2
        )
        monkeypatch.setattr(train_sft.page, "validate", validations)
        for attempt in range(kills + 1):
            with pytest.raises(KeyboardInterrupt) if attempt < kills else nullcontext():
                train_sft.main(train_sft.Args(steps=102, batch_size=2, out=Path(name)))
        assert not list(validations.side_effect)
    assert Path("straight/last/model.safetensors").read_bytes() == Path("resumed/last/model.safetensors").read_bytes()
    curves = (
        EventAccumulator(f"{name}/tensorboard").Reload().Scalars("loss/total") for name in ("straight", "resumed")
    )
    straight, resumed = ([(e.step, e.value) for e in curve] for curve in curves)
    assert straight == resumed and len(straight) == 5  # the curve has no gap where it was killed, and is there once


class Noise:
    """Environments without a simulator, which show noise: in the second decision of three the first of them succeeds,
    and the time of the second is over."""

    max_episode_steps = 12

    def __init__(self, task, domain, num_envs, **_):
        self.num_envs = num_envs

    def reset(self, seed):
        self.generator, self.decisions = torch.Generator().manual_seed(seed), 0
        return self.see(self.num_envs)

    def see(self, n):
        return dict(
            image=torch.randint(0, 256, (n, 64, 64, 3), generator=self.generator, dtype=torch.uint8),
            state=torch.rand(n, 7, generator=self.generator),
            prompt=["push the cube to the target"] * n,
        )

    def step(self, actions):
        self.decisions += 1
        terminated, truncated = ((torch.arange(self.num_envs) == row) & (self.decisions == 2) for row in (0, 1))
        info = dict(length=torch.full((self.num_envs,), 4), final_obs=self.see(1) if truncated.any() else None)
        return self.see(self.num_envs), terminated.float(), terminated, truncated, info

    def close(self):
        pass


@pytest.fixture
def stage_2(folder, tmp_path, monkeypatch):
    """Stage II in this process, in `Noise`, without evaluations -> weights at the start and at the end, metrics."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demos").symlink_to(folder / "demos")
    monkeypatch.setattr(train_rlco.envs, "VecEnv", Noise)
    monkeypatch.setattr(train_rlco.page, "validate", lambda *_: {"eval/success_twin": 0.5, "eval/success_standin": 0.5})
    stats = load_policy(folder / "runs/sft/best").stats

    def weights(checkpoint):
        return {k: v for file in Path(checkpoint).glob("*.safetensors") for k, v in load_file(file).items()}

    def run(policy, out="run", **settings):
        if not Path("start", policy).exists():
            torch.manual_seed(0)
            load_policy(policy, stats=stats).save(f"start/{policy}")
        train_rlco.main(
            train_rlco.Args(
                **dict(
                    dict(
                        policy=f"start/{policy}",
                        num_envs=3,
                        minibatch_size=6,
                        anchor_batch_size=2,
                        critic_warmup=0,
                        target_kl=9,
                        iterations=1,
                        out=Path(out),
                    ),
                    **settings,
                )
            )
        )
        return weights(f"start/{policy}"), weights(f"{out}/last"), json.loads(Path(out, "metrics.json").read_text())

    return run


@pytest.mark.parametrize("policy", ["tiny-pi05", "tiny-openvla"])
def test_the_critic_warms_up_alone(stage_2, policy):
    before, after, _ = stage_2(policy, critic_warmup=1)
    assert {k for k in after if not torch.equal(before[k], after[k])} == {
        k for k in after if k.startswith("value_head")
    }


def test_a_randomised_run_acts_in_many_twins_and_validates_in_one(stage_2, monkeypatch):
    made = Mock(side_effect=Noise)
    monkeypatch.setattr(train_rlco.envs, "VecEnv", made)
    stage_2("tiny-pi05", randomize=True)
    (_, training, _), (_, twin, _), (_, target, _) = (call.args for call in made.call_args_list)
    assert len(set(training)) == 3 and envs.TWIN not in training
    assert twin == envs.TWIN and target == envs.STANDIN


@pytest.mark.parametrize("policy, train", [("tiny-pi05", "expert"), ("tiny-openvla", "llm"), ("tiny-openvla", "lora")])
def test_a_resumed_stage_2_ends_where_an_uninterrupted_one_does(stage_2, policy, train):
    """Bit for bit, where no simulator remembers earlier episodes; what is frozen stays as it was."""
    before, straight, _ = stage_2(policy, "straight", train=train, iterations=2)
    stage_2(policy, "resumed", train=train)
    _, resumed, _ = stage_2(policy, "resumed", train=train, iterations=2)
    assert all(torch.equal(resumed[k], straight[k]) for k in straight) and len(resumed) == len(straight)
    changed = {k for k in before if not torch.equal(before[k], straight[k])}
    if train == "lora":  # which `before` has not
        assert changed and all(k.startswith(HEADS) for k in changed) and len(straight) > len(before)
    else:
        assert any("layers" in k for k in changed)
        assert not any(
            k.startswith(("paligemma_with_expert.paligemma", "vision_backbone", "projector")) for k in changed
        )


def test_advantages_are_normalised_and_bootstrap_from_what_was_truncated(stage_2, monkeypatch):
    gae, loss = (Mock(side_effect=getattr(train_rlco, name)) for name in ("gae", "rlco_loss"))
    monkeypatch.setattr(train_rlco, "gae", gae)
    monkeypatch.setattr(train_rlco, "rlco_loss", loss)
    stage_2("tiny-pi05", update_epochs=1)
    _, _, _, truncated_value, terminated, truncated, *_ = gae.call_args.args
    assert terminated.nonzero().tolist() == [[1, 0]] and truncated.nonzero().tolist() == [[1, 1]]
    assert torch.equal(truncated_value != 0, truncated)
    advantage = torch.cat([call.args[1]["advantage"] for call in loss.call_args_list])
    assert len(advantage) == 9 and abs(advantage.mean()) < 1e-6 and advantage.std() == pytest.approx(1, abs=1e-4)


def test_a_number_that_is_none_ends_stage_2_and_the_last_good_checkpoint_stays(stage_2, monkeypatch):
    _, good, _ = stage_2("tiny-pi05")
    step = Noise.step

    def step_without_reward(self, actions):
        seen, reward, *rest = step(self, actions)
        return seen, reward * torch.nan, *rest

    monkeypatch.setattr(Noise, "step", step_without_reward)
    with pytest.raises(UserError, match=r"iteration 1: the gradient is nan, the loss nan .* keeps the last good"):
        stage_2("tiny-pi05", iterations=2)
    monkeypatch.setattr(Noise, "step", step)
    _, left, metrics = stage_2("tiny-pi05")  # done already
    assert all(torch.equal(good[key], left[key]) for key in good) and len(metrics) == 2


def test_a_kl_divergence_that_one_process_alone_has_ends_the_update_of_all(stage_2, monkeypatch):
    steps = []

    def gather(x):
        if x.dtype != torch.float64:  # not what a gradient step says of itself
            return x
        steps.append(x)
        return torch.cat([x, x + 100 * (len(steps) > 1)], -1)  # beside another process, whose second step goes far

    monkeypatch.setattr(train_rlco.machines, "gather", gather)
    *_, metrics = stage_2("tiny-pi05")
    assert metrics[0]["time/updates"] == 1 and len(steps) == 2
    assert metrics[0]["loss/refused_kl"] == pytest.approx(50, abs=1)


def test_more_backward_passes_give_the_same_gradient(stage_2, monkeypatch):
    """In stage I; of stage II see test_processes.py."""
    monkeypatch.setattr(train_sft.page, "validate", lambda *_: {"eval/success_twin": 0.5})
    norms = []
    for n in (1, 2):
        train_sft.main(train_sft.Args(policy="tiny-openvla", steps=20, batch_size=4, accumulate=n, out=Path(f"sft{n}")))
        norms.append(EventAccumulator(f"sft{n}/tensorboard").Reload().Scalars("charts/grad_norm")[0].value)
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)


def test_missing_input_is_one_line_that_says_what_makes_it(folder, tmp_path):
    assert "python train_sft.py" in run(tmp_path, "eval_real.py", ok=False)
    assert "python data.py" in run(
        tmp_path, *STAGE_1, "--sim", "nowhere", "--real", "nowhere", "--real-val", "x", ok=False
    )
    shutil.copytree(folder / "demos", tmp_path / "demos")
    assert "python train_sft.py" in run(tmp_path, *STAGE_2, ok=False)
    assert "can play the robot" in run(folder, *STAGE_1, "--target", "twin", ok=False)
    assert "eval_episodes: at least 1" in run(folder, *STAGE_2, "--out", "x", "--eval-episodes", "0", ok=False)
    broken = tmp_path / "broken"
    shutil.copytree(folder / "runs/sft/best", broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    assert "model.safetensors" in run(tmp_path, *STAGE_2, "--policy", "broken", ok=False)
    assert not (tmp_path / "runs/rlco/trainer.pt").exists()


@pytest.mark.parametrize("script", ["data.py", "train_sft.py", "train_rlco.py", "eval_real.py", "envs.py"])
def test_help_teaches(script, tmp_path):
    output = run(tmp_path, script, "--help")
    assert len(output) > 400 and "usage" in output
