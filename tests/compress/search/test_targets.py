import math

import pytest

from headwise.compress.search.targets import Keep, Limit


def test_a_budget_is_read_from_words_and_mappings() -> None:
    assert Keep.read("params=0.7") == Keep.read({"params": 0.7}) == Keep("params", 0.7)
    assert str(Keep.read(" kv = .25 ")) == "kv=0.25"


@pytest.mark.parametrize(
    "given", ["params", "params=", "params=x", "heads=0.5", "time=0", "kv=1.5", "params=0.5=3"]
)
def test_what_is_no_budget_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        Keep.read(given)


def test_two_budgets_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="one budget"):
        Keep.read({"params": 0.5, "kv": 0.5})


def test_bounds_hold_and_break_where_they_say() -> None:
    rise, loss = Limit.read("loss<=+0.05"), Limit.read("loss<=2")
    assert rise.holds(3.0, 0.05, 0.0, 9.0)
    assert not rise.holds(0.0, 0.051, 1.0, 0.0)
    assert loss.holds(2.0, 1.0, 0.0, 9.0)
    assert not loss.holds(2.1, -1.0, 1.0, 0.0)
    assert Limit.read("agreement>=0.9").holds(9.0, 9.0, 0.9, 9.0)
    assert not Limit.read("agreement>=0.9").holds(0.0, 0.0, 0.89, 0.0)
    assert Limit.read("kl<=0.1").holds(9.0, 9.0, 0.0, 0.1)
    assert not Limit.read("kl<=0.1").holds(0.0, 0.0, 1.0, 0.11)
    assert not rise.holds(math.nan, math.nan, 1.0, 0.0)


@pytest.mark.parametrize(
    "given", ["loss", "loss>=1", "agreement<=0.9", "kl<=+0.1", "speed<=1", "loss<=-1"]
)
def test_what_is_no_bound_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="no bound on quality"):
        Limit.read(given)


@pytest.mark.parametrize(
    "given", ["loss<=+0.05", "loss<=2.1", "agreement>=0.9", "kl<=0.1", "kl<=1e-05"]
)
def test_a_bound_is_written_as_it_was_read(given: str) -> None:
    assert str(Limit.read(given)) == given
