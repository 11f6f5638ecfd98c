"""Measuring only what may be picked leads to what measuring everything leads to."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.compress.search.asking import read_text
from headwise.compress.search.candidates import KINDS, candidates
from headwise.compress.search.choosing import choose, forget, keys_of, pick_measured
from headwise.compress.search.prices import prices
from headwise.compress.search.rounds import pick, take_out
from headwise.compress.search.searching import shrink
from headwise.compress.structure.channels import channel_scores
from headwise.models import view
from tests.instruments.tiny import llama


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), need=st.floats(0.02, 0.9))
def test_with_old_prices_that_are_no_higher_the_choice_is_that_of_new_ones(
    seed: int, need: float
) -> None:
    look = _look()
    all_of_them = _candidates()
    random = torch.Generator().manual_seed(seed)
    true = torch.randn(len(all_of_them), generator=random, dtype=torch.float64)
    old = true - torch.rand(len(all_of_them), generator=random, dtype=torch.float64)
    asked: list[int] = []

    def measure(numbers: list[int]) -> torch.Tensor:
        asked.extend(numbers)
        return true[numbers]

    whole = need * sum(one.parameters for one in all_of_them if one.kind != "layers")
    found, _ = pick_measured(all_of_them, old, measure, "params", whole, look)
    assert found == pick(all_of_them, true, "params", whole, look)
    assert len(asked) == len(set(asked))
    assert {all_of_them.index(one) for one in found} <= set(asked)


def _look() -> Any:
    return _KNOWN.setdefault("look", view(llama(num_hidden_layers=3).eval()))


def _candidates() -> Any:
    if "given" not in _KNOWN:
        scores = channel_scores(_look(), torch.randint(0, 60, (2, 16)))
        _KNOWN["given"] = candidates(_look(), KINDS, 16, scores)
    return _KNOWN["given"]


_KNOWN: dict[str, Any] = {}


def test_what_is_picked_was_measured_on_all_of_the_text() -> None:
    model = llama(num_hidden_layers=3).eval()
    ids = torch.randint(0, 60, (16, 16), generator=torch.manual_seed(0))
    text = read_text(model, ids)
    assert sum(map(len, text.calibration)) == 8
    assert sum(map(len, text.few)) == 2
    known: dict[str, float] = {}
    look, steps = view(model), []
    chosen = choose(look, text, KINDS, 16, "params", 3000.0, known, range(3), lambda w: None,
                    lambda *args: steps.append(args))  # fmt: skip
    given = candidates(look, KINDS, 16, channel_scores(look, text.given))
    exact = prices(look, text.calibration, given).tolist()
    rough = prices(look, text.few, given).tolist()
    keys = keys_of(given, range(3))
    assert len(set(keys)) == len(keys) == len(known)
    for one, key, price, roughly in zip(given, keys, exact, rough, strict=True):
        if one in chosen:
            assert known[key] == pytest.approx(price, abs=1e-5)
        assert min(abs(known[key] - price), abs(known[key] - roughly)) < 1e-5
    assert steps[0][1] == len(given)
    assert any(done == total for done, total, _ in steps)
    # what was measured is not measured again while its layer stays as it is
    steps.clear()
    forget(known, [one for one in given if one.layer == 1], range(3))
    choose(look, text, KINDS, 16, "params", 1.0, known, range(3), lambda w: None,
           lambda *args: steps.append(args))  # fmt: skip
    assert steps[0][1] == sum(one.layer == 1 for one in given)


def test_few_windows_are_all_measured() -> None:
    model = llama().eval()
    text = read_text(model, torch.randint(0, 60, (2, 16)))
    assert text.short
    known: dict[str, float] = {}
    told: list[str] = []
    chosen = choose(view(model), text, KINDS, 16, "params", 3000.0, known, range(2), told.append,
                    lambda *args: None)  # fmt: skip
    given = candidates(view(model), KINDS, 16, channel_scores(view(model), text.given))
    exact = prices(view(model), text.calibration, given)
    assert chosen == pick(given, exact, "params", 3000.0, view(model))
    assert not any("roughly" in words for words in told)


def test_layers_keep_their_names_when_others_go(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=4).eval()
    small = copy.deepcopy(model)
    given = candidates(view(small), ("layers",), 16)
    assert keys_of(given, range(4)) == [f"L{n} layers 0" for n in range(4)]
    take_out(small, [given[1]])
    left = candidates(view(small), ("layers",), 16)
    assert keys_of(left, [0, 2, 3]) == [f"L{n} layers 0" for n in (0, 2, 3)]
    ids = torch.randint(0, 60, (16, 16), generator=torch.manual_seed(0))
    curve = shrink(model, "params=0.5", ids, rounds=4, repeats=1, kinds=("layers",))
    assert all(key.split()[1] == "layers" for key in curve.about["prices"])
