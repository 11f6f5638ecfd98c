"""Layers that share a map: with checkpointed activations, and beside an encoder."""

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
)

from headwise.compress import cost, drop_layers, share_attention
from tests.compress.structure.test_shared_maps import MODELS, SOURCES, ids
from tests.instruments import tiny
from tests.models.families import FAMILIES, inputs


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_with_checkpointed_layers(name: str) -> None:
    model = MODELS[name]()
    share_attention(model, SOURCES)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
            model.train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        model.zero_grad()
        model(ids(), use_cache=False).logits.square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) == len(list(model.parameters()))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_beside_an_encoder_the_default_cache_gives_what_none_gives(name: str) -> None:
    model = FAMILIES[name]()
    given = inputs(model)
    given = {k: v for k, v in given.items() if not k.startswith("decoder") and k != "use_cache"}
    share_attention(model, {1: 0})
    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": 7, "do_sample": False}
    cached = model.generate(**given, **settings)
    assert torch.equal(cached, model.generate(**given, **settings, use_cache=False))
    assert cached.shape[1] >= 7


def test_a_cache_by_another_name_holds_values_alone_too() -> None:
    torch.manual_seed(0)
    size = {"vocab_size": 60, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    model = tiny._sharp(GPTJForCausalLM(GPTJConfig(**size, rotary_dim=4)))
    share_attention(model, {1: 0})
    cache = DynamicCache()
    with torch.no_grad():
        whole = model(ids(), use_cache=False).logits
        steps = [model(ids()[:, n : n + 1], past_key_values=cache).logits for n in range(12)]
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-4)
    assert [layer.keys.shape[-1] for layer in cache.layers] == [8, 0, 8]
    held = sum(t.nbytes for one in cache.layers for t in (one.keys, one.values))
    assert cost(model).cache_bytes_per_token == held / (2 * 12)


def test_padding_is_right_where_the_first_attention_is_gone_and_layers_count_otherwise() -> None:
    config = GPTNeoConfig(
        vocab_size=60,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=64,
        attention_types=[[["global"], 2]],
    )
    model = tiny._sharp(GPTNeoForCausalLM(config))
    drop_layers(model, [0], parts="attention")
    cache = DynamicCache()
    with torch.no_grad():
        model(ids(), past_key_values=cache)
    assert cache.get_seq_length() == 12
    mask = torch.ones_like(ids())
    mask[0, :3] = 0
    model.generation_config.eos_token_id = None
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids(), **settings)
    assert torch.equal(cached, model.generate(ids(), **settings, use_cache=False))
