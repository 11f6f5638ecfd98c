"""The search on models whose layers are not a Llama's, and budgets that are just possible."""

from typing import Any

import pytest
import torch

from headwise.compress.search.candidates import KINDS, candidates, removable
from headwise.compress.search.prices import prices
from headwise.compress.search.searching import shrink
from headwise.compress.search.targets import UnreachableError
from headwise.compress.structure.channels import channel_scores
from headwise.compress.structure.costs import cost
from headwise.compress.structure.layers import drop_layers
from headwise.instruments.examples import read_examples
from headwise.models import view
from tests.instruments.tiny import bert, gpt2, gpt_oss, llama, mistral, vit


def inputs_of(model: Any) -> Any:
    torch.manual_seed(0)
    if hasattr(model.config, "image_size"):
        size = model.config.image_size
        return {
            "pixel_values": torch.randn(6, 3, size, size),
            "labels": torch.arange(6) % model.config.num_labels,
        }
    return torch.randint(0, model.config.vocab_size, (8, 24))


@pytest.mark.parametrize("make", [llama, gpt2, gpt_oss, mistral, bert, vit])
@pytest.mark.parametrize("keep", ["params=0.85", "time=0.75"])
def test_whole_parts_go_one_after_another(make: Any, keep: str) -> None:
    """A layer may be left with an attention alone, or a feed-forward part alone."""
    model = make().eval()
    curve = shrink(model, keep, inputs_of(model), rounds=4, repeats=1)
    what = keep.partition("=")[0]
    assert len(curve.points) > 1
    if what == "params":  # a time is measured
        assert curve.met


@pytest.mark.parametrize("make", [llama, gpt_oss, bert])
def test_a_layer_that_has_one_part_left_has_a_price(make: Any) -> None:
    for part in ("attention", "mlp"):
        model = make().eval()
        drop_layers(model, [0], parts=part)
        look = view(model)
        given = candidates(look, ("layers", "attention", "mlp"), 24)
        batches = read_examples(model, inputs_of(model))
        found = prices(look, batches, given)
        assert len(found) == len(given)
        other = {"attention": "mlp", "mlp": "attention"}[part]
        gone = [one for one in given if one.kind == "layers" and one.layer == 0]
        assert all(one.parts == (other,) for one in gone)
        assert gone


@pytest.mark.parametrize("make", [llama, gpt2, gpt_oss, bert, vit])
@pytest.mark.parametrize("kinds", [("mlp",), ("attention",), ("layers",), ("heads", "mlp")])
def test_what_can_go_at_most_is_what_goes_when_all_goes(make: Any, kinds: tuple[str, ...]) -> None:
    """Candidates are really taken out until there are none: that much and no more."""
    from headwise.compress.search.rounds import take_out

    model = make().eval()
    whole = cost(model, 24).parameters
    gone, _ = removable(view(model), kinds, 24)
    counted = 0
    while given := candidates(view(model), kinds, 24):
        largest = max(given, key=lambda one: one.parameters)
        counted += largest.parameters
        take_out(model, [largest])
    assert counted == gone
    assert 0 <= whole - cost(model, 24).parameters - gone < 0.06 * whole  # norms and biases


def test_what_is_said_to_be_reachable_is_reached() -> None:
    for kinds in (("mlp",), ("attention", "heads")):
        model = llama().eval()
        with pytest.raises(UnreachableError) as refused:
            shrink(model, "params=0.01", inputs_of(model), kinds=kinds, repeats=1)
        asked = {"params": refused.value.reachable}
        assert shrink(model, asked, inputs_of(model), kinds=kinds, rounds=4, repeats=1).met


def test_work_of_an_image_is_of_all_its_patches() -> None:
    model = vit().eval()
    with pytest.raises(UnreachableError) as refused:
        shrink(model, "time=0.001", inputs_of(model), repeats=1)
    assert refused.value.reachable < 0.5


def test_experts_go_as_a_whole_and_their_channels_stay() -> None:
    model, told = gpt_oss().eval(), []
    shrink(model, "params=0.9", inputs_of(model), rounds=1, repeats=1, tell=told.append)
    assert any(words.startswith("channels stay: ") for words in told)
    look = view(model)
    given = [one for one in candidates(look, KINDS, 24) if one.kind == "mlp"]
    mlp = look.layers[0].mlp
    assert mlp is not None
    assert given[0].parameters == sum(p.numel() for p in mlp.parameters())
    small = gpt_oss().eval()
    before = cost(small, 24)
    drop_layers(small, [0], parts="mlp")
    assert given[0].work * 2 * 24 == before.flops - cost(small, 24).flops


def test_bert_has_channels_that_can_go() -> None:
    model = bert().eval()
    scores = channel_scores(model, inputs_of(model))
    given = [one for one in candidates(view(model), KINDS, 24, scores) if one.kind == "channels"]
    assert given
    mlp = view(model).layers[0].mlp
    assert mlp is None  # spread over the layer
