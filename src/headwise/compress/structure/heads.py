"""Heads that are gone: their rows and columns are cut out of the projections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.compress.step import Step, take
from headwise.compress.structure.built import BuiltCut, carry_out_built, plan_built
from headwise.compress.structure.real import real_tokens
from headwise.compress.structure.relative import move_table, own_zeros, takes_relative_bias
from headwise.compress.structure.surgery import Cut, carry_out, plan
from headwise.instruments.examples import model_view, read_examples
from headwise.instruments.run import evaluating
from headwise.models import ModelView, view
from headwise.models.sites import Site, recording
from headwise.models.structure import AttentionView
from headwise.parts import Attention


@dataclass(frozen=True)
class PruneHeads(Step):
    """Remove query heads, (layer, head) with heads as numbered at that moment, and the key-value
    heads that none of them reads any more. `stack`, `attention`: which layers are meant, as
    `headwise.view` calls them. `bias`: give the output projections that lose heads a bias."""

    heads: tuple[tuple[int, int], ...]
    stack: str | None = None
    attention: str = "self"
    bias: bool = False

    def apply(self, model: nn.Module) -> None:
        look = view(model)
        plans = [_plan(a, gone) for a, gone in _removed(look, self).items()]
        heirs = _heirs(look, plans)
        for owner, heir in heirs:
            move_table(owner, heir)
        for one in plans:
            if isinstance(one, BuiltCut):
                carry_out_built(one, self.bias, model)
            else:
                carry_out(one, self.bias, model)
        for a in look.attentions:  # T5's cross-attentions hand their zeros on
            if self.attention == "cross" and a.kind == "cross" and takes_relative_bias(a.module):
                own_zeros(a.module)


def prune_heads(
    model: nn.Module | ModelView,
    heads: Iterable[Sequence[Any]],
    *,
    attention: str | None = None,
    stack: str | None = None,
    how: str = "zero",
    inputs: Any = None,
    **reading: Any,
) -> None:
    """Take heads out of a model for good, in place: it gives what it gave with their outputs
    silenced (`headwise.edits.Silence`), and computes, stores and caches less.

        prune_heads(model, [(3, 1), (5, 0)])
        prune_heads(model, atlas.where(...), how="mean", inputs=texts, tokenizer=tokenizer)

    heads: (layer, head), or (stack, attention, layer, head) as an Atlas hands them over; numbered
    as they are when this is called. attention: "self" or "cross", stack: needed where the model
    has several. Layers may keep different numbers of heads; a key-value head goes when the last
    query head that reads it goes; query heads of a group may be removed one by one (see
    `groups`: as many of each group is cheaper). An attention without heads adds its output bias.

    how: "zero" leaves the rest as it is; "mean" adds what the removed heads gave on average over
    all real tokens of `inputs` (in the forms of `headwise.see`, with its `tokenizer=` and the
    like) to the bias of the output projection, which gets one if it had none (Molchanov et al.
    2016, arXiv 1611.06440, compare removing with its first-order effect; constants folded as in
    FLAP, An et al. 2023, arXiv 2312.11983, eq. 5).

    Raises ValueError for heads that are not there, UnsupportedModelError where it is not known
    what belongs to a head; the model is then as it was.
    """
    look = model_view(model)
    wanted = _by_place(look, list(heads), stack, attention)
    if how not in ("zero", "mean"):
        raise ValueError(f"how={how!r}: expected 'zero' or 'mean'")
    if (how == "mean") != (inputs is not None):
        raise ValueError(
            "inputs= are for how='mean', which averages over them"
            if how == "zero"
            else "how='mean' averages over inputs: give inputs="
        )
    steps = [PruneHeads(tuple(h), s, a, how == "mean") for (s, a), h in wanted.items()]
    plans = {s: _removed(look, s) for s in steps}  # errors come before anything is changed
    for step in steps:
        for a, gone in plans[step].items():
            _plan(a, gone)
    constants: list[list[tuple[tuple[str, nn.Module | None], Tensor]]] = [[] for _ in steps]
    if how == "mean":
        examples = read_examples(look.model, inputs, **reading)
        means = _mean_outputs(look, [a for s in steps for a in plans[s]], examples)
        constants = [[_constant(a, gone, means[a]) for a, gone in plans[s].items()] for s in steps]
    for step, folded in zip(steps, constants, strict=True):
        take(look.model, step)
        for place, constant in folded:
            bias: Any = _bias_of(look.model, place)
            with torch.no_grad():
                bias += constant.to(bias)


def _plan(attention: AttentionView, removed: set[int]) -> Cut | BuiltCut:
    module = attention.module
    if isinstance(module, Attention):
        return plan_built(attention, module, removed)
    return plan(attention, removed)


def _by_place(
    look: ModelView, heads: list[Sequence[Any]], stack: str | None, attention: str | None
) -> dict[tuple[str | None, str], list[tuple[int, int]]]:
    """(stack, attention) -> (layer, head), each once, in order."""
    found: dict[tuple[str | None, str], list[tuple[int, int]]] = {}
    for head in heads:
        row = tuple(head)
        if len(row) not in (2, 4):
            raise ValueError(
                f"{head!r}: a head is (layer, head), or (stack, attention, layer, head)"
            )
        where = (stack, attention or "self") if len(row) == 2 else (row[0], row[1])
        if where[0] is not None and len(look.stacks) == 1:
            _known_stack(look, where[0])
            where = (None, where[1])
        found.setdefault(where, []).append((int(row[-2]), int(row[-1])))
    return {where: sorted(set(rows)) for where, rows in sorted(found.items(), key=str)}


def _known_stack(look: ModelView, stack: str) -> None:
    if stack not in look.stacks:
        raise ValueError(f"stack={stack!r}: the model has the stacks {', '.join(look.stacks)}")


def _removed(look: ModelView, step: PruneHeads) -> dict[AttentionView, set[int]]:
    """What each attention loses. Layers that run the same module have to lose the same."""
    if step.attention not in ("self", "cross"):
        raise ValueError(f"attention={step.attention!r}: expected 'self' or 'cross'")
    if step.stack is None and len(look.stacks) > 1:
        raise ValueError(f"the model has the stacks {', '.join(look.stacks)}; say stack= which")
    stack = step.stack or look.stacks[0]
    _known_stack(look, stack)
    mine = [a for a in look.attentions if a.stack == stack and a.kind == step.attention]
    found: dict[AttentionView, set[int]] = {}
    for layer, head in step.heads:
        here = [a for a in mine if a.layer == layer]
        if not here:
            layers = ", ".join(str(a.layer) for a in mine) or "none"
            raise ValueError(
                f"head {(layer, head)}: {stack} layer {layer} has no {step.attention}-attention "
                f"with heads; layers that do: {layers}"
            )
        found.setdefault(here[0], set()).add(head)
    once: dict[int, AttentionView] = {}
    for a, gone in found.items():
        for other in mine:
            if other.module is a.module and found.get(other) != gone:
                raise ValueError(
                    f"layers {a.layer} and {other.layer} run the same attention: name the same "
                    "heads in both"
                )
        once.setdefault(id(a.module), a)
    return {a: found[a] for a in once.values()}


def _heirs(look: ModelView, plans: list[Cut | BuiltCut]) -> list[tuple[nn.Module, nn.Module]]:
    """(attention, attention): whose table of relative biases goes to whom, because an attention
    that computes the bias of all others of its stack loses all its heads."""
    left = {id(one.view.module) for one in plans if not one.queries}
    moved = []
    for one in plans:
        module = one.view.module
        if one.queries or not getattr(module, "has_relative_attention_bias", False):
            continue
        heirs = [
            a.module
            for a in look.attentions
            if a.stack == one.view.stack and a.kind == one.view.kind and id(a.module) not in left
        ]
        if heirs and not getattr(heirs[0], "has_relative_attention_bias", False):
            moved.append((module, heirs[0]))
    return moved


def _mean_outputs(
    look: ModelView, attentions: list[AttentionView], examples: list[Any]
) -> dict[AttentionView, Tensor]:
    """What each head of these attentions gives on average over the real tokens `(heads, d_v)`."""
    several = len(look.stacks) > 1
    sites = {a: Site("heads", a.layer, a.stack if several else None, a.kind) for a in attentions}
    sums: dict[AttentionView, Tensor] = {}
    counts: dict[AttentionView, float] = dict.fromkeys(attentions, 0.0)
    with evaluating(look.model), torch.no_grad(), recording(look, sites.values()) as seen:
        for batch in examples:
            look.model(**batch.given)
            for a, site in sites.items():
                out = seen[site].double()  # (batch, n, heads, d_v)
                real = real_tokens(batch.given, a.stack, out.shape[:2]).to(out)
                sums[a] = sums.get(a, 0) + torch.einsum("bnhd,bn->hd", out, real)
                counts[a] += float(real.sum())
    return {a: sums[a] / max(1.0, counts[a]) for a in attentions}


def _constant(
    attention: AttentionView, gone: set[int], means: Tensor
) -> tuple[tuple[str, nn.Module | None], Tensor]:
    """What the removed heads add on average `(width,)`, and where it has to go."""
    heads = sorted(gone)
    weight = attention.output_weight().detach()[heads].double()  # (removed, width, d_v)
    constant = torch.einsum("hwd,hd->w", weight, means[heads])
    found = attention.projections
    output = None if isinstance(found, str) else found.output
    return (attention.name, output), constant


def _bias_of(model: nn.Module, place: tuple[str, nn.Module | None]) -> Any:
    """The bias that takes the constant: the output projection's, or what stands in its place."""
    name, output = place
    if any(one is output for one in model.modules()):
        return output.bias  # type: ignore[union-attr]
    return model.get_submodule(name).bias
