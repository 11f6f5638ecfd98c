"""Attentions that some sequences do without."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)

from headwise.compress import open_share, route_attention, router_parameters, steps_of
from headwise.compress.step import read_step, write_step
from headwise.compress.structure.layer_routers import routers_of
from headwise.models import Site, UnsupportedModelError, touching, view
from headwise.models.backbones import Decoder
from headwise.parts import Attention, Rotary
from tests.instruments import tiny

BATCH = 6


def ids(rows: int = BATCH, n: int = 10) -> Tensor:
    return torch.randint(1, 30, (rows, n), generator=torch.Generator().manual_seed(2))


def decoder() -> Decoder:
    torch.manual_seed(0)
    made = Decoder(
        tiny.VOCABULARY, 32, 3, lambda n: Attention(32, 4, position=Rotary(), causal=True)
    )
    for p in made.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.3)
    return made.eval()


MODELS: dict[str, Any] = {
    "llama": lambda: tiny.llama(num_hidden_layers=3),
    "gpt2": lambda: tiny.gpt2(),
    "ours": decoder,
}


def logits(model: Any, given: Tensor, **more: Any) -> Tensor:
    out = model(given, **more)
    return out if isinstance(out, Tensor) else out.logits


def undecided(model: Any) -> None:
    """Routers that open for some sequences of `ids()` and close for others."""
    with torch.no_grad():
        for number, router in enumerate(routers_of(model)):
            weight = torch.randn(router.linear.weight.shape, generator=torch.manual_seed(number))
            router.linear.weight.copy_(weight)
            router.linear.bias.zero_()
            logits(model, ids())
            assert router.soft is not None
            raw = torch.logit(router.soft)
            router.linear.bias.copy_(-raw.median() - 1e-3)
        logits(model, ids())


def opened(model: Any) -> list[Tensor]:
    return [router.soft.detach() > 0.5 for router in routers_of(model)]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_open_routers_change_nothing(name: str) -> None:
    model = MODELS[name]()
    before = logits(model, ids())
    route_attention(model)
    assert torch.equal(logits(model, ids()), before)
    assert float(open_share(model, hard=True)) == 1.0
    model.train()
    assert (logits(model.eval(), ids()) - before).abs().max() == 0


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_closed_rows_get_nothing_and_their_attention_does_not_run(name: str) -> None:
    plain, model = MODELS[name](), MODELS[name]()
    route_attention(model)
    undecided(model)
    gates = opened(model)
    assert any(0 < int(gate.sum()) < BATCH for gate in gates)
    ran: list[int] = []
    for attention in view(model).attentions:
        attention.module.register_forward_pre_hook(
            lambda m, args, kwargs: ran.append(len(args[0] if args else kwargs["hidden_states"])),
            with_kwargs=True,
        )
    got = logits(model, ids())
    silence = {
        Site("attention", layer): lambda out, gate=gate: out * gate[:, None, None]
        for layer, gate in enumerate(gates)
    }
    with touching(view(plain), silence):
        want = logits(plain, ids())
    if name == "gpt2":  # the bias of W_O is no part of a closed attention either: hook is after it
        assert got.shape == want.shape
    assert (got - want).abs().max() < 1e-4
    assert ran == [int(gate.sum()) for gate in gates if bool(gate.any())]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_decoding_goes_on_as_the_prompt_decided_and_caches_open_rows_only(name: str) -> None:
    model = MODELS[name]()
    route_attention(model)
    undecided(model)
    given = ids()
    cache = DynamicCache(config=model.config)
    first = model(given[:, :6], past_key_values=cache).logits
    gates = opened(model)
    steps = [first] + [
        model(given[:, i : i + 1], past_key_values=cache).logits for i in range(6, 10)
    ]
    plain = MODELS[name]()
    silence = {
        Site("attention", layer): lambda out, gate=gate: out * gate[:, None, None]
        for layer, gate in enumerate(gates)
    }
    with touching(view(plain), silence):
        want = plain(given, use_cache=False).logits
    assert (torch.cat(steps, 1) - want).abs().max() < 1e-4
    for layer, gate in zip(cache.layers, gates, strict=True):
        assert layer.get_seq_length() == 10
        assert (0 if layer.keys is None else len(layer.keys)) == int(gate.sum())


@torch.no_grad()
def test_our_states_and_beams() -> None:
    model = decoder()
    route_attention(model, [1, 2])
    undecided(model)
    given, states = ids(), model.empty_states()
    first = model(given[:, :6], states=states)
    gates = opened(model)
    index = torch.tensor([5, 0, 0, 3, 2, 1, 4])
    for state in states:
        state.select(index)
    after = model(given[index, 6:], states=states)
    plain = decoder()
    silence = {
        Site("attention", layer + 1): lambda out, gate=gate: out * gate[:, None, None]
        for layer, gate in enumerate(gates)
    }
    with touching(view(plain), silence):
        want = plain(given)
    assert (first - want[:, :6]).abs().max() < 1e-4
    assert (after - want[index, 6:]).abs().max() < 1e-4
    each = states[0].nbytes() // 7
    assert states[1].nbytes() == each * int(gates[0][index].sum())


@torch.no_grad()
def test_beam_search_of_transformers() -> None:
    model = MODELS["llama"]()
    route_attention(model)
    undecided(model)
    how = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    together = model.generate(ids(), **how)
    alone = [model.generate(ids()[row : row + 1], **how) for row in range(BATCH)]
    assert torch.equal(together, torch.cat(alone))


@torch.no_grad()
def test_padding_does_not_decide() -> None:
    model = MODELS["llama"]()
    route_attention(model)
    undecided(model)
    gates = opened(model)
    given = ids()
    padded = torch.cat([torch.zeros(BATCH, 3, dtype=torch.long), given], 1)
    mask = torch.cat([torch.zeros(BATCH, 3), torch.ones(BATCH, 10)], 1).long()
    at = (mask.cumsum(1) - 1).clamp_min(0)
    got = model(padded, attention_mask=mask, position_ids=at, use_cache=False).logits[:, 3:]
    assert all(torch.equal(a, b) for a, b in zip(opened(model), gates, strict=True))
    assert (got - model(given).logits).abs().max() < 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_routers_alone_are_trained_by_straight_through_gradients(name: str) -> None:
    model = MODELS[name]()
    route_attention(model)
    undecided(model)
    model.requires_grad_(False)
    for p in router_parameters(model):
        p.requires_grad_(True)
    hard = logits(model, ids())
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    out = logits(model, ids())
    assert (out - hard).abs().max() < 1e-4
    (out.square().mean() + open_share(model)).backward()
    grads = [p.grad for p in router_parameters(model)]
    assert all(g is not None and float(g.abs().sum()) > 0 for g in grads)
    copy.deepcopy(model)


@pytest.mark.parametrize("name", MODELS)
def test_the_step_is_done_again_without_data(name: str) -> None:
    model = MODELS[name]()
    route_attention(model, [1], threshold=0.4)
    (step,) = steps_of(model)
    with torch.device("meta"):
        empty = decoder() if name == "ours" else type(model)(model.config)
    read_step(write_step(step)).apply(empty)
    assert sorted(empty.state_dict()) == sorted(model.state_dict())
    assert routers_of(empty)[0].threshold == 0.4


@pytest.mark.parametrize("pattern", [["sliding_attention"] * 2, ["full", "sliding"]])
@torch.no_grad()
def test_sliding_windows_decode_as_one_pass_gives(pattern: list[str]) -> None:
    names = [p if p.endswith("attention") else f"{p}_attention" for p in pattern]
    config = Qwen2Config(
        **tiny.SIZE,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=names,
    )
    model = tiny._sharp(Qwen2ForCausalLM(config))
    route_attention(model)
    undecided(model)
    given = ids()
    cache = DynamicCache(config=model.config)
    first = model(given[:, :6], past_key_values=cache).logits
    gates = opened(model)
    assert any(0 < int(gate.sum()) < BATCH for gate in gates)
    steps = [first] + [
        model(given[:, i : i + 1], past_key_values=cache).logits for i in range(6, 10)
    ]
    plain = tiny._sharp(Qwen2ForCausalLM(config))
    silence = {
        Site("attention", layer): lambda out, gate=gate: out * gate[:, None, None]
        for layer, gate in enumerate(gates)
    }
    with touching(view(plain), silence):
        want = plain(given, use_cache=False).logits
    assert (torch.cat(steps, 1) - want).abs().max() < 1e-4
    for layer, gate, name in zip(cache.layers, gates, names, strict=True):
        assert layer.is_sliding == (name == "sliding_attention")
        assert layer.get_seq_length() == 10
        assert (0 if layer.keys is None else len(layer.keys)) == int(gate.sum())
        if layer.is_sliding and layer.keys is not None:
            assert layer.keys.shape[2] == 3


@torch.no_grad()
def test_an_encoder_of_images_that_is_called_by_place() -> None:
    model = tiny.vit()
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = model(x).logits
    route_attention(model)
    assert torch.equal(model(x).logits, before)


def test_other_stacks_and_attentions_of_their_own_making_are_refused_at_once() -> None:
    with pytest.raises(UnsupportedModelError, match="encoder, decoder: routers are for"):
        route_attention(tiny.bart())
    bloom = BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(UnsupportedModelError, match="computes its attention by itself"):
        route_attention(bloom)


def test_what_is_refused() -> None:
    model = MODELS["llama"]()
    with pytest.raises(ValueError, match="self-attention is in"):
        route_attention(model, [9])
    with pytest.raises(ValueError, match="has no routers"):
        open_share(model)
    route_attention(model, [1])
    with pytest.raises(ValueError, match="has a router already"):
        route_attention(model)
    with pytest.raises(RuntimeError, match="not asked"):
        open_share(model)
    with pytest.raises(UnsupportedModelError, match="DynamicCache only"):
        model(ids(1), past_key_values=StaticCache(config=model.config, max_cache_len=32))
