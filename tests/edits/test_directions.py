"""Directions of heads, against plain means, and what adding them does."""

import pytest
import torch

import headwise
from headwise.edits import AddDirection
from headwise.edits.directions import head_directions
from headwise.instruments.metrics import LogitDifference
from headwise.instruments.steering import steered
from headwise.models import Site, recording, view
from tests.instruments import tiny


def sides():
    return [{"input_ids": tiny.ids(8, seed=n, batch=4)} for n in (1, 2)]


@pytest.mark.parametrize("position", [-1, 2, None])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_directions_are_differences_of_means(name, position):
    model = getattr(tiny, name)()
    positive, negative = sides()
    raw = head_directions(model, [positive], [negative], position, unit=False)
    scaled = head_directions(model, [positive], [negative], position)
    for layer in range(2):
        site, outs = Site("heads", layer), []
        for side in (positive, negative):
            with torch.no_grad(), recording(view(model), [site]) as kept:
                model(**side)
            outs.append(kept[site].mean(1) if position is None else kept[site][:, position])
        for head in range(4):
            shift = sum(outs[0][:, head]) / 4 - sum(outs[1][:, head]) / 4
            torch.testing.assert_close(raw[site][head], shift, atol=1e-5, rtol=1e-4)
            along = shift / shift.norm()
            spread = torch.stack([x @ along for x in (*outs[0][:, head], *outs[1][:, head])]).std(
                correction=0
            )
            torch.testing.assert_close(scaled[site][head], along * spread, atol=1e-5, rtol=1e-3)


def test_adding_them_moves_examples_to_the_other_side():
    """Negative examples, pushed by the raw differences of every head of the last layer, have at
    that site the mean of positive ones."""
    model = tiny.llama()
    positive, negative = sides()
    site = Site("heads", 1)
    shift = head_directions(model, [positive], [negative], unit=False)[site]
    with torch.no_grad(), recording(view(model), [site]) as kept:
        model(**positive)
        goal = kept[site][:, -1].mean(0)
        with headwise.swap(model, {1: AddDirection(shift)}):
            model(**negative)
    torch.testing.assert_close(kept[site][:, -1].mean(0), goal, atol=1e-5, rtol=1e-5)


def test_their_effect_is_measured_like_any_other():
    model = tiny.llama()
    positive, negative = sides()
    shift = head_directions(model, [positive], [negative])[Site("heads", 0)]
    found = steered(
        model,
        {0: AddDirection(shift, 3.0)},
        aims=(negative, LogitDifference(3, 4)),
        keeps=(positive, "kl"),
        text=negative["input_ids"],
    )
    assert found.efficacy.change.mean != 0
    assert found.specificity.after.mean > 0
    assert "AddDirection" in found.record[0]["change"]


def test_a_side_without_examples_is_refused():
    with pytest.raises(ValueError, match="no negative examples"):
        head_directions(tiny.llama(), sides()[:1], [])
