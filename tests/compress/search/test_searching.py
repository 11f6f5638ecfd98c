import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import headwise
import headwise.compress
from headwise.compress.search import searching
from headwise.compress.search.candidates import candidates, removable
from headwise.compress.search.curve import Curve
from headwise.compress.search.prices import prices
from headwise.compress.search.rounds import pick, take_out
from headwise.compress.search.searching import shrink
from headwise.compress.search.targets import UnreachableError
from headwise.compress.structure.channels import channel_scores
from headwise.compress.structure.costs import cost
from headwise.instruments.examples import read_examples
from headwise.instruments.metrics import metric_of
from headwise.models import view
from headwise.models.backbones import Decoder
from headwise.models.prefix import logits_of
from headwise.parts import Attention, Mlp
from tests.instruments.tiny import gpt2, llama, vit


def ids(model: Any, batch: int = 4, n: int = 24) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, n), generator=torch.manual_seed(0))


def loss_of(model: nn.Module, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        logits = logits_of(model(input_ids=tokens))
    return float(metric_of("loss").score(logits, {"input_ids": tokens}).double().mean())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_price_is_what_the_loss_rises_by_when_it_is_really_taken_out(make: Any) -> None:
    model = make().eval()
    tokens = ids(model)
    look = view(model)
    batches = read_examples(model, tokens)
    kinds = ("heads", "channels", "attention", "mlp", "layers")
    given = candidates(look, kinds, 24, channel_scores(look, tokens))
    assert {one.kind for one in given} == set(kinds)
    found = prices(look, batches, given)
    before, whole = loss_of(model, tokens), cost(model, 24)
    for one, price in zip(given, found.tolist(), strict=True):
        cut = copy.deepcopy(model)
        take_out(cut, [one])
        assert loss_of(cut, tokens) - before == pytest.approx(price, abs=2e-4), str(one)
        gone = whole.parameters - cost(cut, 24).parameters
        assert gone >= one.parameters, str(one)  # norms and biases go as well
        assert gone <= one.parameters * 1.1 + 3 * look.width, str(one)


def test_prices_hold_where_groups_are_unequal_already() -> None:
    model = llama().eval()
    headwise.compress.prune_heads(model, [(0, 0)])
    tokens = ids(model)
    look = view(model)
    given = candidates(look, ("heads",), 24)
    assert [one.which for one in given if one.layer == 0] == [(0,), (1, 2)]
    found = prices(look, read_examples(model, tokens), given)
    before, whole = loss_of(model, tokens), cost(model, 24)
    for one, price in zip(given, found.tolist(), strict=True):
        cut = copy.deepcopy(model)
        take_out(cut, [one])
        assert loss_of(cut, tokens) - before == pytest.approx(price, abs=2e-4)
        assert whole.parameters - cost(cut, 24).parameters == one.parameters


def test_what_costs_least_goes_first_and_nothing_twice() -> None:
    model = llama().eval()
    look = view(model)
    given = candidates(look, ("heads", "attention", "layers"), 24)
    price = torch.arange(len(given), dtype=torch.float64)
    chosen = pick(given, price, "params", 1e9, look)
    whole = [one for one in chosen if one.kind != "heads"]
    assert len(whole) <= 1
    for one in chosen:
        groups = sum(c.kind == "heads" and c.layer == one.layer for c in given)
        taken = sum(c.kind == "heads" and c.layer == one.layer for c in chosen)
        assert one.kind != "heads" or taken < groups
    cheap = min(range(len(given)), key=lambda n: float(price[n]) / max(1, given[n].parameters))
    assert pick(given, price, "params", 1.0, look) == [given[cheap]]


def test_a_budget_is_met_and_the_original_stays_as_it_is() -> None:
    model = llama().eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    curve = shrink(model, "params=0.8", ids(model, 6), rounds=3, repeats=1)
    assert curve.met
    assert curve.best.left["params"] <= 0.8
    assert curve.model is not None
    count = sum(p.numel() for p in curve.model.parameters())
    whole = sum(p.numel() for p in model.parameters())
    assert count / whole == pytest.approx(curve.best.left["params"])
    assert [p.left["params"] for p in curve.points] == sorted(
        (p.left["params"] for p in curve.points), reverse=True
    )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert headwise.shrink is shrink


def test_models_of_parts_and_vision_models_are_shrunk_too() -> None:
    torch.manual_seed(0)
    own = Decoder(
        32, 16, 3, mixer=lambda layer: Attention(16, 4, causal=True), feed=lambda layer: Mlp(16, 32)
    ).eval()
    tokens = torch.randint(0, 32, (6, 20))
    curve = shrink(own, {"params": 0.8}, tokens, rounds=2, repeats=1)
    assert curve.met
    model = vit().eval()
    size = model.config.image_size
    inputs = {
        "pixel_values": torch.randn(6, model.config.num_channels, size, size),
        "labels": torch.arange(6) % model.config.num_labels,
    }
    seen = shrink(model, {"params": 0.85}, inputs, rounds=2, repeats=1)
    assert seen.met
    assert "kv" not in seen.best.left or seen.best.left["kv"] >= 0


def test_a_bound_on_quality_ends_the_search_and_what_broke_it_is_kept_as_refused() -> None:
    model = llama().eval()
    curve = shrink(model, "params=0.5", ids(model, 6), quality="kl<=0.0002", rounds=3, repeats=1)
    assert not curve.met
    assert curve.best.quality.kl <= 0.0002
    assert not curve.points[-1].within
    assert "allows no further step" in curve.about["done"]


def test_what_was_too_much_in_a_round_is_not_asked_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bound is broken once, at the first step; half of it passes, and so do the rest."""
    real, asked = searching.point_of, []

    def judged(*args: Any) -> Any:
        point, seconds = real(*args)
        asked.append(point)
        return dataclasses.replace(point, within=len(asked) != 2), seconds

    monkeypatch.setattr(searching, "point_of", judged)
    curve = shrink(
        llama().eval(), "params=0.5", ids(llama(), 6), quality="kl<=1", rounds=2, repeats=1
    )
    first, second = (curve.points[n] for n in (1, 2))
    assert not first.within
    assert second.within
    assert curve.about["pace"] == len(second.took) / len(first.took) < 1
    assert len(curve.points) > 4  # so that it takes more rounds than were asked for
    before = [1.0, *(p.left["params"] for p in curve.points[2:])]
    steps = [a - b for a, b in itertools.pairwise(before)]
    assert max(steps[1:]) < 1 - first.left["params"]


def test_an_impossible_budget_is_refused_with_the_one_that_can_be_met() -> None:
    model = llama().eval()
    with pytest.raises(UnreachableError, match="leaves params=") as refused:
        shrink(model, "params=0.01", ids(model), repeats=1)
    reachable = refused.value.reachable
    assert 0.01 < reachable < 1
    gone, _ = removable(view(model), ("heads",), 24)
    with pytest.raises(UnreachableError) as heads:
        shrink(model, "params=0.01", ids(model), kinds=("heads",), repeats=1)
    whole = cost(model, 24).parameters
    assert heads.value.reachable == pytest.approx(1 - gone / whole)
    just = shrink(
        model, {"params": heads.value.reachable}, ids(model), kinds=("heads",), rounds=4, repeats=1
    )
    assert just.met


class KilledError(Exception):
    pass


def test_a_killed_search_goes_on_to_the_same_end(tmp_path: Path) -> None:
    model = llama().eval()
    asked: dict[str, Any] = {"rounds": 4, "repeats": 1}
    whole = shrink(model, "params=0.75", ids(model, 6), out=tmp_path / "whole", **asked)
    rounds = []

    def until_the_third(words: str) -> None:
        rounds.append(words)
        if words.startswith("round 3"):
            raise KilledError

    with pytest.raises(KilledError):
        shrink(
            model, "params=0.75", ids(model, 6), out=tmp_path / "cut", tell=until_the_third, **asked
        )
    half = Curve.load(tmp_path / "cut" / "curve.json")
    assert len(half.points) == 3
    with pytest.raises(ValueError, match="resume"):
        shrink(model, "params=0.75", ids(model, 6), out=tmp_path / "cut", **asked)
    with pytest.raises(ValueError, match="another search"):
        shrink(model, "params=0.7", ids(model, 6), out=tmp_path / "cut", resume=True, **asked)
    done = shrink(model, "params=0.75", ids(model, 6), out=tmp_path / "cut", resume=True, **asked)
    assert [p.took for p in done.points] == [p.took for p in whole.points]
    assert [p.quality for p in done.points] == [p.quality for p in whole.points]
    for place in ("whole", "cut"):
        assert sorted(f.name for f in (tmp_path / place).iterdir()) == ["curve.json", "model"]
    loaded = headwise.load(tmp_path / "cut" / "model")
    assert whole.model is not None
    tokens = ids(model)
    with torch.no_grad():
        a, b = whole.model(input_ids=tokens).logits, loaded(input_ids=tokens).logits
    assert torch.equal(a, b)
    again = shrink(model, "params=0.75", ids(model, 6), out=tmp_path / "cut", resume=True, **asked)
    assert again.record() == done.record()


def test_distilling_is_a_point_of_its_own() -> None:
    model = llama().eval()
    curve = shrink(model, "params=0.9", ids(model, 6), rounds=1, repeats=1, distil=0.5)
    assert curve.points[-1].took == ("distilled for 0.5 s",)
    assert curve.best.quality.loss <= curve.points[-2].quality.loss
