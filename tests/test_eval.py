import av
import numpy as np
import pytest
from scipy.stats import binomtest

import envs
import eval_real


@pytest.mark.parametrize("successes,n", [(0, 7), (0, 20), (3, 20), (20, 20), (50, 100), (119, 120), (120, 120)])
def test_wilson_interval_is_scipys(successes, n):
    interval = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    low, high = eval_real.wilson(successes, n)
    assert (low, high) == pytest.approx((interval.low, interval.high), abs=1e-6) and 0 <= low and high <= 1


def test_video_holds_every_frame_side_by_side(tmp_path):
    dark, light = np.full((64, 64, 3), 20, np.uint8), np.full((64, 64, 3), 220, np.uint8)
    envs.write_video(tmp_path / "v.mp4", [[dark] * 7, [light, dark]])
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
    assert a.startswith("| a | 25 % [18, 34] of 100, 30 |") and b.endswith("| 100 % [96, 100] of 100, 30 |")
