"""HeadCache beside DynamicCache, in models of every kind."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from headwise.compress import Adaptive, HeadCache, PerHead, Pyramid, Uniform
from headwise.compress.cache.policies.accumulated_mass import AccumulatedMass
from headwise.compress.cache.policies.observation_window import ObservationWindow
from headwise.models.errors import UnsupportedModelError
from tests.compress.cache.models import GREEDY, MODELS, SMALL, Direction, logits, padded
from tests.instruments import tiny

# -- nothing is evicted ----------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", [[20, 1, 1, 1, 3, 1], [7, 40, 1, 2], [1, 1, 1, 30], [3, 3]])
def test_a_budget_of_all_is_the_model(name: str, sizes: list[int]) -> None:
    model = MODELS[name]()
    ids = tiny.ids(sum(sizes), batch=2)
    expected = logits(model, DynamicCache(config=model.config), ids, sizes)
    with HeadCache(model, 1.0) as cache:
        got = logits(model, cache, ids, sizes)
        assert cache.get_seq_length() == sum(sizes)
    assert torch.allclose(got, expected, atol=4e-5)
    if name in ("llama", "gpt2"):  # the first chunk is the model's own kernel
        assert torch.equal(got[:, : sizes[0]], expected[:, : sizes[0]])


# -- what is evicted -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama eager", "gpt2", "gpt_oss"])
def test_layers_and_heads_of_unequal_length(name: str) -> None:
    """Trap 1: transformers builds one mask, from the first layer. Here lengths differ from head
    to head, under eager attention too."""
    model = MODELS[name]()
    heads = getattr(model.config, "num_key_value_heads", 4)
    ids = tiny.ids(60, batch=2)
    table = [[6 + 8 * layer + 12 * head for head in range(heads)] for layer in range(2)]
    with HeadCache(model, PerHead(table), Direction(), **SMALL) as cache:
        logits(model, cache, ids, [50] + [1] * 10)
        for layer in range(2):
            counts = [len(places) for places in cache.kept(layer)]
            rounded = [-(-n // 4) * 4 for n in table[layer]]
            assert all(r <= n <= r + 4 for n, r in zip(counts, rounded * 2, strict=True))
        assert cache.kept(0)[0] != cache.kept(1)[0]


def test_layers_may_differ_by_a_pyramid() -> None:
    model = tiny.llama(num_hidden_layers=5)
    with HeadCache(model, Pyramid(20, beta=4), Direction(), **SMALL) as cache:
        logits(model, cache, tiny.ids(80), [80])
        counts = [len(cache.kept(layer)[0]) for layer in range(5)]
    assert counts == [36, 28, 20, 12, 8]  # 35, 27.5, 20, 12.5, 5, and at least sinks and window


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3", "gpt_oss", "gemma2"])
@pytest.mark.parametrize("budget", [0.3, PerHead([[6, 20]] * 4), Adaptive(0.4)])
def test_several_tokens_are_as_one_by_one(name: str, budget: Any) -> None:
    model = MODELS[name]()
    if isinstance(budget, PerHead):
        heads = getattr(model.config, "num_key_value_heads", 4)
        budget = PerHead([[6, 20] * (heads // 2)] * model.config.num_hidden_layers)
    ids = tiny.ids(46)
    found = []
    for sizes in ([40, 3, 3], [40, 1, 1, 1, 1, 1, 1], [40, 2, 4]):
        with HeadCache(model, budget, Direction(), sinks=2, window=4, step=4, slack=50) as cache:
            found.append(logits(model, cache, ids, sizes))
    assert torch.allclose(found[0], found[1], atol=4e-5)
    assert torch.allclose(found[0], found[2], atol=4e-5)


def test_only_what_a_layer_can_see_is_kept_of_a_window() -> None:
    model = MODELS["gemma3"]()
    with HeadCache(model, 1.0, step=1, slack=1) as cache:
        logits(model, cache, tiny.ids(50), [40] + [1] * 10)
        assert cache.kept(0) == [list(range(42, 50))] * 2  # 8: the next token itself is the ninth
        assert cache.kept(1) == [list(range(50))] * 2


# -- generate --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}, {"num_return_sequences": 2,
                                                              "num_beams": 2}],
    ids=["greedy", "beams", "chunks", "returned"],
)  # fmt: skip
def test_generate_as_it_is(name: str, how: dict[str, Any]) -> None:
    model = MODELS[name]()
    ids, mask, _ = padded([12, 20, 17], left=True)
    given = {"attention_mask": mask, **GREEDY, **how}
    expected = model.generate(ids, **given)
    cache = HeadCache(model, 1.0, step=2, slack=2)
    assert torch.equal(model.generate(ids, past_key_values=cache, **given), expected)


def test_assisted_generation() -> None:
    model, assistant = MODELS["llama"](), tiny.llama(num_hidden_layers=1)
    ids = tiny.ids(20)
    expected = model.generate(ids, **GREEDY)
    cache = HeadCache(model, 1.0)
    got = model.generate(ids, past_key_values=cache, assistant_model=assistant, **GREEDY)
    assert torch.equal(got, expected)
    cache = HeadCache(model, 12, Direction(), **SMALL)  # and lets go of entries between its steps
    model.generate(ids, past_key_values=cache, assistant_model=assistant, **GREEDY)
    assert max(len(places) for places in cache.kept(0)) < 30


def test_a_prefix_is_used_again() -> None:
    model = MODELS["llama"]()
    prefix, ends = tiny.ids(30), [tiny.ids(6, seed=s) for s in (7, 8)]
    with HeadCache(model, 0.5, Direction(), **SMALL) as cache:
        logits(model, cache, prefix, [30])
        held = cache.nbytes()
        copies = [copy.deepcopy(cache) for _ in ends]
        kept = cache.kept(0)
        found = [logits(model, c, e, [2, 1, 1, 1, 1]) for c, e in zip(copies, ends, strict=True)]
        assert cache.kept(0) == kept
        assert cache.nbytes() == held
    for end, got in zip(ends, found, strict=True):
        with HeadCache(model, 0.5, Direction(), **SMALL) as cache:
            both = logits(model, cache, torch.cat([prefix, end], 1), [30, 2, 1, 1, 1, 1])
        assert torch.allclose(got, both[:, 30:], atol=1e-5)
    for c in copies:
        c.close()


# -- other sequences, steps taken back -------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [ObservationWindow(4), AccumulatedMass()], ids=["window", "mass"]
)
def test_sequences_change_places(policy: Any) -> None:
    model = MODELS["llama"]()
    ids, more = tiny.ids(30, batch=3), tiny.ids(6, seed=4, batch=3)
    order = torch.tensor([2, 0, 2])
    with HeadCache(model, PerHead([[6, 14]] * 2), policy, **SMALL) as cache:
        logits(model, cache, ids, [30])
        for rearrange in ("reorder_cache", "batch_select_indices"):
            copied = copy.deepcopy(cache)
            getattr(copied, rearrange)(order)
            got = logits(model, copied, more, [1] * 6)
            with HeadCache(model, PerHead([[6, 14]] * 2), policy, **SMALL) as other:
                both = logits(model, other, torch.cat([ids[order], more], 1), [30] + [1] * 6)
                assert copied.kept(0) == other.kept(0)
                assert copied.nbytes() == other.nbytes()
            assert torch.allclose(got, both[:, 30:], atol=1e-5)
            copied.close()
        cache.batch_repeat_interleave(2)
        assert cache.kept(0)[:2] == cache.kept(0)[2:4]
        assert cache.batch_size == 6


def test_crop() -> None:
    model = MODELS["llama"]()
    ids, other = tiny.ids(30), tiny.ids(3, seed=9)
    with HeadCache(model, 1.0, slack=5) as cache:
        before = logits(model, cache, ids, [20, 7, 3])
        cache.crop(-3)
        assert cache.get_seq_length() == 27
        again = logits(model, cache, ids[:, 27:], [1, 2])
        assert torch.allclose(before[:, 27:], again, atol=1e-5)
        cache.crop(0)
        cache.crop(-30)
        assert cache.get_seq_length() == 0
        assert cache.nbytes() == 0
    with HeadCache(model, 12, Direction(), **SMALL) as cache:
        logits(model, cache, ids, [20, 1, 1])
        held = cache.kept(0)
        with pytest.raises(RuntimeError, match="let go of entries when 20 of its 22"):
            cache.crop(-3)
        with pytest.raises(ValueError, match="0 or less"):
            cache.crop(3)
        assert cache.kept(0) == held
        cache.crop(-2)
        cache.activate_past_recording()
        logits(model, cache, other.repeat(1, 2), [6])
        assert max(len(places) for places in cache.kept(0)) == 18  # nothing went yet
        cache.crop(-6)
        assert cache.kept(0) == [[p for p in places if p < 20] for places in held]
        logits(model, cache, other.repeat(1, 2), [6])
        cache.crop(-1)
        assert max(len(places) for places in cache.kept(0)) == 12


# -- the model is left alone -----------------------------------------------------------------


def test_the_model_is_what_it_was() -> None:
    for name in ("llama", "llama eager", "mistral", "gpt_oss"):
        model = MODELS[name]()
        ids, mask, _ = padded([9, 14], left=True)
        said = model.config._attn_implementation
        with torch.no_grad():
            before = model(ids, attention_mask=mask).logits
            cache = HeadCache(model, 0.5, Direction(), **SMALL)
            second = HeadCache(model, 8, Direction(), **SMALL)
            logits(model, cache, ids, [10])
            between = model(ids, attention_mask=mask).logits
            logits(model, second, ids, [10])
            mixed = logits(model, cache, ids[:, 10:], [1, 1])
        assert torch.equal(before, between)  # to the bit, padding too
        dynamic = logits(model, DynamicCache(config=model.config), ids, [10, 2, 1])
        second.close()
        second.close()  # twice does no harm
        assert model.config._attn_implementation == "headwise"
        del cache
        gc.collect()
        assert model.config._attn_implementation == said
        assert torch.equal(
            logits(model, DynamicCache(config=model.config), ids, [10, 2, 1]), dynamic
        )
        with HeadCache(model, 0.5, Direction(), **SMALL) as alone:
            assert torch.equal(logits(model, alone, ids, [10, 1, 1])[:, 10:], mixed)


def test_a_closed_cache_is_refused() -> None:
    model = MODELS["llama"]()
    cache = HeadCache(model, 0.5)
    cache.close()
    with pytest.raises(RuntimeError, match="closed"):
        model(tiny.ids(5), past_key_values=cache)
    with HeadCache(model, 0.5) as cache, pytest.raises(UnsupportedModelError, match="another"):
        MODELS["gpt2"]()(tiny.ids(5), past_key_values=cache)


def test_what_cannot_be_served_is_refused() -> None:
    model = MODELS["llama"]()
    for bad in ({"budget": 1.5}, {"budget": 0}, {"window": 0}, {"step": 0}, {"slack": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            HeadCache(model, **bad)
    with pytest.raises(ValueError, match="2 layers of 2, the table 2 layers of 3"):
        HeadCache(model, torch.full((2, 3), 8))
    with pytest.raises(UnsupportedModelError, match="causal"):
        HeadCache(tiny.bert())
    with pytest.raises(UnsupportedModelError, match="no transformers model"):
        HeadCache(torch.nn.Linear(2, 2))
    assert model.config._attn_implementation == "sdpa"
    with HeadCache(model, 0.5) as cache:
        dense = torch.ones(1, 1, 5, 5, dtype=torch.bool)
        with pytest.raises(UnsupportedModelError, match="causal"):
            model(tiny.ids(5), past_key_values=cache, attention_mask=dense)
        logits(model, cache, tiny.ids(5), [5])
        with pytest.raises(ValueError, match="holds 1 sequences"):
            logits(model, cache, tiny.ids(5, batch=2), [5])


def test_an_encoder_decoder() -> None:
    model = tiny.bart()
    ids, start = tiny.ids(20), torch.tensor([[2]])
    given = {"decoder_input_ids": start, **GREEDY, "num_beams": 1, "min_new_tokens": 12}
    expected = model.generate(ids, **given)
    both = EncoderDecoderCache(HeadCache(model, 1.0), DynamicCache())
    assert torch.equal(model.generate(ids, past_key_values=both, **given), expected)
    with HeadCache(model, 1.0) as cache, pytest.raises(Exception, match="EncoderDecoderCache"):
        model(ids, decoder_input_ids=start, past_key_values=cache)


def test_it_says_what_it_holds() -> None:
    model = MODELS["gemma3"]()
    with HeadCache(model, Uniform(8), Direction(), **SMALL) as cache:
        assert cache.batch_size == -1
        assert "0 tokens seen" in cache.summary()
        logits(model, cache, tiny.ids(30), [30])
        assert "layer 1: 8 to 8 entries a row, mean 8, 1 blocks" in cache.summary()
        assert "window 9" in cache.summary()
        assert "30 tokens seen" in repr(cache)
        cache.reset()
        assert cache.nbytes() == 0
        assert cache.get_seq_length() == 0
        assert cache.kept(0) == []
