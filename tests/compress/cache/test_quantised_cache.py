"""HeadCache with few bits, in a model: against the same entries in transformers' own cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from headwise.compress import HeadCache, LayerBits, SinksAndWindow
from headwise.compress.cache.quantised import Coding, Quantised
from headwise.compress.cache.store import Plain
from tests.instruments import tiny

SMALL = {"group": 8, "residual": 8}


def ids(batch: int = 2, n: int = 60) -> Tensor:
    return torch.randint(1, tiny.VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(3))


def stores(cache: Any, layer: int) -> list[Any]:
    return [block.store for block in cache.layers[layer].held.blocks]


def same_entries(net: Any, cache: Any) -> DynamicCache:
    """transformers' cache with the numbers that the stores of a whole cache stand for."""
    made = DynamicCache(config=net.config)
    for layer in range(2):
        (store,) = stores(cache, layer)
        keys, values = (t.unflatten(0, (-1, net.config.num_key_value_heads)) for t in store.whole())
        made.update(keys.clone(), values.clone(), layer)
    return made


CODINGS = [
    Coding(4, 2, **SMALL),
    Coding(2, 4, **SMALL, outliers=2),
    Coding(3, 8, **SMALL, rotated=True),
    Coding(8, 8, **SMALL, keys="token"),
]


@torch.no_grad()
@pytest.mark.parametrize("coding", CODINGS)
def test_attention_is_to_what_the_store_stands_for(coding: Coding) -> None:
    net = tiny.llama()
    with HeadCache(net, bits=coding) as cache:
        net(ids()[:, :48], past_key_values=cache)
        assert all(store.coded == 40 for store in stores(cache, 0) + stores(cache, 1))
        for at in range(48, 58):
            part = ids()[:, at : at + 1]
            want = net(part, past_key_values=same_entries(net, cache)).logits
            got = net(part, past_key_values=cache).logits
            assert torch.allclose(got, want, atol=2e-4)
        assert all(store.coded == 48 for store in stores(cache, 0))  # 58 - 8, in whole groups


@torch.no_grad()
def test_fewer_bits_are_further_off_and_take_fewer_bytes() -> None:
    net = tiny.llama(hidden_size=128, num_hidden_layers=2)
    given = ids(1, 400)
    exact = net(given, use_cache=False).logits[:, -40:]
    errors, sizes = [], []
    for bits in (None, 8, 4, 2):
        with HeadCache(net, bits=bits) as cache:
            net(given[:, :360], past_key_values=cache)
            steps = [net(p, past_key_values=cache).logits for p in given[:, 360:].split(1, 1)]
            errors.append(float((torch.cat(steps, 1) - exact).norm() / exact.norm()))
            sizes.append(cache.nbytes())
    assert errors[0] < 1e-5
    assert errors[0] < errors[1] < errors[2] < errors[3]
    assert errors[1] < 0.05
    assert sizes[0] > 1.8 * sizes[1] > 1.8 * 1.2 * sizes[2] > 1.8 * 1.2 * 1.1 * sizes[3]


@torch.no_grad()
def test_the_same_tokens_are_kept_and_their_codes_stay() -> None:
    net = tiny.llama()
    rules: dict[str, Any] = {
        "budget": 24, "policy": SinksAndWindow(), "sinks": 3, "window": 12, "step": 4, "slack": 4,
    }  # fmt: skip
    with HeadCache(net, **rules) as plain, HeadCache(net, **rules, bits=Coding(4, 4, **SMALL)) as c:
        for part in ids().split([30, *[1] * 30], 1):
            net(part, past_key_values=plain)
            before = {
                (layer, place): store.whole()[1][0, at].clone()
                for layer in range(2)
                for store in stores(c, layer)
                for at, place in enumerate(c.kept(layer)[0][: store.coded])
            }
            net(part, past_key_values=c)
            for layer in range(2):
                assert plain.kept(layer) == c.kept(layer)
                (store,) = stores(c, layer)
                for at, place in enumerate(c.kept(layer)[0][: store.coded]):
                    if (layer, place) in before:
                        assert torch.equal(store.whole()[1][0, at], before[layer, place])
        assert isinstance(stores(c, 0)[0], Quantised)
        assert stores(c, 0)[0].coded >= 8


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_eight_bits_is_that_of_all(beams: int) -> None:
    net = tiny.llama()
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    settings = {
        "max_new_tokens": 20, "do_sample": False, "num_beams": beams, "pad_token_id": 0,
        "eos_token_id": None, "attention_mask": mask,
    }  # fmt: skip
    plain = net.generate(ids(2, 40), **settings)
    with HeadCache(net, bits=Coding(2, 2, residual=64)) as cache:  # nothing is old enough
        assert torch.equal(net.generate(ids(2, 40), past_key_values=cache, **settings), plain)
    with HeadCache(net, bits=Coding(8, 8, **SMALL, rotated=True)) as cache:
        got = net.generate(ids(2, 40), past_key_values=cache, **settings)
    # a close call may fall the other way, but what is chosen is as likely
    whole = torch.cat([mask, torch.ones(2, 20, dtype=torch.long)], 1)
    chances = [
        net(x, attention_mask=whole).logits[:, 39:-1].log_softmax(-1).gather(2, x[:, 40:, None])
        for x in (got, plain)
    ]
    assert (chances[0].sum(1) > chances[1].sum(1) - 0.5).all()


@torch.no_grad()
def test_layers_as_they_are_told() -> None:
    net = tiny.llama()
    for bits in (LayerBits(((8, 4), (2, 2))), [(8, 4), 2], [Coding(8, 4), None]):
        with HeadCache(net, bits=bits) as cache:
            net(ids(1, 80), past_key_values=cache)
            first, second = stores(cache, 0)[0], stores(cache, 1)[0]
            assert (first.coding.key_bits, first.coding.value_bits) == (8, 4)
            assert first.coded == 32
            if isinstance(bits, list) and bits[1] is None:
                assert isinstance(second, Plain)
            else:
                assert second.coding == Coding(2, 2)
    with pytest.raises(ValueError, match="bits of 3 layers"):
        HeadCache(net, bits=[4, 4, 4])


@torch.no_grad()
def test_a_copy_goes_its_own_way() -> None:
    net = tiny.llama()
    with HeadCache(net, bits=Coding(4, 4, **SMALL)) as cache:
        net(ids()[:, :40], past_key_values=cache)
        with copy.deepcopy(cache) as other:
            for at in range(12):
                net(ids()[:, at : at + 1], past_key_values=other)
            want = net(ids()[:, 40:50], past_key_values=copy.deepcopy(cache)).logits
            assert torch.equal(net(ids()[:, 40:50], past_key_values=cache).logits, want)
