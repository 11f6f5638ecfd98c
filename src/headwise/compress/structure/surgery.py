"""One attention of a Hugging Face model with fewer heads."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headwise.compress.structure.counts import say_counts
from headwise.compress.structure.groups import caches_of, read_equally, read_unequally
from headwise.compress.structure.nothing import NoAttention
from headwise.compress.structure.relative import keep_biases, own_zeros, takes_relative_bias
from headwise.compress.structure.slicing import (
    add_bias,
    check_sliceable,
    keep_along,
    keep_columns,
    keep_rows,
)
from headwise.models.errors import UnsupportedModelError
from headwise.models.projections import Part, Projections
from headwise.models.structure import AttentionView

_NEUTRAL = ("inv_freq", "original_inv_freq", "masked_bias", "relative_attention_bias.weight")


_RESIDUAL_NORMS = ("LayerNorm", "layer_norm", "layernorm")
"""Norms of the residual that some attentions hold, before their projections or behind the sum."""


@dataclass(frozen=True, eq=False)
class Cut:
    """What one attention is to keep. `queries`, `keys`: the heads that stay, as numbered now;
    `of`: for each of `queries`, the place in `keys` of the key-value head that it reads; `more`:
    (owner, name, axis, heads) of what else has something for every head."""

    view: AttentionView
    found: Projections
    queries: list[int]
    keys: list[int]
    of: tuple[int, ...]
    more: list[tuple[nn.Module, str, int, list[int]]]

    @property
    def equal(self) -> bool:
        """Whether every key-value head that is left is read by as many query heads."""
        group = len(self.queries) // max(1, len(self.keys))
        return self.of == tuple(h // group for h in range(len(self.queries))) if group else True


def plan(view: AttentionView, removed: set[int]) -> Cut:
    """Raises ValueError for heads that are not there and UnsupportedModelError for an attention
    in which it is not known what belongs to a head; nothing is changed."""
    wrong = sorted(h for h in removed if not 0 <= h < view.heads)
    if wrong:
        raise ValueError(
            f"{view.name} has heads 0 to {view.heads - 1}; it has no head "
            f"{', '.join(map(str, wrong))}"
        )
    found = view.projections
    if isinstance(found, str):
        raise UnsupportedModelError(f"{view.name}: {found}")
    if found.output is None:
        raise UnsupportedModelError(f"{view.name}: no output projection was found")
    if view.observable is not None:
        raise UnsupportedModelError(
            f"{view.name}: {view.observable}, and what else in it counts heads is not known"
        )
    for part in (found.query.module, found.key.module, found.value.module, found.output):
        check_sliceable(part, view.name)
    of = found.key.read or tuple(h // (view.heads // found.key.heads) for h in range(view.heads))
    queries = [h for h in range(view.heads) if h not in removed]
    keys = sorted({of[h] for h in queries})
    cut = Cut(
        view,
        found,
        queries,
        keys,
        tuple(keys.index(of[h]) for h in queries),
        _more(view, found, queries, keys),
    )
    if not queries:
        check_replaceable(view)
    if not cut.equal:
        caches_of(view.module)
        config = getattr(view.module, "config", None)
        if view.kind == "cross" or getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{view.name}: its groups of query heads would become unequal, which is not known "
                "to work beside an encoder: remove as many query heads of every group"
            )
    return cut


def carry_out(cut: Cut, bias: bool, model: nn.Module) -> None:
    """Slice the tensors of one attention and mend what speaks of their sizes."""
    view, found, module = cut.view, cut.found, cut.view.module
    output = found.output
    assert output is not None
    width = view.width
    if bias:
        add_bias(output, width)
    if not cut.queries:
        take_out(model, view, output, biased=True)
        return
    rows: dict[int, tuple[nn.Module, list[int]]] = {}
    for part, kept in ((found.query, cut.queries), (found.key, cut.keys), (found.value, cut.keys)):
        rows.setdefault(id(part.module), (part.module, []))[1].extend(_rows(part, kept))
    for projection, features in rows.values():
        keep_rows(projection, sorted(features))
    size = found.value.head_dim
    keep_columns(output, [h * size + i for h in cut.queries for i in range(size)])
    for owner, name, axis, kept in cut.more:
        keep_along(owner, name, kept, axis)
    if takes_relative_bias(module):
        if view.kind == "self":
            keep_biases(module, cut.queries)
        else:
            own_zeros(module)
    heads, kv_heads = len(cut.queries), len(cut.keys)
    if cut.equal:
        read_equally(module)
    else:
        read_unequally(module, cut.of)
    group = heads // kv_heads if cut.equal else 1
    say_counts(module, heads, kv_heads, group, found.query.head_dim)


def _rows(part: Part, heads: list[int]) -> list[int]:
    size = part.head_dim
    if part.by_head is not None:
        starts = [(3 * h + part.by_head) * size for h in heads]
    else:
        starts = [part.start + h * size for h in heads]
    return [start + i for start in starts for i in range(size)]


def take_out(model: nn.Module, view: AttentionView, output: nn.Module, biased: bool) -> None:
    """Put `NoAttention` in the place of an attention; `biased`: it goes on adding its bias."""
    inside = any(one is output for one in view.module.modules())
    bias: Any = getattr(output, "bias", None)
    nothing = NoAttention(
        view.width if inside else 0,
        returns(view.module),
        getattr(view.module, "layer_idx", getattr(view.module, "layer_id", None)),
        bias if inside and biased else None,
        view.kind == "self",
    )
    if not inside:
        keep_columns(output, [])
        if not biased:
            output.register_parameter("bias", None)
    nothing.train(view.module.training)
    put(model, view.module, nothing)


def put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module wherever in the model another one stands."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                setattr(parent, name, new)


def check_replaceable(view: AttentionView) -> None:
    """Raise UnsupportedModelError where nothing can stand in the place of an attention, because it
    adds the residual itself, or gives now so many things and now others."""
    module = view.module
    if "residual" in inspect.signature(type(module).forward).parameters or any(
        name in _RESIDUAL_NORMS for name in module._modules
    ):
        raise UnsupportedModelError(
            f"{view.name}: {type(module).__name__} does more than attend (it holds a norm, or adds "
            "the residual), so that nothing can stand in its place: leave it one head"
        )
    returns(module)


def returns(module: nn.Module) -> int:
    """How many things the module's forward gives: 1 for a tensor alone.

    Raises UnsupportedModelError where that is not written in one way.
    """
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(module).forward)))
    found = {
        len(node.value.elts) if isinstance(node.value, ast.Tuple) else 1
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Return) and node.value is not None
    }
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not always give as many things, so that nothing can "
            "stand in its place: leave it one head"
        )
    return found.pop()


def _more(
    view: AttentionView, found: Projections, queries: list[int], keys: list[int]
) -> list[tuple[nn.Module, str, int, list[int]]]:
    """What an attention has for every head beside its projections.

    Raises UnsupportedModelError for parameters of which that is not known.
    """
    parts = [found.query.module, found.key.module, found.value.module, found.output]
    known = {id(p) for part in parts if part is not None for p in part.parameters()}
    shapes = {
        "q": (found.query.heads, found.query.head_dim, queries),
        "k": (found.key.heads, found.key.head_dim, keys),
    }
    more: list[tuple[nn.Module, str, int, list[int]]] = []
    for path, tensor in _tensors(view.module):
        owner_path, _, name = path.rpartition(".")
        owner = view.module.get_submodule(owner_path)
        if id(tensor) in known or path.endswith(_NEUTRAL) or tensor.numel() <= 1:
            continue
        shape, last = tuple(tensor.shape), path.split(".")
        heads, size, kept = shapes["k" if last[0].startswith("k") else "q"]
        norm_of_every_head = "norm" in path and shape == (size,)
        norm_of_every_head |= last[0] in _RESIDUAL_NORMS and shape == (view.width,)
        for_no_head = not isinstance(tensor, nn.Parameter) and heads not in shape
        sinks = shape == (heads,) and "sink" in path
        if sinks or (shape == (heads, size) and last[0][0] in "qk"):
            more.append((owner, name, 0, kept))
        elif not norm_of_every_head and not for_no_head:
            raise UnsupportedModelError(
                f"{view.name}.{path} {shape}: which of it belongs to a head is not known (a norm "
                "over all heads together changes with every head that goes), so heads cannot be "
                f"removed from {type(view.module).__name__}"
            )
    return more


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
