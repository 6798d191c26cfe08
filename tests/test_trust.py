"""Short forms of the campaigns of results/trust.py."""

import pytest

from results import trust


@pytest.mark.parametrize("kind", trust.Fuzz.kinds)
def test_damaged_folders_are_read_or_refused_in_one_line(kind):
    outcomes = trust.try_damage(kind, mutations=60, seed=1)
    assert set(outcomes) == {"read", "refused"}, outcomes
