"""A head's circuits against what the model computes: scores and outputs of its first layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from headwise.instruments.qk_ov import ov, qk
from headwise.models import AttentionReading, Site, observe, recording, view
from headwise.models.backbones import Decoder
from headwise.parts import Alibi, Attention, GroupedQuery, Rotary
from headwise.parts.position.scaling import YaRN
from tests.instruments import tiny

SIZE: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
STRETCHED = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}


def decoder(**more: Any) -> Decoder:
    return Decoder(
        tiny.VOCABULARY, 32, 2, mixer=lambda layer: Attention(32, 4, causal=True, **more)
    )


MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=2)),
    "llama, stretched": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZE, num_key_value_heads=2, rope_parameters=STRETCHED)
    ),
    "gpt-neox, a quarter turns": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE)),
    "phi, half turns": lambda: PhiForCausalLM(PhiConfig(**SIZE)),
    "cohere, neighbours": lambda: CohereForCausalLM(CohereConfig(**SIZE, num_key_value_heads=2)),
    "gpt2": tiny.gpt2,
    "our own": decoder,
    "our own, neighbours": lambda: decoder(position=Rotary(interleaved=True, share=0.5)),
    "our own, stretched": lambda: decoder(
        position=Rotary(scaling=YaRN(4, original=16)), project=GroupedQuery(2)
    ),
}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = MODELS[request.param]()
    with torch.no_grad():
        for parameter in made.parameters():  # biases and gains that are far from 0 and 1
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter))
            else:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return made.eval().double()


def first_layer(model: nn.Module, ids: Tensor) -> tuple[AttentionReading, Tensor, Tensor, Tensor]:
    """What layer 0 saw: reading; the residual, divided by its size, float64 `(n, width)`; what the
    attention added `(n, width)`; its map `(heads, n, n)`."""
    look = view(model)
    seen: list[AttentionReading] = []
    maps: list[Tensor] = []

    def read(reading: AttentionReading) -> None:
        seen.append(reading)
        maps.append(reading.map.dense()[0])

    sites = (Site("residual", 0), Site("attention", 0))
    with torch.no_grad(), recording(look, sites) as kept, observe(look, read):
        model(ids)
    x, added = (kept[site][0] for site in sites)
    norm = look.attentions[0].norm
    if isinstance(norm, nn.LayerNorm) or "LayerNorm" in type(norm).__name__:
        eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", 0.0)
        size = (x.var(-1, correction=0) + eps).sqrt()
    else:
        eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", 0.0)
        size = (x.pow(2).mean(-1) + eps).sqrt()
    return seen[0], x / size[:, None], added, maps[0]


def scores(model: nn.Module, head: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """`(n,)` scores of the last query: those that the model computed, and from the circuits."""
    reading, x = first_layer(model, ids)[:2]
    module: Any = reading.attention.module
    turns = isinstance(getattr(module, "position", None), Rotary) if isinstance(
        module, Attention
    ) else not isinstance(model, GPT2LMHeadModel)  # fmt: skip
    group = head // (reading.attention.heads // reading.attention.kv_heads)
    real = reading.key[0, group] @ reading.query[0, head, -1]
    found = []
    for j in range(len(x)):
        circuit = qk(model, 0, head, offset=len(x) - 1 - j if turns else 0)
        assert (circuit.shape, circuit.rank) == ((32, 32), 8)
        found.append(x[-1] @ circuit.dense() @ x[j])
        if circuit.bias is not None:
            found[-1] += circuit.bias @ x[j]
    return real, torch.stack(found)


def test_scores_of_the_first_layer(model: nn.Module) -> None:
    """Where nothing is biased the scores are the circuit's; else up to what does not depend on the
    key, which two texts that end alike have in common."""
    attention = view(model).attentions[0]
    biases = (attention.query_bias(), attention.key_bias(), getattr(attention.norm, "bias", None))
    one, other = tiny.ids(6), tiny.ids(6, seed=5)
    other[:, -1] = one[:, -1]
    assert (one != other)[:, :-1].all()
    for head in range(attention.heads):
        (real, found), (real_2, found_2) = (scores(model, head, ids) for ids in (one, other))
        assert real.std() > 1e-2
        if all(bias is None for bias in biases):
            torch.testing.assert_close(found, real, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found - found_2, real - real_2, atol=1e-5, rtol=1e-5)


def test_what_the_first_layer_adds(model: nn.Module) -> None:
    _, x, added, weights = first_layer(model, tiny.ids(7))
    attention = view(model).attentions[0]
    total = torch.zeros_like(added)
    for head in range(attention.heads):
        circuit = ov(model, 0, head)
        written = weights[head].double() @ circuit.apply(x)
        total += written if circuit.bias is None else written + circuit.bias
    bias = attention.output_bias()
    total += 0.0 if bias is None else bias
    torch.testing.assert_close(total, added, atol=1e-5, rtol=1e-5)


def test_biases_and_what_is_left_out_are_told() -> None:
    model = tiny.gpt2()
    plain = qk(model, 1, 2)
    assert plain.bias is None  # tiny's biases are zero
    assert plain.left_out == ("LayerNorm divides query and key by its size, one number a token",)
    attention = view(model).attentions[1]
    with torch.no_grad():
        bias = attention.value_bias()
        assert bias is not None
        bias.add_(1.0)
    told = ov(model, 1, 2).bias
    assert told is not None
    expected = attention.output_weight()[2].double() @ torch.ones(8).double()
    torch.testing.assert_close(told, expected)
    assert "offset 3" in " ".join(qk(tiny.llama(), 0, 0, offset=3).left_out)
    assert "Alibi" in " ".join(qk(decoder(position=Alibi()), 0, 0).left_out)


def test_offsets_are_seen_in_what_turns_alone() -> None:
    llama = tiny.llama()
    here, there = qk(llama, 0, 1), qk(llama, 0, 1, offset=2)
    assert (here.dense() - there.dense()).abs().max() > 0.1
    torch.testing.assert_close(here.norm(), qk(llama, 0, 1, offset=0).norm())
    with pytest.raises(ValueError, match="same at every offset"):
        qk(tiny.gpt2(), 0, 0, offset=1)


def test_cross_attention_of_an_encoder_decoder() -> None:
    model = tiny.bart()
    circuit = ov(model, 1, 3, stack="decoder", attention="cross")
    weights: Any = model.model.decoder.layers[1].encoder_attn
    out, value = weights.out_proj.weight[:, 24:], weights.v_proj.weight[24:]
    torch.testing.assert_close(circuit.dense(), (out @ value).detach().double())


def test_what_is_not_there_is_refused() -> None:
    model = tiny.llama()
    with pytest.raises(ValueError, match="heads 0 to 3"):
        ov(model, 0, 4)
    with pytest.raises(ValueError, match=r"one of \[0, 1\]"):
        qk(model, 2, 0)
    with pytest.raises(ValueError, match="no cross-attention"):
        qk(model, 0, 0, attention="cross")
    with pytest.raises(ValueError, match="say stack="):
        ov(tiny.bart(), 0, 0)
