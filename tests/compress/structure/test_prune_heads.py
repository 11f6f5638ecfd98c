"""A model without some heads gives what the whole model gives with their outputs silenced."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from headwise.compress import PruneHeads, prune_heads, steps_of
from headwise.edits import Silence, swap
from headwise.instruments import ablation
from headwise.models import UnsupportedModelError, observe, view
from headwise.models.projections import features_first
from headwise.models.structure import AttentionView
from tests.instruments import tiny
from tests.models.families import FAMILIES, TEXTS, inputs, scores

REFUSED = ("olmo2",)  # its norms span all heads
SHARED = ("albert", "albert_groups")
EAGER_ONLY = ("gemma2", "gpt_oss")


def _rows(model: nn.Module, draw: Any) -> list[tuple[str, str, int, int]]:
    """Some heads of every attention; of a layer that several places run, the same."""
    chosen: dict[int, list[int]] = {}
    rows = []
    for a in view(model).attentions:
        if id(a.module) not in chosen:
            chosen[id(a.module)] = draw(_heads(a))
        rows += [(a.stack, a.kind, a.layer, h) for h in chosen[id(a.module)]]
    return rows


def _heads(a: AttentionView) -> st.SearchStrategy[list[int]]:
    # an attention that adds the residual itself (ALBERT) cannot lose all of them
    most = a.heads - 1 if "Albert" in type(a.module).__name__ else a.heads
    # beside an encoder, groups of query heads stay equal; here every group has one head
    return st.lists(st.integers(0, a.heads - 1), max_size=most, unique=True)


@settings(max_examples=3)
@given(draw=st.data(), padding=st.sampled_from([None, "left", "right"]))
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in REFUSED])
def test_pruned_is_silenced(name: str, implementation: str, draw: Any, padding: Any) -> None:
    if implementation == "sdpa" and name in EAGER_ONLY:
        pytest.skip("this model has no SDPA")
    model = FAMILIES[name](implementation)
    batch = inputs(model, padding=padding if name in TEXTS else None)
    rows = _rows(model, draw.draw)
    with torch.no_grad():
        with swap(model, {row: Silence() for row in rows}):
            expected = scores(model(**batch))
        before = sum(p.numel() for p in model.parameters())
        prune_heads(model, rows)
        found = scores(model(**batch))
    real = batch.get("attention_mask")
    if real is not None and found.shape[:2] == real.shape:
        found, expected = found[real.bool()], expected[real.bool()]
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)
    assert (sum(p.numel() for p in model.parameters()) < before) == bool(rows)


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-12), (torch.bfloat16, 0.1), (torch.float16, 1e-2)]
)
def test_every_dtype_is_kept(dtype: torch.dtype, close: float) -> None:
    model = FAMILIES["llama"]("sdpa").to(dtype)
    batch = inputs(model, padding="left")
    rows = [(0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3)]
    with torch.no_grad():
        with swap(model, {row: Silence() for row in rows}):
            expected = scores(model(**batch))
        prune_heads(model, rows)
        found = scores(model(**batch))
    assert found.dtype == dtype
    assert {p.dtype for p in model.parameters()} == {dtype}
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=close, rtol=close)


def test_single_ablations_of_the_atlas_are_single_prunings() -> None:
    model = tiny.llama()
    batch = {"input_ids": tiny.ids(24, batch=3)}
    effect = ablation(model, batch, metric="loss", how="zero").heads["effect"]

    def loss(one: Any) -> float:
        with torch.no_grad():
            return float(one(**batch, labels=batch["input_ids"]).loss)

    look = view(model)
    for number, (layer, head) in enumerate((a.layer, h) for a in look.attentions for h in range(4)):
        pruned = copy.deepcopy(model)
        prune_heads(pruned, [(layer, head)])
        assert loss(pruned) - loss(model) == pytest.approx(float(effect[number]), abs=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_means_of_removed_heads_are_folded_into_the_bias(name: str) -> None:
    """An own loop over the heads' outputs, in float64, says what has to be added."""
    model = FAMILIES[name]("eager").double()
    batch = inputs(model, padding="right" if name in TEXTS else None)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].double()
    rows = [(1, 0), (1, 1), (1, 3)]
    look = view(model)
    attention = look.attentions[1]
    taken: list[torch.Tensor] = []
    output: Any = attention.projections.output  # type: ignore[union-attr]
    handle = output.register_forward_pre_hook(lambda m, args: taken.append(args[0].detach()))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    real = batch.get("attention_mask", torch.ones(taken[0].shape[:2]))
    size = attention.head_dim
    weight = features_first(output).detach()
    expected = torch.zeros(look.width, dtype=torch.float64)
    for head in (0, 1, 3):
        total, count = torch.zeros(size, dtype=torch.float64), 0
        for b in range(real.shape[0]):
            for i in range(real.shape[1]):
                if real[b, i]:
                    total += taken[0][b, i, head * size : (head + 1) * size]
                    count += 1
        expected += weight[:, head * size : (head + 1) * size] @ (total / count)
    had = output.bias.detach().clone() if output.bias is not None else torch.zeros(look.width)
    prune_heads(model, rows, how="mean", inputs=batch)
    bias = view(model).attentions[1].output_bias()
    assert bias is not None
    torch.testing.assert_close(bias.detach() - had, expected)


def test_means_survive_the_loss_of_all_heads() -> None:
    model = tiny.llama()
    batch = {"input_ids": tiny.ids(24, batch=3)}
    whole = copy.deepcopy(model)
    prune_heads(model, [(1, h) for h in range(4)], how="mean", inputs=batch)
    nothing: Any = model.model.layers[1].self_attn
    seen: list[torch.Tensor] = []
    whole.model.layers[1].self_attn.register_forward_hook(lambda m, a, out: seen.append(out[0]))
    with torch.no_grad():
        whole(**batch)
        out = nothing(torch.zeros(1, 3, 32))[0]
    expected = seen[0].mean((0, 1)).expand(1, 3, 32)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_the_pruned_model_is_seen_as_it_is_and_pruned_further() -> None:
    """Numbers are those of the moment, and unequal groups are told apart by the view."""
    model, other = tiny.llama(), tiny.llama()
    prune_heads(model, [(0, 1)])
    look = view(model).attentions[0]
    assert (look.heads, look.kv_heads, look.query_weight().shape) == (3, 3, (3, 8, 32))
    whole = view(other).attentions[0].key_weight()
    torch.testing.assert_close(look.key_weight(), whole[[0, 1, 1]])
    assert model.model.layers[0].self_attn.k_proj.out_features == 16  # two are stored
    seen: list[tuple[int, ...]] = []
    with observe(view(model), read=lambda r: seen.append(tuple(r.key.shape))), torch.no_grad():
        model(input_ids=tiny.ids(6))
    assert seen == [(1, 3, 6, 8), (1, 2, 6, 8)]
    prune_heads(model, [(0, 0)])  # its group is gone
    look = view(model).attentions[0]
    assert (look.heads, look.kv_heads) == (2, 1)
    prune_heads(other, [(0, 0), (0, 1)])
    batch = {"input_ids": tiny.ids(12)}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, other(**batch).logits)
    assert steps_of(model) == (PruneHeads(((0, 1),)), PruneHeads(((0, 0),)))


def test_gradients_reach_what_is_left() -> None:
    model = tiny.llama()
    prune_heads(model, [(0, 1), (1, 0), (1, 1)])
    model(input_ids=tiny.ids(9), labels=tiny.ids(9)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    frozen = tiny.llama().requires_grad_(False)
    prune_heads(frozen, [(0, 1)])
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize(
    ("rows", "more", "error", "said"),
    [
        ([(0, 4)], {}, ValueError, "heads 0 to 3"),
        ([(7, 0)], {}, ValueError, "layers that do: 0, 1"),
        ([(0, 1, 2)], {}, ValueError, "a head is"),
        ([(0, 1)], {"attention": "cross"}, ValueError, "no cross-attention"),
        ([(0, 1)], {"stack": "encoder"}, ValueError, "has the stacks decoder"),
        ([(0, 1)], {"how": "median"}, ValueError, "expected 'zero' or 'mean'"),
        ([(0, 1)], {"how": "mean"}, ValueError, "give inputs="),
        ([(0, 1)], {"inputs": {}}, ValueError, "for how='mean'"),
        ([(0, 1), (1, 9)], {}, ValueError, "heads 0 to 3"),
    ],
)
def test_errors_come_before_anything_is_changed(
    rows: Any, more: Any, error: type[Exception], said: str
) -> None:
    model = tiny.llama()
    before = {n: p.shape for n, p in model.named_parameters()}
    with pytest.raises(error, match=said):
        prune_heads(model, rows, **more)
    assert {n: p.shape for n, p in model.named_parameters()} == before
    assert steps_of(model) == ()


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="q_norm"):
        prune_heads(FAMILIES["olmo2"](), [(0, 0)])
    with pytest.raises(ValueError, match="run the same attention"):
        prune_heads(FAMILIES["albert"](), [(0, 0)])
    with pytest.raises(UnsupportedModelError, match="leave it one head"):
        prune_heads(FAMILIES["albert"](), [(layer, h) for layer in range(3) for h in range(4)])
    with pytest.raises(ValueError, match="say stack="):
        prune_heads(FAMILIES["bart"](), [(0, 0)])
