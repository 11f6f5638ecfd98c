"""Layers that use an earlier layer's queries and keys."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache

from headwise.compress import compensate, cost
from headwise.compress.step import read_step, steps_of, write_step
from headwise.compress.structure.shared_maps import (
    map_similarity,
    share_attention,
    similar_block,
)
from headwise.models import Site, observe, touching, view
from headwise.models.backbones import Decoder
from headwise.models.prefix import Prefix
from headwise.parts import Attention, GroupedQuery, Rotary
from tests.instruments import tiny


def qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return tiny._sharp(
        Qwen3ForCausalLM(
            Qwen3Config(
                **{**tiny.SIZE, "num_hidden_layers": 4, "head_dim": 8}, num_key_value_heads=2
            )
        )
    )


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return tiny._sharp(
        GPT2LMHeadModel(
            GPT2Config(vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=64)
        )
    )


MODELS = {
    "llama": lambda: tiny.llama(num_hidden_layers=4),
    "biased": lambda: tiny.llama(num_hidden_layers=4, attention_bias=True),
    "qwen3": qwen3,
    "gpt2": gpt2,
}
SOURCES = {2: 1, 3: 1}


def ids(rows: int = 2, n: int = 12) -> Tensor:
    return torch.randint(1, tiny.VOCABULARY, (rows, n), generator=torch.Generator().manual_seed(3))


def by_hand(model: Any, given: Tensor, sources: dict[int, int]) -> Tensor:
    """The model's own eager code, made to use the probabilities of the source layer."""
    look, maps = view(model), {}
    layer = {id(a.module): a.layer for a in look.attentions}
    from transformers import AttentionInterface

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **more: Any) -> Any:
        here = layer[id(module)]
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = (q @ k.mT).double() * more["scaling"]
        past = torch.ones(q.shape[2], k.shape[2]).tril().bool()
        maps[here] = scores.masked_fill(~past, -torch.inf).softmax(-1).to(v.dtype)
        return (maps[sources.get(here, here)] @ v).transpose(1, 2).contiguous(), None

    AttentionInterface.register("by_hand", attend)
    before = model.config._attn_implementation
    model.set_attn_implementation("by_hand")
    out = model(given, use_cache=False).logits
    model.set_attn_implementation(before)
    return out


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_shared_layers_attend_by_the_sources_map(name: str) -> None:
    model = MODELS[name]()
    want = by_hand(model, ids(), SOURCES)
    plain = model(ids()).logits
    share_attention(model, SOURCES)
    got = model(ids(), use_cache=False).logits
    assert (got - want).abs().max() < 1e-4
    assert (got - plain).abs().max() > 1e-2
    seen: dict[int, Tensor] = {}
    with observe(view(model), lambda r: seen.update({r.attention.layer: r.map.entropy()})):
        model(ids(), use_cache=False)
    assert torch.equal(seen[1], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_decoding_with_a_cache_gives_what_one_pass_gives_and_caches_no_keys(name: str) -> None:
    model, given = MODELS[name](), ids()
    share_attention(model, SOURCES)
    cache = DynamicCache(config=model.config)
    steps = [model(given[:, :5], past_key_values=cache).logits]
    steps += [model(given[:, i : i + 1], past_key_values=cache).logits for i in range(5, 12)]
    assert (torch.cat(steps, 1) - model(given, use_cache=False).logits).abs().max() < 1e-4
    sizes = [layer.keys.numel() for layer in cache.layers]
    assert sizes[2] == sizes[3] == 0
    assert sizes[0] == sizes[1] > 0
    assert all(layer.get_seq_length() == 12 for layer in cache.layers)


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_generate_with_and_without_a_cache(name: str, more: dict[str, Any]) -> None:
    model = MODELS[name]()
    share_attention(model, SOURCES)
    given, how = ids(2, 5), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    if "cache_implementation" in more:
        cache = StaticCache(config=model.config, max_cache_len=16)
        out = model.generate(given, **how, past_key_values=cache)
    else:
        out = model.generate(given, **how, **more)
    plain = {key: value for key, value in more.items() if key == "num_beams"}
    assert torch.equal(out, model.generate(given, **how, **plain, use_cache=False))


def test_padding_at_the_left_changes_nothing() -> None:
    model = MODELS["llama"]()
    share_attention(model, SOURCES)
    given = ids(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), given], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    a, b = model.generate(given, **how), model.generate(padded, attention_mask=mask, **how)
    assert torch.equal(a[:, 6:], b[:, 9:])


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_gone_and_gradients_reach_the_source(name: str) -> None:
    model = MODELS[name]()
    look = view(model)
    before = sum(p.numel() for p in model.parameters())
    per_layer = look.attentions[2].query_weight().numel() + look.attentions[2].key_weight().numel()
    for bias in (look.attentions[2].query_bias(), look.attentions[2].key_bias()):
        per_layer += 0 if bias is None else bias.numel()
    if name == "qwen3":
        per_layer += 2 * 8
    share_attention(model, SOURCES)
    assert before - sum(p.numel() for p in model.parameters()) == 2 * per_layer
    model(ids(), use_cache=False).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_step_is_done_again_on_a_model_without_data_and_copies_are_their_own(name: str) -> None:
    model = MODELS[name]()
    share_attention(model, SOURCES)
    (step,) = steps_of(model)
    with torch.device("meta"):
        empty = type(model)(model.config)
    read_step(write_step(step)).apply(empty)
    empty.load_state_dict(model.state_dict(), assign=True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert not torch.equal(model(ids()).logits, twin(ids()).logits)
    share = MODELS[name]()
    share_attention(share, SOURCES)
    assert torch.equal(twin(ids()).logits, share(ids()).logits)
    assert sorted(empty.state_dict()) == sorted(model.state_dict())


def decoder(**more: Any) -> Decoder:
    torch.manual_seed(0)
    made = Decoder(
        30,
        32,
        4,
        lambda layer: Attention(32, 4, GroupedQuery(2), position=Rotary(), causal=True, **more),
    )
    for p in made.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.3)
    return made.eval()


@torch.no_grad()
def test_our_own_backbones() -> None:
    model = decoder()
    given = torch.randint(30, (2, 12))
    before = sum(p.numel() for p in model.parameters())
    plain = model(given)
    share_attention(model, SOURCES)
    assert before - sum(p.numel() for p in model.parameters()) == 2 * (32 * 32 + 32 * 16)
    out = model(given)
    assert (out - plain).abs().max() > 1e-2
    maps: list[Tensor] = []
    with observe(view(model), lambda r: maps.append(r.map.entropy())):
        model(given)
    assert torch.equal(maps[1], maps[2])
    assert torch.equal(maps[1], maps[3])
    states = model.empty_states()
    steps = [model(given[:, :4], states=states)]
    steps += [model(given[:, i : i + 1], states=states) for i in range(4, 12)]
    assert (torch.cat(steps, 1) - out).abs().max() < 1e-4
    assert states[2].nbytes() * 2 == states[1].nbytes()
    attention = model.stack.mixers[2]
    assert attention.state_bytes(12) * 2 == states[2].nbytes()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(given), out)


@torch.no_grad()
def test_similarity_equals_that_of_the_dense_maps() -> None:
    model = MODELS["llama"]()
    model.set_attn_implementation("eager")
    maps = model(ids(), output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("sdpa")
    got = map_similarity(model, ids())
    for a in range(4):
        for b in range(4):
            want = nn.functional.cosine_similarity(maps[a], maps[b], -1)[:, :, 1:].mean()
            assert got[a, b] == pytest.approx(float(want), abs=1e-4)


def test_the_most_similar_block() -> None:
    alike = torch.full((6, 6), 0.1)
    alike[2:5, 2:5] = 0.9
    assert similar_block(alike, 3) == {3: 2, 4: 2}
    with pytest.raises(ValueError, match="does not fit"):
        similar_block(alike, 5)


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ({}, "is empty"),
        ({9: 1}, "no layer 9"),
        ({1: 2}, "runs after"),
        ({1: 1}, "runs after"),
        ({3: 2, 2: 1}, "no map of its own"),
    ],
)
def test_what_cannot_be_shared_is_refused_and_nothing_changed(
    sources: dict[int, int], words: str
) -> None:
    model = MODELS["llama"]()
    before = model(ids()).logits
    with pytest.raises(ValueError, match=words):
        share_attention(model, sources)
    assert torch.equal(model(ids()).logits, before)
    assert steps_of(model) == ()


def test_sharing_twice_and_from_a_layer_that_shares_is_refused() -> None:
    model = MODELS["llama"]()
    share_attention(model, {2: 1})
    with pytest.raises(ValueError, match="shares a map already"):
        share_attention(model, {2: 0})
    with pytest.raises(ValueError, match="no map of its own"):
        share_attention(model, {3: 2})
    share_attention(model, {3: 1})
    model.generate(ids(1, 4), max_new_tokens=2, pad_token_id=0)


def test_another_cache_is_refused() -> None:
    from transformers.cache_utils import Cache, DynamicLayer

    model = MODELS["llama"]()
    share_attention(model, SOURCES)
    from headwise.models.errors import UnsupportedModelError

    with pytest.raises(UnsupportedModelError, match="caches values only"):
        model(ids(), past_key_values=Cache(layer_class_to_replicate=DynamicLayer))


@pytest.mark.parametrize("name", MODELS)
def test_what_it_costs_is_counted(name: str) -> None:
    model = MODELS[name]()
    attention = view(model).attentions[2]
    gone = attention.query_weight().numel() + attention.key_weight().numel()
    keys = attention.kv_heads * attention.head_dim
    before = cost(model, tokens=16)
    share_attention(model, SOURCES)
    after = cost(model, tokens=16)
    assert before.flops - after.flops == 2 * 16 * 2 * gone
    assert before.cache_bytes_per_token - after.cache_bytes_per_token == 2 * 4 * keys
    with FlopCounterMode(display=False) as counted:
        model.set_attn_implementation("eager")
        model(ids(1, 16), use_cache=False)
    assert counted.get_total_flops() == after.flops


@pytest.mark.parametrize("name", MODELS)
def test_runs_that_start_late_would_find_nothing_to_recall(name: str) -> None:
    """Layer 2 takes its map from layer 1, so that no run can start between them."""
    model = MODELS[name]()
    share_attention(model, {2: 1})
    writes = {Site("heads", 2): lambda value: value * 0}
    prefix = Prefix(view(model), {"input_ids": ids()})
    assert not prefix.reuses
    with touching(view(model), writes), torch.no_grad():
        whole = model(ids()).logits
    with torch.no_grad():
        assert torch.equal(prefix.run(writes), whole)


def test_what_sharing_did_can_be_made_up_for() -> None:
    model = MODELS["llama"]()
    original = copy.deepcopy(model)
    share_attention(model, {2: 1})
    found = compensate(model, original, ids(6, 20))
    assert found.after < 0.5 * found.before
