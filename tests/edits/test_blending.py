"""Outputs blended with own values, or pushed along a direction."""

import pytest
import torch

import headwise
from headwise.edits import AddDirection, Silence, TowardsSelf
from headwise.models import Site, UnsupportedModelError, observe, recording, view
from tests.edits.test_changes import first_readings
from tests.models.families import FAMILIES, inputs


@pytest.mark.parametrize("name", ["llama", "llama_mqa", "gpt2", "bert", "vit"])
def test_a_map_pulled_towards_the_diagonal(name):
    model = FAMILIES[name]("eager")
    given, look = inputs(model), view(model)
    before = first_readings(model, given, look, 0)
    (place,) = before
    reading = before[place]
    site = Site("heads", 0)
    with torch.no_grad(), recording(look, [site]) as kept:
        model(**given)
        plain = kept[site]
        with headwise.swap(look, {(*place, 0, (1, 2)): TowardsSelf(0.3)}):
            model(**given)
    n = reading.dense.shape[-1]
    group = reading.dense.shape[1] // reading.value.shape[1]
    for h in range(reading.dense.shape[1]):
        p = reading.dense[:, h].double()
        p = 0.7 * p + 0.3 * torch.eye(n).double() if h in (1, 2) else p
        want = (p @ reading.value[:, h // group].double()).float()
        torch.testing.assert_close(kept[site][:, :, h], want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(kept[site][:, :, 0], plain[:, :, 0], atol=1e-6, rtol=1e-6)


def test_while_decoding_the_own_value_is_the_last():
    model = FAMILIES["llama"]("sdpa")
    ids = inputs(model)["input_ids"]
    with torch.no_grad(), headwise.swap(model, {"all": TowardsSelf(1.0)}):
        whole = model(ids).logits
        cached = model(ids[:, :6], use_cache=True)
        last = model(ids[:, 6:7], past_key_values=cached.past_key_values).logits
    torch.testing.assert_close(last[:, 0], whole[:, 6], atol=2e-5, rtol=2e-5)


def test_a_map_that_is_not_what_was_computed_is_not_shown():
    model = FAMILIES["llama"]("sdpa")
    look = view(model)
    with (
        pytest.raises(UnsupportedModelError, match=r"TowardsSelf\(u=0.5\) gives what no map"),
        observe(look, lambda reading: None),
        headwise.swap(model, {(1, 0): TowardsSelf(0.5)}),
    ):
        model(**inputs(model))


@pytest.mark.parametrize("shape", [(6,), (4, 6)])
def test_directions_are_added_to_what_heads_give(shape):
    model = FAMILIES["llama"]("sdpa")
    look, given, site = view(model), inputs(model), Site("heads", 1)
    direction = torch.randn(shape)
    with torch.no_grad(), recording(look, [site]) as kept:
        model(**given)
        before = kept[site]
        with headwise.swap(model, {(1, (0, 3)): [Silence(), AddDirection(direction, 2.0)]}):
            model(**given)
    want = before.clone()
    for h in (0, 3):
        want[:, :, h] = 2.0 * (direction if len(shape) == 1 else direction[h])
    torch.testing.assert_close(kept[site], want, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused_before_anything_runs():
    model = FAMILIES["llama"]("sdpa")
    with pytest.raises(ValueError, match=r"shape \(3, 6\).* give \(value_dim,\), or \(4"):
        headwise.swap(model, {0: AddDirection(torch.zeros(3, 6))})
    with pytest.raises(ValueError, match="between 0 and 1"):
        TowardsSelf(1.5)
    crossed = FAMILIES["bart"]("sdpa")
    with pytest.raises(ValueError, match="no values of their own"):
        headwise.swap(crossed, {("decoder", "cross", 0, 0): TowardsSelf(0.5)})
    with (
        pytest.raises(ValueError, match=r"5 numbers for heads of .* that give 6"),
        headwise.swap(model, {0: AddDirection(torch.zeros(5))}),
    ):
        model(**inputs(model))
