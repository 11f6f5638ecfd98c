"""Models with quantised weights: what is changed, what is not, and that it can be done again."""

import copy

import pytest
import torch
from torch import nn

from headwise.compress.bits.quantised_linear import QuantisedLinear
from headwise.compress.bits.rounding import rounded
from headwise.compress.bits.weights import Quantise, quantise
from headwise.compress.step import read_step, steps_of, write_step
from headwise.models import view
from headwise.models.projections import features_first
from tests.instruments import tiny

MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "bart": tiny.bart}


def answer(model: nn.Module) -> torch.Tensor:
    ids = tiny.ids(12, batch=2)
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 8)])
def test_the_model_computes_with_rounded_weights(name: str, bits: int, group: int | None) -> None:
    model = MODELS[name]()
    twin = copy.deepcopy(model)
    step = quantise(model, bits, group)
    names = [n for n, _ in step.widths]
    assert names
    with torch.no_grad():
        for one in names:
            weight = features_first(twin.get_submodule(one))
            weight.copy_(rounded(weight, bits, group))
    torch.testing.assert_close(answer(model), answer(twin), atol=2e-4, rtol=1e-4)
    for where, module in model.named_modules():
        assert isinstance(module, QuantisedLinear) == (where in names)
    left = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    allowed = ("lm_head", "cls", "dense", "pooler", "out_proj")
    assert all(any(part in n for part in allowed) for n in left), left


def test_embeddings_and_output_stay_as_they_are() -> None:
    model = tiny.llama()
    before = {n: p.clone() for n, p in model.named_parameters()}
    quantise(model, 4)
    left = dict(model.named_parameters())
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(left)
    assert all(torch.equal(p, before[n]) for n, p in left.items())
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert held < 0.45 * sum(p.nbytes for p in before.values())


def test_integers_are_close() -> None:
    model, twin = tiny.llama(), tiny.llama()
    quantise(model, 8, activations="int8")
    want, got = answer(twin), answer(model)
    assert float((want - got).norm() / want.norm()) < 0.1
    assert not torch.equal(want, got)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_done_again_on_a_model_without_data(name: str) -> None:
    model = MODELS[name]()
    quantise(model, 4, 8)
    (step,) = steps_of(model)
    again = read_step(write_step(step))
    assert again == step
    assert isinstance(again, Quantise)
    empty = MODELS[name]().to("meta")
    again.apply(empty)
    empty.load_state_dict(model.state_dict(), strict=True, assign=True)
    rotary = {k: v for k, v in model.named_buffers() if k not in model.state_dict()}
    for key, value in rotary.items():
        owner, _, last = key.rpartition(".")
        setattr(empty.get_submodule(owner), last, value)
    empty.eval()
    torch.testing.assert_close(answer(empty), answer(model), atol=0, rtol=0)


def test_widths_by_name() -> None:
    model = tiny.llama()
    step = quantise(
        model,
        {"model.layers.0": 4, "model.layers.0.mlp": 8, "model.layers.0.self_attn.q_proj": None},
    )
    widths = dict(step.widths)
    assert widths["model.layers.0.mlp.up_proj"] == 8
    assert widths["model.layers.0.self_attn.k_proj"] == 4
    assert "model.layers.0.self_attn.q_proj" not in widths
    assert not any(".1." in name for name in widths)
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)


def test_views_see_a_quantised_model() -> None:
    model, plain = tiny.llama(), tiny.llama()
    quantise(model, 8)
    got, want = view(model).attentions[1], view(plain).attentions[1]
    assert (got.heads, got.kv_heads, got.head_dim) == (want.heads, want.kv_heads, want.head_dim)
    torch.testing.assert_close(got.query_weight(), want.query_weight(), atol=0.01, rtol=0)
    with pytest.raises(RuntimeError, match="inference"):
        got.output_weight()[0] = 0


def test_what_cannot_be_is_refused_before_anything_changes() -> None:
    model = tiny.llama()
    before = {n: p.clone() for n, p in model.named_parameters()}
    for bits, group, message in [
        (5, None, "bits=5"),
        (4, 5, "does not divide"),
        ({"model.layers.7": 4}, None, "has no module"),
        ({"model.norm": 4}, None, "holds no matrix"),
        ({}, None, "names no matrix"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantise(model, bits, group)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        quantise(model, 8)
    assert steps_of(model) == ()
    assert set(dict(model.named_parameters())) == set(before)


def test_a_tied_matrix_is_refused() -> None:
    model = tiny.llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="shares its weight"):
        quantise(model, {"lm_head": 8})
