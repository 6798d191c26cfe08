import av
import numpy as np
import pytest
from scipy.stats import binomtest

import eval_real
import page
from checkpoints import write_file


@pytest.mark.parametrize("successes,n", [(0, 7), (0, 20), (3, 20), (20, 20), (50, 100), (119, 120), (120, 120)])
def test_wilson_interval_is_scipys(successes, n):
    interval = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    low, high = eval_real.wilson(successes, n)
    assert (low, high) == pytest.approx((interval.low, interval.high), abs=1e-6) and 0 <= low and high <= 1


def test_video_holds_every_frame_side_by_side(tmp_path):
    dark, light = np.full((64, 64, 3), 20, np.uint8), np.full((64, 64, 3), 220, np.uint8)
    page.write_video(tmp_path / "v.mp4", [[dark] * 7, [light, dark]])
    with av.open(str(tmp_path / "v.mp4")) as video:
        frames = [f.to_ndarray(format="rgb24") for f in video.decode(video=0)]
    assert len(frames) == 7 + 10 and frames[0].shape == (64, 128, 3)
    assert abs(frames[0][:, 70:].mean() - 220) < 8 and abs(frames[3][:, 70:].mean() - 20) < 8
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


def test_table_has_a_row_for_each_checkpoint_and_a_column_for_each_domain():
    results = []
    for policy, domain, rate in (
        ("a", "standin", 0.25),
        ("a", "twin", 0.5),
        ("b", "standin", 0.75),
        ("b", "twin", 1.0),
    ):
        cell = dict(policy=policy, domain=domain, success_rate=rate, wilson=eval_real.wilson(int(100 * rate), 100))
        results.append(dict(cell, episodes=100, mean_length=30.0))
    head, _, a, b = eval_real.table(results).splitlines()
    assert "standin (not a real robot)" in head and "twin" in head
    assert a.startswith("| a | 25 % [18, 34] of 100, 30 steps |") and b.endswith("| 100 % [96, 100] of 100, 30 steps |")


@pytest.mark.parametrize("gained,lost", [(0, 0), (1, 0), (5, 0), (6, 0), (9, 2), (2, 9), (31, 14)])
def test_sign_test_is_scipys(gained, lost):
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1
    assert eval_real.sign_test(gained, lost) == pytest.approx(expected)


def outcomes(gained, lost, both, neither):
    """Success by seed of two checkpoints that differ as often as that."""
    pairs = [(0, 1)] * gained + [(1, 0)] * lost + [(1, 1)] * both + [(0, 0)] * neither
    return ({seed: bool(pair[i]) for seed, pair in enumerate(pairs)} for i in (0, 1))


def test_the_paired_interval_holds_the_true_difference():
    """In 95 % of evaluations of 20 episodes, with what is usual: nearly always right or wrong together."""
    rng = np.random.default_rng(0)
    held = 0
    for counts in rng.multinomial(20, [0.25, 0.05, 0.4, 0.3], 1000):
        low, high = eval_real.paired(*outcomes(*counts))["interval"]
        held += low <= 0.2 <= high
    assert 930 <= held <= 990
    none, every = eval_real.paired(*outcomes(0, 0, 20, 0)), eval_real.paired(*outcomes(20, 0, 0, 0))
    assert none["interval"][0] < -0.05 and none["p"] == 1 and not none["settled"]
    assert every["difference"] == 1 and every["interval"][1] == 1 and every["settled"]


def test_only_starts_that_both_have_played_are_compared():
    before = {1: False, 2: False, 3: True}
    pair, *more = eval_real.differences(dict(franka=dict(a=before, b={2: True, 3: True, 4: False}, c={})))
    assert (pair["before"], pair["after"], pair["episodes"], pair["gained"], pair["lost"]) == ("a", "b", 2, 1, 0)
    assert not more and "| b − a | +50 [" in eval_real.difference_table([pair])


def test_looking_after_every_trial_settles_nothing_that_is_not_there():
    """Two equal checkpoints, 60 starts on which they differ, a look after each."""
    rng = np.random.default_rng(0)
    settled = fooled = 0
    for flips in rng.random((500, 60)) < 0.5:
        counts = [(int(flips[:n].sum()), int(n - flips[:n].sum())) for n in range(1, 61)]
        settled += any(eval_real.is_settled(*c) for c in counts)
        fooled += any(eval_real.sign_test(*c) < 0.05 for c in counts)
    assert settled <= 25 and fooled > 75
    assert eval_real.is_settled(8, 0) and not eval_real.is_settled(7, 0)


def test_how_many_trials_show_what():
    assert eval_real.smallest_visible(5) is None and "6 are the least" in eval_real.what_trials_show(5)
    few, many = eval_real.smallest_visible(20), eval_real.smallest_visible(100)
    assert 35 <= few <= 50 and 15 <= many <= 25
    rng = np.random.default_rng(0)  # the power is what it says
    better, worse = (rng.random((1000, 20)) < 0.5 + sign * few / 200 for sign in (1, -1))
    counts = zip((better & ~worse).sum(1), (worse & ~better).sum(1))
    assert sum(eval_real.sign_test(int(k), int(m)) < 0.05 for k, m in counts) > 760


def test_the_videos_show_where_checkpoints_differ_and_how_the_best_one_fails():
    before = {seed: seed in (0, 5) for seed in range(10)}
    after = {seed: seed not in (0, 8, 9) for seed in range(10)}
    assert eval_real.worth_seeing(dict(a=before, b=after), 4) == [0, 1, 2, 8]
    assert eval_real.worth_seeing(dict(a=before, b=after), 1) == [0]
    alone = eval_real.worth_seeing(dict(a=after), 4)
    assert {0, 8} < set(alone) and len(alone) == 4
    assert eval_real.worth_seeing(dict(a=before, b=before), 20) == list(range(10))


def test_only_the_same_evaluation_counts_as_done(tmp_path):
    path = tmp_path / "results.json"
    repeat = dict(commit="abc", weights=dict(a="1"), args=dict(episodes=3))
    cell = eval_real.summary("a", "twin", "push_cube", [True, False], [3, 4]) | dict(
        success=[True, False], length=[3, 4]
    )
    write_file(path, dict(results=[cell], **repeat))
    assert eval_real.finished(path, repeat) is None  # killed while it drew the videos
    write_file(path, dict(results=[dict(cell, success=[True, True])], finished=True, **repeat))
    assert eval_real.finished(path, repeat) is None  # its rate is not that of its episodes
    write_file(path, dict(results=[cell], finished=True, **repeat))
    assert eval_real.finished(path, repeat)["results"] == [cell]
    for asked in (dict(weights=dict(a="2")), dict(args=dict(episodes=4))):
        assert eval_real.finished(path, repeat | asked) is None
    for commit in ("abc-dirty", ""):  # nobody knows what code that was
        write_file(path, dict(repeat, results=[cell], finished=True, commit=commit))
        assert eval_real.finished(path, repeat | dict(commit=commit)) is None
