"""Layers that read another layer's cache, against the keys and values written in by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from headwise.compress.cache.shared_layers import SharedLayers, check_reads, find_sharing
from headwise.models import Site, touching, view
from tests.instruments import tiny

READS = (0, 0, 2, 2)


def model(**more: Any) -> Any:
    return tiny.llama(num_hidden_layers=4, **more)


def ids(batch: int = 2, n: int = 14) -> Tensor:
    return torch.randint(1, tiny.VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(3))


def by_hand(net: Any, given: Tensor, reads: tuple[int, ...]) -> Tensor:
    """Logits with the projections of the read layer in place of the reader's own."""
    seen: dict[tuple[str, int], Tensor] = {}

    def write(kind: str, layer: int) -> Any:
        def put(x: Tensor) -> Tensor | None:
            if reads[layer] == layer:
                seen[kind, layer] = x
                return None
            return seen[kind, reads[layer]]

        return put

    writes = {Site(kind, n): write(kind, n) for kind in ("keys", "values") for n in range(4)}
    with torch.no_grad(), touching(view(net), writes):
        logits: Tensor = net(given, use_cache=False).logits
    return logits


def shared(net: Any, reads: tuple[int, ...] = READS) -> SharedLayers:
    return SharedLayers(DynamicCache(config=net.config), reads)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("reads", [READS, (0, 1, 1, 1), (0, 0, 0, 0), (0, 1, 2, 3)])
def test_as_projections_written_in_by_hand(implementation: str, reads: tuple[int, ...]) -> None:
    net = model()
    net.set_attn_implementation(implementation)
    want = by_hand(net, ids(), reads)
    cache = shared(net, reads)
    pieces = [net(part, past_key_values=cache).logits for part in ids().split([9, 1, 4], 1)]
    assert torch.allclose(torch.cat(pieces, 1), want, atol=1e-4)


@torch.no_grad()
def test_everyone_for_himself_is_the_plain_cache_to_the_bit() -> None:
    net = model()
    plain = net(ids(), past_key_values=DynamicCache(config=net.config)).logits
    assert torch.equal(net(ids(), past_key_values=shared(net, (0, 1, 2, 3))).logits, plain)


@torch.no_grad()
def test_what_is_shared_takes_no_memory() -> None:
    net = model()
    whole, half = shared(net, (0, 1, 2, 3)), shared(net)
    for cache in (whole, half):
        net(ids(), past_key_values=cache)
    assert whole.nbytes() == 4 * 2 * 2 * 2 * 14 * 8 * 4
    assert 2 * half.nbytes() == whole.nbytes()
    assert not half._given  # what was handed round is not kept


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_and_padding(beams: int) -> None:
    net = model()
    given = ids(2, 8)
    mask = torch.ones_like(given)
    mask[0, :3] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    both = net.generate(
        given, attention_mask=mask, past_key_values=shared(net), eos_token_id=None, **settings
    )
    alone = net.generate(given[:1, 3:], past_key_values=shared(net), eos_token_id=None, **settings)
    assert torch.equal(both[0, 3:], alone[0])
    if beams == 1:
        want = by_hand(net, both[1:], READS)[0, 7:-1].argmax(-1)
        assert torch.equal(want, both[1, 8:])


@torch.no_grad()
def test_crop_and_sliding_windows() -> None:
    net = model()
    cache = shared(net)
    first = net(ids(), past_key_values=cache).logits
    cache.crop(-5)
    again = net(ids()[:, 9:], past_key_values=cache).logits
    assert torch.allclose(again, first[:, 9:], atol=1e-4)
    narrow = tiny.mistral(9)
    sliding = SharedLayers(DynamicCache(config=narrow.config), (0, 0))
    whole = narrow(ids(1, 20), past_key_values=sliding).logits
    fresh = SharedLayers(DynamicCache(config=narrow.config), (0, 0))
    parts = [narrow(part, past_key_values=fresh).logits for part in ids(1, 20).split(5, 1)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


def test_the_layer_that_can_go_is_found() -> None:
    net = model()
    with torch.no_grad():
        net.model.layers[2].self_attn.o_proj.weight.zero_()  # nobody hears what it reads
    found = find_sharing(net, ids(4, 24), keep=0.75)
    assert found.order == (2,)
    assert found.reads == (0, 1, 1, 3)
    assert abs(found.divergence[0]) < 1e-5
    assert found.kept == 0.75


def test_prices_are_those_of_the_model_and_add_up_in_order() -> None:
    net = model()
    given = ids(3, 16)
    found = find_sharing(net, given, keep=0.5, reach=3)
    assert found.kept == 0.5
    assert len(found.order) == 2
    before = by_hand(net, given, (0, 1, 2, 3)).double().log_softmax(-1)
    after = by_hand(net, given, found.reads).double().log_softmax(-1)
    want = float((before.exp() * (before - after)).sum(-1).mean())
    assert found.divergence[-1] == pytest.approx(want, rel=1e-3)
    assert find_sharing(net, given, keep=1.0).reads == (0, 1, 2, 3)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 1 is to read layer 2"):
        check_reads((0, 2, 2))
    with pytest.raises(ValueError, match="no cache of its own"):
        check_reads((0, 0, 1))
    with pytest.raises(ValueError, match=r"keep=0\.1"):
        find_sharing(model(), ids(), keep=0.1)
    with pytest.raises(ValueError, match="larger reach"):
        find_sharing(model(), ids(), keep=0.25)
    cache = SharedLayers(DynamicCache(), (0, 0))
    cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    with pytest.raises(ValueError, match="cannot read layer 0"):
        cache.update(torch.zeros(1, 4, 3, 8), torch.zeros(1, 4, 3, 8), 1)
