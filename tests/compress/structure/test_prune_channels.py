"""A model without some channels gives what the whole model gives with them at zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.compress import PruneChannels, channel_scores, prune_channels, steps_of
from headwise.models import Site, UnsupportedModelError, touching, view
from headwise.models.projections import features_first
from headwise.models.spots import down_projection
from tests.instruments import tiny
from tests.models.families import FAMILIES, inputs, scores

SHARED = {"albert": 3, "albert_groups": 2}
EXPERTS = ("gpt_oss",)


@settings(max_examples=3)
@given(draw=st.data())
@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in EXPERTS])
def test_pruned_is_zeroed(name: str, draw: Any) -> None:
    model = FAMILIES[name]("eager")
    batch = inputs(model)
    for stack in view(model).stacks:
        look = view(model)
        several = len(look.stacks) > 1
        layers = [layer for layer in look.layers if layer.stack == stack]
        chosen: dict[int, list[int]] = {}
        gone: dict[int, list[int]] = {}
        for layer in layers:  # layers that are one module lose the same
            size = features_first(down_projection(layer)).shape[1]
            some = st.lists(st.integers(0, size - 1), max_size=size, unique=True)
            every = st.just(list(range(size)))
            key = id(layer.module)
            if key not in chosen:
                chosen[key] = draw.draw(st.one_of(some, every))
            gone[layer.index] = chosen[key]

        def zero(channels: list[int]) -> Any:
            index = torch.tensor(channels, dtype=torch.long)
            return lambda there: there.index_fill(-1, index, 0.0)

        writes = {
            Site("neurons", at, stack if several else None): zero(c) for at, c in gone.items()
        }
        with torch.no_grad():
            with touching(look, writes):
                expected = scores(model(**batch))
            prune_channels(model, gone, stack=stack if several else None)
            found = scores(model(**batch))
        close = 1e-5 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(found, expected, atol=close, rtol=1e-5)


def _activations(model: Any, batch: dict[str, Any], layer: int) -> torch.Tensor:
    """What the down projection reads, `(tokens, channels)`, padding left out, by a hook."""
    taken: list[torch.Tensor] = []
    down = down_projection(view(model).layers[layer])
    handle = down.register_forward_pre_hook(lambda m, args: taken.append(args[0].detach()))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return taken[0][batch["attention_mask"].bool()].double()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_scores_are_what_the_residual_loses(name: str) -> None:
    model = FAMILIES[name]("eager").double()
    batch = inputs(model, padding="right")
    found = channel_scores(model, batch)
    centred = channel_scores(model, batch, how="mean")
    for layer in range(3):
        x = _activations(model, batch, layer)
        weight = features_first(down_projection(view(model).layers[layer])).detach()
        for c in (0, 5, 47):
            lost = x[:, c, None] * weight[None, :, c]  # (tokens, width)
            assert found[layer][c].item() == pytest.approx(lost.pow(2).sum(1).mean().sqrt().item())
            rest = lost - lost.mean(0)
            assert centred[layer][c].item() == pytest.approx(
                rest.pow(2).sum(1).mean().sqrt().item()
            )


def test_a_share_takes_the_lowest_and_its_mean_stays() -> None:
    whole, model = tiny.llama().double(), tiny.llama().double()
    batch = {"input_ids": tiny.ids(20, batch=2), "attention_mask": torch.ones(2, 20)}
    order = channel_scores(whole, batch, how="mean")[1].argsort()[:16].tolist()
    prune_channels(model, 1 / 3, inputs=batch, how="mean")
    (step,) = steps_of(model)
    assert isinstance(step, PruneChannels)
    assert dict(step.channels)[1] == tuple(sorted(order))
    weight = whole.model.layers[0].mlp.down_proj.weight.detach()
    gone = list(dict(step.channels)[0])
    mean = _activations(whole, batch, 0).mean(0)
    expected = weight[:, gone] @ mean[gone]
    torch.testing.assert_close(model.model.layers[0].mlp.down_proj.bias.detach(), expected)
    assert model.model.layers[0].mlp.up_proj.weight.shape == (32, 32)


def test_multiples_of_eight_stay() -> None:
    model = tiny.gpt2()
    prune_channels(model, 0.3, inputs={"input_ids": tiny.ids(12)}, multiple=8)
    kept = model.transformer.h[0].mlp.c_proj.nx
    assert kept == 88  # of 128, 89.6 were to stay
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (32, 88)


def test_shared_layers_keep_their_mean() -> None:
    model = FAMILIES["albert"]("eager")
    batch = inputs(model)
    prune_channels(model, {layer: [1, 2] for layer in range(3)}, how="mean", inputs=batch)
    assert view(model).layers[0].mlp_ends


@pytest.mark.parametrize(
    ("channels", "more", "error", "said"),
    [
        ({9: [0]}, {}, ValueError, "layers 0 to 1"),
        ({0: [48]}, {}, ValueError, "channels 0 to 47"),
        (0.5, {}, ValueError, "give inputs="),
        (1.0, {"inputs": {"input_ids": tiny.ids(4)}}, ValueError, "less than 1"),
        ({0: [1]}, {"how": "least"}, ValueError, "expected 'zero' or 'mean'"),
        ({0: [1]}, {"stack": "vision"}, ValueError, "has the stacks decoder"),
    ],
)
def test_errors_come_before_anything_is_changed(
    channels: Any, more: Any, error: type[Exception], said: str
) -> None:
    model = tiny.llama()
    before = {n: p.shape for n, p in model.named_parameters()}
    with pytest.raises(error, match=said):
        prune_channels(model, channels, **more)
    assert {n: p.shape for n, p in model.named_parameters()} == before


def test_experts_and_different_channels_of_one_module_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="GptOssMLP"):
        prune_channels(tiny.gpt_oss(), {0: [1]})
    with pytest.raises(ValueError, match="run the same feed-forward part"):
        prune_channels(FAMILIES["albert"](), {0: [1]})
