"""A model without some layers gives what the whole model gives when they pass on what they get."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MptConfig, MptForCausalLM

from headwise.compress import drop_layers, prune_channels, prune_heads
from headwise.models import Site, UnsupportedModelError, touching, view
from headwise.models.spots import down_projection
from tests.instruments import tiny
from tests.models.families import DECODERS, FAMILIES, inputs, scores

ONCE = [n for n in FAMILIES if not n.startswith("albert")]


@contextmanager
def _passing(model: Any, stack: str, layers: list[int]) -> Iterator[None]:
    """Layers that give what they are given."""
    handles = []
    for layer in view(model).layers:
        if layer.stack == stack and layer.index in layers:

            def give(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
                stream = args[0] if args else kwargs["hidden_states"]
                return (stream, *out[1:]) if isinstance(out, tuple) else stream

            handles.append(layer.module.register_forward_hook(give, with_kwargs=True))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("gone", [[0], [1], [0, 1]])
@pytest.mark.parametrize("parts", ["layer", "attention", "mlp"])
@pytest.mark.parametrize("name", ONCE)
def test_dropped_is_passed_over(name: str, parts: str, gone: list[int]) -> None:
    for stack in view(FAMILIES[name]()).stacks:
        model = FAMILIES[name]("eager")
        look = view(model)
        several = len(look.stacks) > 1
        count = sum(layer.stack == stack for layer in look.layers)
        if parts == "layer" and count <= len(gone):
            continue
        batch = inputs(model)
        sites = {Site("mlp" if parts == "mlp" else "attention", at, stack) for at in gone}
        if not several:
            sites = {Site(s.kind, s.layer) for s in sites}
        whole: Any = (
            _passing(model, stack, gone)
            if parts == "layer"
            else touching(look, dict.fromkeys(sites, torch.zeros_like))
        )
        before = sum(p.numel() for p in model.parameters())
        with torch.no_grad():
            with whole:
                expected = scores(model(**batch))
            drop_layers(model, gone, parts=parts, stack=stack if several else None)
            found = scores(model(**batch))
        close = 1e-5 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(found, expected, atol=close, rtol=1e-5)
        assert sum(p.numel() for p in model.parameters()) < before
        if parts == "layer":
            assert sum(layer.stack == stack for layer in view(model).layers) == count - len(gone)


@pytest.mark.parametrize("parts", ["layer", "attention"])
@pytest.mark.parametrize("name", [*DECODERS, "bart", "whisper"])
def test_caches_and_masks_fit_what_is_left(name: str, parts: str) -> None:
    model = FAMILIES[name]("eager")
    stack = "decoder" if len(view(model).stacks) > 1 else None
    drop_layers(model, [0], parts=parts, stack=stack)
    batch = inputs(model, padding=None if stack else "left")
    batch.pop("decoder_input_ids", None)
    more = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(**batch, **more)
    assert torch.equal(cached, model.generate(**batch, **more, use_cache=False))


@pytest.mark.parametrize("how", ["drop", "channels"])
@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_a_feed_forward_part_that_adds_the_residual_leaves_it(name: str, how: str) -> None:
    torch.manual_seed(0)
    model: Any = (
        BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4))
        if name == "bloom"
        else MptForCausalLM(MptConfig(vocab_size=60, d_model=32, n_layers=2, n_heads=4))
    )
    model.eval()
    ids = tiny.ids(9)
    twin = copy.deepcopy(model)
    down = down_projection(view(twin).layers[0])
    with torch.no_grad():
        down.weight.zero_()
        if how == "drop" and down.bias is not None:
            down.bias.zero_()
        if how == "drop":
            drop_layers(model, [0], parts="mlp")
        else:
            prune_channels(model, {0: range(128)})
        assert torch.allclose(model(ids).logits, twin(ids).logits, atol=1e-5)


def test_the_config_says_so() -> None:
    model = FAMILIES["gemma3"]()
    drop_layers(model, [1])
    config = model.config
    assert config.num_hidden_layers == 2
    assert config.layer_types == ["sliding_attention", "sliding_attention"]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    both = FAMILIES["t5"]()
    drop_layers(both, [0, 2], stack="decoder")
    assert (both.config.num_layers, both.config.num_decoder_layers) == (2, 1)
    assert both.decoder.config.num_hidden_layers == 1
    clip = FAMILIES["clip"]()
    drop_layers(clip, [0], stack="text")
    assert clip.config.text_config.num_hidden_layers == 2
    assert clip.config.vision_config.num_hidden_layers == 2


def test_t5_hands_its_table_on_also_after_heads_went() -> None:
    """The table of the first layer serves all others; they have lost different heads."""
    model = FAMILIES["t5"]("eager")
    batch = inputs(model)
    prune_heads(model, [(0, 1), (1, 0), (2, 3)], stack="decoder")
    with torch.no_grad():
        with _passing(model, "decoder", [0]):
            expected = scores(model(**batch))
        drop_layers(model, [0], stack="decoder")
        torch.testing.assert_close(scores(model(**batch)), expected, atol=1e-5, rtol=1e-4)
        prune_heads(model, [(0, h) for h in range(3)], stack="decoder")
        model(**batch)


@pytest.mark.parametrize(
    ("layers", "more", "said"),
    [
        ([2], {}, "layers 0 to 1"),
        ([0, 1], {}, "leave at least one"),
        ([0], {"parts": "norm"}, "expected one of layer, attention, mlp"),
        ([0], {"stack": "vision"}, "has the stacks decoder"),
    ],
)
def test_errors_come_before_anything_is_changed(layers: Any, more: Any, said: str) -> None:
    model = tiny.llama()
    before = sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match=said):
        drop_layers(model, layers, **more)
    assert sum(p.numel() for p in model.parameters()) == before
    assert model.config.num_hidden_layers == 2


def test_what_is_not_there_any_more_and_what_runs_twice_is_refused() -> None:
    model = tiny.llama()
    drop_layers(model, [0], parts="attention")
    with pytest.raises(ValueError, match="no self-attention"):
        drop_layers(model, [0], parts="attention")
    with pytest.raises(UnsupportedModelError, match="run 3 times"):
        drop_layers(FAMILIES["albert"](), [0])
