"""Layers that share a map: with checkpointed activations, and beside an encoder."""

import pytest
import torch
from torch import nn

from headwise.compress import share_attention
from tests.compress.structure.test_shared_maps import MODELS, SOURCES, ids
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
