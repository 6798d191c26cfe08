import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import eval_real
from results import experiment


def test_the_experiment_gives_a_folder_to_each_run_and_a_run_to_each_checkpoint():
    cells = {}

    def walk(cell):
        if cell.start:
            walk(cell.start)
        assert cells.setdefault(cell.out, cell) == cell  # the same folder is the same command
        assert re.findall(r"(\S+)/best", cell.command) == ([cell.start.out] if cell.start else [])
        assert f"--target {cell.target} " in cell.command  # that of what it starts from
        assert not cell.start or (cell.task, cell.target) == (cell.start.task, cell.start.target)

    for seed in (1, 2):
        for _, cell in experiment.experiment(seed):
            assert cell.script == "eval_real.py"
            walk(cell)
    without_out = {re.sub(r"--out \S+ ", "", cell.command) for cell in cells.values()}
    assert len(without_out) == len(cells)  # no two of them do the same


def test_the_experiments_report_pools_the_episodes_of_all_training_seeds(tmp_path, monkeypatch):
    """And only of those that all cells of a row have, in the mean of all cells."""
    for task, seed, successes in (
        ("push_cube", 1, 30),
        ("push_cube", 2, 50),
        ("pick_place", 1, 10),
        ("open_drawer", 1, 20),
        ("close_drawer", 1, 20),
    ):
        for paradigm, add in (("real", 0), ("sft", 5), ("rlco", 20)):
            name = f"{task}-tiny-pi05-{paradigm}-s{seed}"
            folder = tmp_path / "results/raw" / name
            folder.mkdir(parents=True)
            results = [
                dict(policy=f"runs/experiment/{name}/best", domain=domain, episodes=100, successes=successes + add)
                | dict(success=[k < successes + add for k in range(100)])
                for domain in ("twin", "standin")
            ]
            (folder / "results.json").write_text(json.dumps(dict(results=results, args=dict(variation=None))))
        (folder / "metrics.json").write_text(
            json.dumps(
                [
                    {"iteration": i, "eval/success_twin": 0.5, "eval/success_standin": 0.2, "eval/real_loss": 0.1}
                    for i in (0, 5)
                ]
            )
        )
    monkeypatch.chdir(tmp_path)
    experiment.report()
    text = (tmp_path / "results/README.md").read_text()
    low, high = eval_real.wilson(120, 200)
    rlco = f"**60 [{100 * low:.0f}, {100 * high:.0f}]** (50, 70)"
    assert f"| push_cube | 40 [33, 47] (30, 50) | 45 [38, 52] (35, 55) | {rlco} | – | – | – |" in text
    assert "| mean | 20 [16, 24] | 25 [21, 29] | **40 [35, 45]** | – | – | – |" in text  # of seed 1
    assert (tmp_path / "results/main-tiny-pi05.png").stat().st_size > 5000


def test_the_report_leaves_out_what_has_no_training_seed_in_common_yet(tmp_path, monkeypatch):
    for name in ("rlco-s1", "rl-beta0-s2"):
        folder = tmp_path / f"results/raw/push_cube-tiny-pi05-{name}"
        folder.mkdir(parents=True)
        results = [
            dict(policy=f"runs/experiment/{folder.name}/best", domain="twin", episodes=100, successes=50, success=[])
        ]
        (folder / "results.json").write_text(json.dumps(dict(results=results, args=dict(variation=None))))
        (folder / "metrics.json").write_text(
            json.dumps([{"iteration": 0, "eval/success_twin": 0.5, "eval/success_standin": 0.2, "eval/real_loss": 0.1}])
        )
    monkeypatch.chdir(tmp_path)
    experiment.report()
    assert "Forgetting" not in (tmp_path / "results/README.md").read_text()


def test_the_committed_tables_are_what_the_raw_results_give(tmp_path, monkeypatch):
    root = Path(experiment.__file__).parents[1]
    shutil.copytree(root / "results/raw", tmp_path / "results/raw")
    monkeypatch.chdir(tmp_path)
    experiment.report()
    text = Path("results/README.md").read_text()
    assert text == (root / "results/README.md").read_text()
    tables = re.findall(r"^\| (?:stand-in|twin)\b.*(?:\n\|.*)+", (root / "README.md").read_text(), re.M)
    assert len(tables) == 1 and tables[0] in text


def test_a_difference_is_of_training_runs_where_there_are_several():
    before = {"a": {1: [0, 0, 1, 1], 2: [0, 0, 0, 0]}, "b": {1: [1, 0, 0, 0], 2: [0, 1, 0, 0], 3: [1, 1, 1, 1]}}
    after = {"a": {1: [1, 1, 1, 1], 2: [1, 0, 0, 0]}, "b": {1: [1, 1, 1, 0], 2: [1, 1, 1, 1]}}
    gain = {"a": [0.5, 0.25], "b": [0.5, 0.75]}  # of each run: seed 3 is in one of them alone
    error = ((0.125**2 * 2 / 2 + 0.125**2 * 2 / 2) / 4) ** 0.5  # of the mean of two means of two
    mean, low, high, p = experiment.difference(before, after)
    assert mean == 0.5 == np.mean(list(gain.values()))
    assert (low, high) == pytest.approx((0.5 - 4.303 * error, 0.5 + 4.303 * error), abs=1e-3)  # two degrees of freedom
    assert p == 2 / 16  # all gain: the most that four signs can show
    assert experiment.difference(before, {"a": after["a"], "b": {}}) is None


def test_with_one_training_seed_a_difference_is_of_episodes():
    before = {"a": {1: [0] * 60 + [1] * 40}, "b": {1: [0] * 90 + [1] * 10}}
    after = {"a": {1: [1] * 20 + [0] * 40 + [1] * 40}, "b": {1: [1] * 10 + [0] * 80 + [0] * 2 + [1] * 8}}
    mean, low, high, p = experiment.difference(before, after)
    error = ((0.16 + (0.12 - 0.08**2)) / 99 / 4) ** 0.5  # of a mean of 100 differences each, of both tasks
    assert mean == pytest.approx(0.14) and high - mean == pytest.approx(1.972 * error, rel=1e-3)
    assert p == eval_real.sign_test(30, 2)


def test_tasks_weigh_alike_in_their_mean():
    assert experiment.interval([{1: (30, 100)}, {1: (50, 100)}]) == (0.4, *eval_real.wilson(80, 200))
    share, low, high = experiment.interval([{1: (30, 100), 2: (30, 100)}, {1: (50, 100)}])
    error = 1.96 * ((0.24 / 200 + 0.24 / 100) / 4) ** 0.5  # of the mean of two rates, at 40 % both
    assert share == 0.4 and (low, high) == pytest.approx((0.4 - error, 0.4 + error), abs=0.003)


def test_bold_is_what_is_above_all_it_is_compared_with():
    apart, near, nothing = [{1: (90, 100)}], [{1: (80, 100)}], [{}]
    assert experiment.compare([near, apart]) == ["80 [71, 87]", "90 [83, 94]"]
    assert experiment.compare([[{1: (50, 100)}], apart, nothing]) == ["50 [40, 60]", "90 [83, 94]", "–"]
    assert experiment.compare([[{1: (50, 100)}], apart]) == ["50 [40, 60]", "**90 [83, 94]**"]


SCRIPT = """import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
with open("order", "a") as order:
    print(out.name, file=order)
(out / ("metrics.json" if "rlco" in sys.argv[0] else "results.json")).write_text("[1]")
sys.exit("bad" in out.name and not pathlib.Path("mended").exists())
"""


def test_the_experiment_goes_on_where_it_ended_and_a_failure_holds_up_only_what_needs_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for script in ("train_sft.py", "train_rlco.py", "eval_real.py"):
        Path(script).write_text(SCRIPT)
    Path("data.py").write_text("")
    good, bad = (experiment.stage1("push_cube", "tiny-pi05", 1, name) for name in ("good", "bad"))
    cells = [experiment.evaluation(run) for run in (experiment.stage2(bad, "tiny-pi05", 1, "after_bad"), good)]
    failed = experiment.run(cells, jobs=1)
    assert failed == [
        f"{folder}/push_cube-tiny-pi05-{name}-s1"
        for folder, name in (("runs/experiment", "bad"), ("results/raw", "after_bad"), ("runs/experiment", "after_bad"))
    ]
    assert Path("order").read_text().split() == [f"push_cube-tiny-pi05-{name}-s1" for name in ("bad", "good", "good")]
    Path("mended").touch()
    Path("order").unlink()
    assert experiment.run(cells, jobs=2) == []
    assert Path("results/raw/push_cube-tiny-pi05-after_bad-s1/metrics.json").read_text() == "[1]"
    assert Path("order").read_text().split() == [
        f"push_cube-tiny-pi05-{name}-s1" for name in ("bad", "after_bad", "after_bad")
    ]
    shutil.rmtree("results/raw/push_cube-tiny-pi05-after_bad-s1")  # the evaluation anew
    Path("order").unlink()
    assert experiment.run(cells, jobs=1) == []
    assert Path("results/raw/push_cube-tiny-pi05-after_bad-s1/metrics.json").read_text() == "[1]"
    assert Path("order").read_text().split() == ["push_cube-tiny-pi05-after_bad-s1"]
