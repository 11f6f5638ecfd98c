"""Heads and neurons in words, against tables of the vocabulary multiplied out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headwise.instruments.head_vocabulary import (
    attended,
    neurons_say,
    token_logits,
    written,
    written_by_all,
)
from headwise.instruments.qk_ov import ov, qk
from headwise.models import UnsupportedModelError, view
from headwise.models.backbones import Decoder
from headwise.parts import Attention
from tests.instruments import tiny


def llama() -> Any:
    model = tiny.llama(tie_word_embeddings=False)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model


def read_alone(model: Any) -> Tensor:
    table = model.model.embed_tokens.weight.detach().double()
    return table / table.pow(2).mean(1, keepdim=True).sqrt()


def test_directions_are_those_of_the_whole_matrix() -> None:
    model = llama()
    tokens = read_alone(model)
    final = model.model.norm.weight.detach().double()
    out = model.lm_head.weight.detach().double()
    u, s, vh = torch.linalg.svd(ov(model, 1, 2).dense())
    found = written(model, 1, 2, tiny.Words(), directions=8, top=5)
    assert len(found) == 8
    for i, direction in enumerate(found):
        assert direction.strength == pytest.approx(float(s[i]))
        assert direction.share == pytest.approx(float(s[i] ** 2 / (s**2).sum()))
        wrote = out @ (final * u[:, i]) * s[i]
        wrote -= wrote.mean()
        read = tokens @ vh[i]
        if wrote.max() < -wrote.min():
            wrote, read = -wrote, -read
        for words, row in (
            (direction.writes, wrote),
            (direction.reads, read),
            (direction.writes_other, -wrote),
            (direction.reads_other, -read),
        ):
            assert words.ids == tuple(row.argsort(descending=True)[:5].tolist())
            assert words.logits == pytest.approx(row.sort(descending=True).values[:5].tolist())
            assert words.texts == tuple(tiny.Words.letters[i] for i in words.ids)


def test_queries_and_keys_are_those_of_the_whole_matrix() -> None:
    model = llama()
    tokens = read_alone(model)
    for offset in (0, 2):
        u, s, vh = torch.linalg.svd(qk(model, 0, 1, offset=offset).dense())
        (first, *_) = attended(model, 0, 1, directions=2, top=3, offset=offset)
        asked, keys = tokens @ u[:, 0], tokens @ vh[0] * s[0]
        sides = {
            (tuple((sign * asked).topk(3).indices.tolist()),
             tuple((sign * keys).topk(3).indices.tolist())) for sign in (1, -1)
        }  # fmt: skip
        assert {
            (first.reads.ids, first.writes.ids),
            (first.reads_other.ids, first.writes_other.ids),
        } == sides
        assert first.writes.texts == tuple(map(str, first.writes.ids))  # no tokenizer


def test_a_planted_head_says_what_it_writes() -> None:
    """A head that turns token 7 into token 9, in a model of orthogonal embeddings."""
    model = Decoder(
        12, 16, 2, mixer=lambda layer: Attention(16, 2, causal=True), norm=nn.Identity, tied=False
    )
    look = view(model)
    eye = torch.eye(16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.01)
        look.embedding.copy_(eye[:12])  # type: ignore[union-attr]
        look.unembedding.copy_(eye[:12])  # type: ignore[union-attr]
        look.attentions[1].value_weight()[1, 0] = eye[7]
        look.attentions[1].output_weight()[1, :, 0] = eye[9]
    (first,) = written(model, 1, 1, directions=1, top=1)
    assert (first.reads.ids, first.writes.ids) == ((7,), (9,))
    assert first.share > 0.95
    assert first.writes.logits[0] == pytest.approx(1, abs=0.1)
    table = written_by_all(model, top=1)
    assert list(table) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert table[1, 1] == first
    assert table[0, 1] == written(model, 0, 1, directions=1, top=1)[0]


def test_neurons_against_the_last_projection() -> None:
    for model, columns in (
        (llama(), lambda m: m.model.layers[1].mlp.down_proj.weight),
        (tiny.gpt2(), lambda m: m.transformer.h[1].mlp.c_proj.weight.T),
    ):
        weight = columns(model).detach().double()
        look = view(model)
        gain = look.final_norm.weight.detach().double()  # type: ignore[union-attr]
        centre = isinstance(look.final_norm, nn.LayerNorm)
        found = neurons_say(model, 1, (3, 0), top=4)
        for neuron, (promoted, suppressed) in zip((3, 0), found, strict=True):
            vector = weight[:, neuron] - (weight[:, neuron].mean() if centre else 0.0)
            logits = look.unembedding.detach().double() @ (gain * vector)  # type: ignore[union-attr]
            assert promoted.ids == tuple(logits.argsort(descending=True)[:4].tolist())
            assert suppressed.ids == tuple(logits.argsort()[:4].tolist())
            assert suppressed.logits == pytest.approx(logits.sort().values[:4].tolist())
        assert len(neurons_say(model, 0)) == weight.shape[1]


def test_token_logits_are_what_the_model_adds() -> None:
    """Of two residuals of the same size, the logits' difference, times that size."""
    model = llama().double()
    torch.manual_seed(0)
    a, b = torch.randn(2, 32).double()
    b = b * a.norm() / b.norm()
    size = (a.pow(2).mean() + model.model.norm.variance_epsilon).sqrt()
    with torch.no_grad():
        expected = (model.lm_head(model.model.norm(a)) - model.lm_head(model.model.norm(b))) * size
    torch.testing.assert_close(token_logits(model, a - b), expected, atol=1e-5, rtol=1e-5)
    assert token_logits(model, torch.zeros(2, 3, 32).double()).shape == (2, 3, tiny.VOCABULARY)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="transforms the residual"):
        written(tiny.bert(), 0, 0)
    with pytest.raises(UnsupportedModelError, match="no embedding of tokens"):
        attended(tiny.vit(), 0, 0)
    with pytest.raises(ValueError, match="has 0 to 47"):
        neurons_say(tiny.llama(), 0, (48,))
    with pytest.raises(ValueError, match="layer=7"):
        neurons_say(tiny.llama(), 7)
    with pytest.raises(UnsupportedModelError, match="last projection"):
        neurons_say(tiny.gpt_oss(), 0)
