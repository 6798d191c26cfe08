"""Short forms of the campaigns of results/trust.py."""

import numpy as np
import pytest

import envs
import eval_real
from results import trust


@pytest.mark.parametrize("kind", trust.KINDS)
def test_what_is_damaged_is_read_or_refused_in_one_line(kind, monkeypatch):
    replaced = {envs: ["make"], eval_real: ["load_policies", "provenance", "make_world"]}
    for module, names in replaced.items():  # by the campaign: given back at the end
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))
    outcomes = trust.try_damage(kind, mutations=25, seed=1)
    assert set(outcomes) <= {"read", "refused"}, outcomes


def test_a_collection_that_is_killed_ends_as_if_nothing_had_been(tmp_path):
    (tmp_path / "empty").mkdir()
    command = "data.py collect --num-twin 2 --num-real 1 --num-val 1 --workers 1"
    *_, row = trust.survive("collection", command, tmp_path / "empty", 1, np.random.default_rng(0))
    assert row == [1, row[1], 0, "nothing"] and row[1] > 0
