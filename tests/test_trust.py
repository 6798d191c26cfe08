"""Short forms of the campaigns of results/trust.py."""

import numpy as np
import pytest

from results import trust


@pytest.mark.parametrize("kind", trust.KINDS)
def test_what_is_damaged_is_read_or_refused_in_one_line(kind):
    outcomes = trust.try_damage(kind, mutations=25, seed=1)
    assert set(outcomes) <= {"read", "refused"}, outcomes


def test_a_collection_that_is_killed_ends_as_if_nothing_had_been(tmp_path):
    (tmp_path / "empty").mkdir()
    command = "data.py collect --num-twin 2 --num-real 1 --num-val 1 --workers 1"
    *_, row = trust.survive("collection", command, tmp_path / "empty", 1, np.random.default_rng(0))
    assert row == [1, row[1], 0, "nothing"] and row[1] > 0


def test_an_arm_is_at_rest_when_its_joints_are():
    clock = np.arange(0, 3, 0.01)
    motion = np.zeros((len(clock), 10))
    motion[:, 0] = clock
    motion[:, 3] = 0.3 * np.minimum(clock, 1.5)  # rad
    motion[:, 9] = 0.4 * clock  # s, of a simulation that is slow
    assert abs(trust.seconds_to_rest(motion, since=1.0) - 0.5) < 0.1
    assert trust.seconds_to_rest(motion, since=2.0) == 0
    assert trust.seconds_to_rest(motion[clock < 1.5], since=0.0) == float("inf")
    assert abs(trust.speed_of_simulation(motion, since=1.0) - 0.4) < 1e-6
