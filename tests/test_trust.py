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
