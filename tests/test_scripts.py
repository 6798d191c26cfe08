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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_sft

ROOT = Path(__file__).parent.parent
STAGE_1 = "train_sft.py --steps 6 --batch-size 8 --evaluations 2 --eval-episodes 2 --num-envs 1".split()
STAGE_2 = ("train_rlco.py --num-envs 1 --minibatch-size 4 --anchor-batch-size 4 --critic-warmup 1 --eval-every 2 "
           "--eval-episodes 2 --eval-envs 1").split()


def run(folder, *command, ok=True):
    """Run a script in `folder` -> its output; when it fails it must do so with one line."""
    result = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], cwd=folder, capture_output=True,
                            text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    output = result.stdout + result.stderr
    assert (result.returncode == 0) == ok, output
    assert ok or "Traceback" not in output, output
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder after data.py, both stages and the evaluation."""
    folder = tmp_path_factory.mktemp("user")
    run(folder, *"data.py --num-twin 3 --num-real 2 --num-val 1 --workers 1".split())
    data = "--real demos/push_cube-standin --real-val demos/push_cube-standin-val".split()
    run(folder, *STAGE_1, "--sim", "demos/push_cube-twin", *data)
    run(folder, *STAGE_2, "--iterations", "2")
    run(folder, *"eval_real.py --episodes 3 --num-envs 1 --videos 1".split())
    return folder


def test_both_stages_leave_what_they_promise(folder):
    for name in ("sft", "rlco"):
        for checkpoint in ("best", "last"):
            files = {p.name for p in (folder / "runs" / name / checkpoint).iterdir()}
            assert {"config.json", "model.safetensors", "tokenizer.json", "stats.json"} <= files
        assert list((folder / "runs" / name / "tensorboard").iterdir())
    metrics = json.loads((folder / "runs/rlco/metrics.json").read_text())
    assert [m["iteration"] for m in metrics] == [0, 1, 2]
    assert metrics[0]["loss/anchor"] == 0 and metrics[1]["loss/anchor"] > 0  # the critic warms up first
    assert {"rollout/success", "rollout/return", "rollout/explained_variance", "loss/approx_kl", "loss/clip_fraction",
            "loss/entropy", "loss/ppo", "loss/anchor_to_ppo", "time/rollout_steps_per_second"} <= set(metrics[1])
    assert "eval/success_standin" in metrics[0] and "eval/real_loss" in metrics[2]
    assert (folder / "runs/rlco/learning_curve.png").stat().st_size > 5000


def test_evaluation_repeats_itself(folder):
    first = json.loads((folder / "runs/eval/results.json").read_text())
    assert [(r["policy"], r["domain"]) for r in first["results"]] == [
        (p, d) for d in ("twin", "standin") for p in ("runs/sft/best", "runs/rlco/best")]
    assert all(len(r["success"]) == 3 for r in first["results"])
    assert len(list((folder / "runs/eval/videos").glob("*.mp4"))) >= 4 and (folder / "runs/eval/twin_and_standin.mp4").exists()
    output = run(folder, *"eval_real.py --episodes 3 --num-envs 1 --videos 0 --out again".split())
    again = json.loads((folder / "again/results.json").read_text())
    assert first["results"] == again["results"] and first["weights"] == again["weights"]
    assert all(len(digest) == 64 for digest in first["weights"].values())
    assert "not a real robot" in output and "of 3" in output


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
    monkeypatch.setattr(train_sft.envs, "VecEnv", lambda *_: SimpleNamespace(close=lambda: None))
    result = {"eval/success_twin": 0.5}
    for name, kills in (("straight", 0), ("resumed", 2)):
        validations = Mock(side_effect=[KeyboardInterrupt, result, KeyboardInterrupt, result] if kills else [result] * 2)
        monkeypatch.setattr(train_sft.envs, "validate", validations)
        for attempt in range(kills + 1):
            with pytest.raises(KeyboardInterrupt) if attempt < kills else nullcontext():
                train_sft.main(train_sft.Args(steps=102, batch_size=2, out=Path(name)))
        assert not list(validations.side_effect)
    assert Path("straight/last/model.safetensors").read_bytes() == Path("resumed/last/model.safetensors").read_bytes()
    curves = (EventAccumulator(f"{name}/tensorboard").Reload().Scalars("loss/total") for name in ("straight", "resumed"))
    straight, resumed = ([(e.step, e.value) for e in curve] for curve in curves)
    assert straight == resumed and len(straight) == 5  # the curve has no gap where it was killed, and is there once


def test_a_resumed_stage_2_goes_on_with_the_same_random_numbers(folder):
    """Not bit for bit: PhysX remembers earlier episodes of its process in the last digits."""
    run(folder, *STAGE_2, "--iterations", "3", "--out", "runs/straight")
    run(folder, *STAGE_2, "--iterations", "2", "--out", "runs/resumed")
    run(folder, *STAGE_2, "--iterations", "3", "--out", "runs/resumed")
    straight, resumed = (json.loads((folder / f"runs/{name}/metrics.json").read_text())[2] for name in ("straight", "resumed"))
    for key in ("loss/anchor", "loss/ppo", "loss/approx_kl", "rollout/return"):
        assert resumed[key] == pytest.approx(straight[key], rel=0.02, abs=1e-4), key


def test_missing_input_is_one_line_that_says_what_makes_it(folder, tmp_path):
    assert "python train_sft.py" in run(tmp_path, "eval_real.py", ok=False)
    assert "python data.py" in run(tmp_path, *STAGE_1, "--sim", "nowhere", "--real", "nowhere", "--real-val", "x", ok=False)
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
