"""Our own attentions with fewer heads, and our own stacks with fewer layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.compress import drop_layers, prune_channels, prune_heads
from headwise.edits import Silence, swap
from headwise.models import Site, UnsupportedModelError, touching, view
from headwise.models.backbones import Decoder, EncoderDecoder
from headwise.parts import Attention, GroupedQuery, LearnedSink, SoftmaxOffByOne
from headwise.parts.feed.gated import Gated
from headwise.parts.mix.talking import TalkingHeads
from headwise.parts.output.gate import HeadGate
from headwise.parts.position.alibi import Alibi
from headwise.parts.position.buckets import RelativeBuckets
from headwise.parts.position.rotary import Rotary
from headwise.parts.position.shaw import Shaw
from headwise.parts.wiring.post import PostNorm

PARTS: dict[str, Any] = {
    "plain": dict,
    "grouped": lambda: {"project": GroupedQuery(2, bias=True), "position": Rotary()},
    "sink": lambda: {"normalize": LearnedSink(), "position": Rotary()},
    "off_by_one": lambda: {"normalize": SoftmaxOffByOne(), "position": Alibi()},
    "buckets": lambda: {"position": RelativeBuckets(8, 12), "output": HeadGate()},
    "shaw": lambda: {"position": Shaw(4), "project": GroupedQuery(1)},
}


def decoder(name: str, depth: int = 3, **more: Any) -> Decoder:
    torch.manual_seed(0)

    def mixer(layer: int) -> Attention:
        return Attention(24, 4, causal=True, **PARTS[name]())

    model = Decoder(30, 24, depth, mixer=mixer, **more)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


def _ids() -> torch.Tensor:
    return torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(1))


@settings(max_examples=8)
@given(heads=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=11, unique=True))
@pytest.mark.parametrize("name", PARTS)
def test_pruned_is_silenced_also_in_decoding(name: str, heads: list[tuple[int, int]]) -> None:
    model = decoder(name)

    def silence(layer: int) -> Any:
        gone = [h for at, h in heads if at == layer]
        return lambda there: there.index_fill(2, torch.tensor(gone, dtype=torch.long), 0.0)

    with torch.no_grad():
        with touching(view(model), {Site("heads", at): silence(at) for at in range(3)}):
            expected = model(_ids())
        prune_heads(model, heads)
        found = model(_ids())
        states = model.empty_states()
        steps = [model(_ids()[:, i : i + 1], states=states) for i in range(9)]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-5, rtol=1e-4)


def test_the_cache_shrinks_with_the_heads() -> None:
    model = decoder("grouped")
    look = view(model)
    before: Any = look.attentions[0].module
    assert before.state_bytes(10) == 10 * 4 * 2 * 2 * 6
    prune_heads(model, [(0, 1), (1, 0), (1, 1)])
    unequal, halved = (a.module for a in view(model).attentions[:2])
    states = model.empty_states()
    with torch.no_grad():
        model(_ids()[:1], states=states)
    for module, state, heads in ((unequal, states[0], 2), (halved, states[1], 1)):
        assert module.state_bytes(9) == state.nbytes() == 9 * 4 * 2 * heads * 6
    assert view(model).attentions[0].key_weight().shape == (3, 6, 24)


def test_cross_attention_of_our_own() -> None:
    torch.manual_seed(0)
    model = EncoderDecoder(
        20,
        24,
        2,
        mixer=lambda layer: Attention(24, 4),
        writer=lambda layer: Attention(24, 4, causal=True),
        cross=lambda layer: Attention(24, 4, context_dim=24),
    ).eval()
    source, target = torch.randint(0, 20, (2, 7)), torch.randint(0, 20, (2, 5))
    rows = [("decoder", "cross", 0, 1), ("decoder", "cross", 1, 0), ("encoder", "self", 1, 2)]
    rows += [("decoder", "cross", 1, h) for h in (1, 2, 3)]
    with torch.no_grad():
        with swap(model, {row: Silence() for row in rows}):
            expected = model(source, target)
        prune_heads(model, rows)
        torch.testing.assert_close(model(source, target), expected, atol=1e-5, rtol=1e-4)


def test_channels_and_layers_of_our_own() -> None:
    model = decoder("plain", feed=lambda layer: Gated(24, 40) if layer else None)
    gone = {1: [0, 3, 39], 2: list(range(40))}
    look = view(model)

    def without(channels: list[int]) -> Any:
        def write(there: torch.Tensor) -> torch.Tensor:
            return there.index_fill(-1, torch.tensor(channels), 0.0)

        return write

    with torch.no_grad():
        with touching(look, {Site("neurons", at): without(c) for at, c in gone.items()}):
            expected = model(_ids())
        prune_channels(model, gone)
        torch.testing.assert_close(model(_ids()), expected, atol=1e-5, rtol=1e-4)
    whole = decoder("plain")
    short = copy.deepcopy(whole)
    drop_layers(short, [0])
    with torch.no_grad():
        stream = whole.embed(_ids())
        for at in (1, 2):  # the blocks by hand
            norms: Any = whole.stack.wiring.norms
            stream = stream + whole.stack.mixers[at](norms["mix"][at](stream))
            stream = stream + whole.stack.feeds[at](norms["feed"][at](stream))
        expected = whole.answer(whole.stack.wiring.end(stream))
        torch.testing.assert_close(short(_ids()), expected)
        assert torch.equal(short.generate(_ids(), 4), short.generate(_ids(), 4))
    assert short.stack.depth == 2
    assert len(short.empty_states()) == 2


@pytest.mark.parametrize("parts", ["attention", "mlp"])
def test_a_part_of_a_layer_of_our_own(parts: str) -> None:
    whole = decoder("plain")
    short = copy.deepcopy(whole)
    drop_layers(short, [1], parts=parts)
    with torch.no_grad():
        with touching(view(whole), {Site(parts, 1): torch.zeros_like}):
            expected = whole(_ids())
        torch.testing.assert_close(short(_ids()), expected)


def test_what_heads_share_is_refused() -> None:
    PARTS["talking"] = lambda: {"mix": TalkingHeads()}
    try:
        model = decoder("talking")
    finally:
        del PARTS["talking"]
    with pytest.raises(UnsupportedModelError, match="TalkingHeads"):
        prune_heads(model, [(0, 0)])
    with pytest.raises(UnsupportedModelError, match="PostNorm belong together"):
        drop_layers(decoder("plain", wiring=PostNorm()), [0])
