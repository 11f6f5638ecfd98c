"""`sensitivity`: what a model loses when one layer, one matrix or one head alone has few bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.compress.bits.allocation import allocate
from headwise.compress.bits.rounding import check_group, rounded
from headwise.compress.cache.packing import packed_size
from headwise.compress.structure.matrices import is_matrix, matrices_of, shape_of
from headwise.instruments.atlas import Atlas
from headwise.instruments.columns import Column
from headwise.instruments.examples import model_view, read_examples
from headwise.instruments.head_rows import rows_of
from headwise.instruments.metrics import metric_of
from headwise.instruments.run import evaluating
from headwise.models import ModelView
from headwise.models.errors import UnsupportedModelError
from headwise.models.prefix import Prefix
from headwise.models.projections import Part, features_first
from headwise.models.structure import AttentionView

__all__ = ["Sensitivity", "sensitivity"]

BY = ("layer", "module", "head")

Cut = Callable[[Tensor], Tensor]
"""Takes its piece, a view, out of a weight `(out, in)`."""


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What was measured. `names`: of the parts (modules as in `named_modules()`; heads as
    "module head"). `effects` `(parts, bits)`: metric with few bits minus that of the unchanged
    model, mean over examples; `errors`: its standard error. `bytes` `(parts, bits)`: what the part
    takes then, codes and scales. `atlas`: the same as columns `effect_8_bits` ... of heads or of
    layers, None for modules. `better`: "higher" or "lower", as the metric says."""

    by: str
    names: tuple[str, ...]
    bits: tuple[int, ...]
    effects: np.ndarray
    errors: np.ndarray
    bytes: np.ndarray
    unchanged: float
    better: str
    atlas: Atlas | None
    inside: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The matrices of a part, where no module of its name holds them (layers of our stacks)."""

    def widths(self, budget: float) -> dict[str, int]:
        """Name -> bits with the least loss that `budget` bytes allow, if losses add up (see
        `allocate`); what `quantise` takes. Raises ValueError for heads, which share matrices."""
        if self.by == "head":
            raise ValueError("heads share matrices, which have one width: measure by='module'")
        losses = -self.effects if self.better == "higher" else self.effects
        chosen = allocate(self.bytes, losses, budget)
        return {
            matrix: self.bits[c]
            for name, c in zip(self.names, chosen, strict=True)
            for matrix in self.inside.get(name, (name,))
        }


@dataclass(frozen=True, eq=False)
class _Part:
    """Pieces of weights that get few bits together. start: number of the first layer it is in."""

    name: str
    start: int
    pieces: tuple[tuple[nn.Module, Cut], ...]
    inside: tuple[str, ...] = ()


def sensitivity(
    model: nn.Module | ModelView,
    inputs: Any,
    bits: Sequence[int] = (8, 4, 2),
    by: str = "layer",
    metric: Any = "loss",
    group: int | None = None,
    *,
    tokenizer: Any | None = None,
    tokens: int | None = None,
    windows: int | None = None,
    batch_size: int = 16,
) -> Sensitivity:
    """Round each part alone to the nearest values of few bits and measure, exactly: no gradient
    estimates. A part's run starts at its layer.

    bits: widths from 1 to 8. by: "layer", "module" (every matrix in a layer), or "head" (its rows
    of W_Q, its columns of W_O, and the rows of W_K and W_V that it reads, which heads of a group
    share). metric, inputs and the rest: as in `ablation`. group: as in `quantise`; scales are those
    that the whole matrix would have.

    The weights are put back, also after an exception. Raises ValueError for what cannot be,
    UnsupportedModelError where heads' projections are not known.
    """
    if by not in BY:
        raise ValueError(f"by={by!r}: expected one of {', '.join(BY)}")
    widths = tuple(bits)
    if not widths or not all(1 <= wide <= 8 for wide in widths):
        raise ValueError(f"bits={widths}: expected one or several from 1 to 8")
    view, measure = model_view(model), metric_of(metric)
    parts = _heads(view) if by == "head" else _modules(view, by == "layer")
    if not parts:
        raise ValueError(f"the layers of {type(view.model).__name__} hold no matrix to be rounded")
    for part in parts:
        for module, _ in part.pieces:
            check_group(shape_of(module)[1], group)
    batches = read_examples(view.model, inputs, tokenizer, None, tokens, windows, batch_size)
    if not batches:
        raise ValueError("inputs hold no examples")
    rows: list[np.ndarray] = []
    before: list[np.ndarray] = []
    with evaluating(view.model), torch.no_grad():
        for batch in batches:
            prefix = Prefix(view, batch.given)
            score = measure.of(batch.rows)
            clean = prefix.output if score.needs_clean else None
            base = score.score(prefix.output, batch.inputs, clean)
            found = torch.empty(len(parts), len(widths), len(batch), dtype=torch.float64)
            known: dict[tuple[int, int], Tensor] = {}  # matrices of one layer, rounded
            for number, part in enumerate(parts):
                if number and part.start != parts[number - 1].start:
                    known.clear()
                for at, wide in enumerate(widths):
                    with _few_bits(part, wide, group, known):
                        logits = prefix.run({}, start=part.start)
                    found[number, at] = score.score(logits, batch.inputs, clean) - base
            rows.append(found.numpy())
            before.append(base.double().cpu().numpy())
    every = np.concatenate(rows, 2)
    effects, count = every.mean(2), every.shape[2]
    errors = every.std(2, ddof=1) / count**0.5 if count > 1 else np.full_like(effects, np.nan)
    held = np.array([[_bytes(part, wide, group) for wide in widths] for part in parts])
    return Sensitivity(
        by,
        tuple(part.name for part in parts),
        widths,
        effects,
        errors,
        held,
        float(np.concatenate(before).mean()),
        measure.better,
        _atlas(view, parts, by, widths, effects, errors, measure.name, measure.unit),
        {part.name: part.inside for part in parts if part.inside},
    )


@contextmanager
def _few_bits(
    part: _Part, bits: int, group: int | None, known: dict[tuple[int, int], Tensor]
) -> Iterator[None]:
    kept = []
    try:
        for module, cut in part.pieces:
            table, key = features_first(module), (id(module), bits)
            if key not in known:  # pieces put in before are of this part: the rest is untouched
                known[key] = rounded(table, bits, group)
            piece = cut(table)
            kept.append((piece, piece.clone()))
            piece.copy_(cut(known[key]))
        yield
    finally:
        for piece, was in reversed(kept):
            piece.copy_(was)


def _modules(view: ModelView, whole_layers: bool) -> list[_Part]:
    names = {id(module): name for name, module in view.model.named_modules()}
    found: dict[str, _Part] = {}
    matrices = matrices_of(view)
    taken: set[int] = set()
    for number, layer in enumerate(view.layers):
        apart = [layer.mlp] if layer.mlp is not None else []  # as our own stacks keep them
        apart += [attention.module for attention in layer.attentions]
        inside = {id(m) for root in (layer.module, *apart) for m in root.modules()}
        mine = {n: m for n, m in matrices.items() if id(m) in inside and id(m) not in taken}
        taken |= {id(m) for m in mine.values()}
        if whole_layers and mine:
            name = names[id(layer.module)]
            held = all(matrix.startswith(f"{name}.") for matrix in mine)
            pieces = tuple((m, _all) for m in mine.values())
            found[name] = _Part(name, number, pieces, () if held else tuple(mine))
        elif not whole_layers:
            found |= {n: _Part(n, number, ((m, _all),)) for n, m in mine.items()}
    return list(found.values())


def _heads(view: ModelView) -> list[_Part]:
    found = []
    numbers = {(layer.stack, layer.index): n for n, layer in enumerate(view.layers)}
    for attention in view.attentions:
        attention.query_weight(), attention.output_weight()  # raise where they are not known
        _require_floats(attention)
        start = numbers[attention.stack, attention.layer]
        for head in range(attention.heads):
            pieces = _head_pieces(attention, head)
            found.append(_Part(f"{attention.name} {head}", start, pieces))
    return found


def _require_floats(attention: AttentionView) -> None:
    found = attention.projections
    assert not isinstance(found, str)
    for module in (found.query.module, found.key.module, found.value.module, found.output):
        if module is not None and not is_matrix(module):
            raise UnsupportedModelError(
                f"{attention.name}: a {type(module).__name__} has no one matrix whose rows could "
                "be rounded head by head: use by='module', or measure before it is changed"
            )


def _head_pieces(attention: AttentionView, head: int) -> tuple[tuple[nn.Module, Cut], ...]:
    found = attention.projections
    assert not isinstance(found, str)
    assert found.output is not None
    shared = attention.key_value_of[head]
    parts = ((found.query, head), (found.key, shared), (found.value, shared))
    pieces = [(part.module, _rows(part, number)) for part, number in parts]

    def columns(table: Tensor) -> Tensor:
        return table.unflatten(1, (attention.heads, -1))[:, head]

    return (*pieces, (found.output, columns))


def _rows(part: Part, head: int) -> Cut:
    def cut(table: Tensor) -> Tensor:
        return replace(part, module=_Held(table), read=None).weight[head]

    return cut


class _Held(nn.Module):
    """Lets a projection's part be taken out of another table."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)


def _all(table: Tensor) -> Tensor:
    return table


def _bytes(part: _Part, bits: int, group: int | None) -> int:
    total = 0
    for module, cut in part.pieces:
        wide = shape_of(module)[1]
        share = cut(features_first(module)).numel() / features_first(module).numel()
        scales = wide // check_group(wide, group) * (4 if bits == 8 else 5)
        held = bits if bits in (1, 2, 3, 4, 8) else 8
        total += round(share * shape_of(module)[0] * (packed_size(wide, held) + scales))
    return total


def _atlas(
    view: ModelView,
    parts: list[_Part],
    by: str,
    bits: tuple[int, ...],
    effects: np.ndarray,
    errors: np.ndarray,
    metric: str,
    unit: str,
) -> Atlas | None:
    if by == "module":
        return None
    heads, layers = rows_of(view)
    rows = [part.start for part in parts] if by == "layer" else list(range(len(parts)))
    table = layers if by == "layer" else heads
    spread: dict[str, np.ndarray] = {}
    columns = {}
    for at, wide in enumerate(bits):
        name = f"effect_{wide}_bits"
        for suffix, values in (("", effects), ("_se", errors)):
            column = np.full(len(next(iter(table.values()))), np.nan)
            column[rows] = values[:, at]
            table[name + suffix] = column
        if by == "head":
            spread[name] = table[name + "_se"]
        what = f"Rise of the {metric} when this {by} alone has {wide} bits a weight."
        columns[name] = Column(name, unit, what, "measured, rounded to the nearest")
        columns[f"{name}_se"] = Column(f"{name}_se", unit, f"Standard error of {name}.")
    return Atlas(heads=heads, layers=layers, columns=columns, spread=spread)
