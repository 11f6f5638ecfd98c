"""GlobEnc: which inputs a position of an encoder is made of, by the lengths of what moves.

Modarressi et al. 2022 (arXiv 2205.03286): a layer's map holds lengths in place of weights, with
both residuals and both norms inside (see `norm_maps`), its rows sum to one, and layers multiply
like a rollout, with no residual added a second time. The row that an answer is read from goes down
the layers as products of a row and a map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headwise.instruments.gains import Gain, find_gain
from headwise.instruments.kept_maps import run_read
from headwise.instruments.metrics import Metric
from headwise.instruments.norm_maps import INCLUDE, NormMap, gram_of, linear
from headwise.models import (
    AttentionReading,
    LayerReading,
    ModelView,
    UnsupportedModelError,
    observe,
)
from headwise.models.sites import Site

__all__ = ["globenc", "norm_maps"]

CLOSE = 1e-4
"""Of the largest number: by how much what a layer gives may differ from what is made of it here."""


def globenc(
    view: ModelView,
    inputs: Mapping[str, Any],
    metric: Metric,
    *,
    of: str | None = None,
    include: str = "layer",
    at: Tensor | int | None = None,
) -> Tensor:
    """`(batch, n)`, sums to 1: the inputs that the positions which the answer is read from are made
    of.

    `of`: the stack, by default the first (the encoder). `include`: "layer" is GlobEnc, "norm",
    "residual" and "attention" leave more and more out. `at`: a position to follow instead of those
    that the answer is read from (which are weighted by the size of their gradient).

    Works for layers with norms behind (BERT) and with norms before (ViT, GPT-2), there without
    norms behind. Memory O(layers n (width + heads^2)). Raises ValueError for a metric that reads
    nothing of the stack and for "norm" where none stands behind, UnsupportedModelError for layers
    that are put together in another way.
    """
    stack = _stack(view, of)
    last = [layer for layer in view.layers if layer.stack == stack][-1]
    site = Site("residual", last.index + 1, stack)
    kept, row = run_read(view, inputs, metric, site, _keeping(view, stack, include), at)
    row = row.double()
    for one in reversed(kept):
        row = one.carry(row)
    return row / row.sum(-1, keepdim=True).clamp_min(1e-300)


def norm_maps(
    view: ModelView,
    inputs: Mapping[str, Any],
    *,
    of: str | None = None,
    include: str = "layer",
) -> list[NormMap]:
    """The norm-based map of every layer of a stack. Options and errors as of `globenc`."""
    with torch.no_grad(), _keeping(view, _stack(view, of), include) as kept:
        view.model(**inputs)
    return kept


def _stack(view: ModelView, of: str | None) -> str:
    if of is not None and of not in view.stacks:
        raise ValueError(f"of={of!r}: the model has the stacks {', '.join(view.stacks)}")
    stack = of or view.stacks[0]
    crossed = [a.name for a in view.attentions if a.stack == stack and a.kind == "cross"]
    if crossed:
        raise UnsupportedModelError(
            f"the {stack} attends to another stack ({crossed[0]}); what its positions are made of "
            "is followed for stacks of self-attention alone"
        )
    return stack


@contextmanager
def _keeping(view: ModelView, stack: str, include: str) -> Iterator[list[NormMap]]:
    if include not in INCLUDE:
        raise ValueError(f"include={include!r}: expected one of {', '.join(INCLUDE)}")
    width = view.width
    modules = [m for m in view.model.modules() if "norm" in type(m).__name__.lower()]
    gains = {m: g for m in modules if isinstance(g := find_gain(m, width), Gain)}
    kept: list[NormMap] = []
    reading: list[AttentionReading] = []
    ran: list[tuple[Gain, Tensor, Tensor]] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(output, Tensor) and args[0].dim() == 3:
            ran.append((gains[module], args[0].detach(), output.detach()))

    def read(seen: AttentionReading) -> None:
        if seen.attention.stack == stack:
            reading.append(seen)

    def read_layer(layer: LayerReading) -> None:
        if layer.layer.stack == stack:
            kept.append(_layer(reading, layer, ran, include))
        reading.clear()
        ran.clear()

    handles = [module.register_forward_hook(note) for module in gains]
    try:
        with observe(view, read, read_layer):
            yield kept
    finally:
        for handle in handles:
            handle.remove()


def _layer(
    reading: list[AttentionReading],
    layer: LayerReading,
    ran: list[tuple[Gain, Tensor, Tensor]],
    include: str,
) -> NormMap:
    name = f"layer {layer.layer.index} of the {layer.layer.stack}"
    x, added, fed = layer.residual_in, layer.attention_out, layer.mlp_out
    if len(reading) != 1:
        raise UnsupportedModelError(f"{name}: {len(reading)} attentions, expected one")
    seen = reading[0]
    attention = seen.attention
    output = attention.output_weight().detach()
    merged = torch.einsum("bhnd,hwd->bnw", seen.out.to(output.dtype), output)
    bias = attention.output_bias()
    merged = merged if bias is None else merged + bias.detach()
    added = merged if added is None else added
    if not _close(merged, added):
        raise UnsupportedModelError(
            f"{name}: what {attention.name} adds is not the heads' outputs through its output "
            "projection, so it cannot be told apart by position"
        )
    rest = torch.zeros_like(x, dtype=torch.float64)
    rest = rest if bias is None else rest + bias.detach().double()
    first, second = _behind(ran, x + added, fed, layer.residual_out, name)
    if first is not None and second is not None and fed is None:
        fed = second[1] - first[2]
    if include == "norm" and first is None:
        raise ValueError(f"include='norm': no norm stands behind the attention of {name}")
    norms: list[tuple[Gain, Tensor]] = []
    for one, when in ((first, ("norm", "layer")), (second, ("layer",))):
        if one is not None and include in when:
            gain, before, after = one
            factor = _factor(gain, before, after)
            if one is second and fed is not None:
                rest = rest + fed.double()
            rest = linear(gain, rest) * factor[..., None]
            rest = rest if gain.bias is None else rest + gain.bias.to(rest)
            norms.append((gain, factor))
    if include == "layer" and second is None and fed is not None:
        rest = rest + fed.double()
    gram = gram_of(attention, seen.value, x, [gain for gain, _ in norms])
    factors = tuple((gain, factor) for gain, factor in norms)
    return NormMap(attention, seen.map, seen.value, x, include, factors, gram, rest)


def _behind(
    ran: list[tuple[Gain, Tensor, Tensor]],
    summed: Tensor,
    fed: Tensor | None,
    left: Tensor,
    name: str,
) -> tuple[Any, Any]:
    """The norms behind attention and behind the feed-forward part, (None, None) where they stand
    before. Found by what they were handed, whatever they are called."""
    plain = summed if fed is None else summed + fed
    if _close(plain, left):
        return None, None
    first = next((one for one in ran if _close(one[1], summed)), None)
    if first is not None and fed is None and _close(first[2], left):
        return first, None
    if first is not None:
        second = next((one for one in ran if one is not first and _close(one[2], left)), None)
        # where the feed-forward part was not found, it is what stands between the two norms
        if second is not None and (fed is None or _close(second[1], first[2] + fed)):
            return first, second
    raise UnsupportedModelError(
        f"{name} gives neither the sum of its input, attention and feed-forward part, nor a norm "
        "of these sums; lengths through other ways of putting a layer together are not known"
    )


def _factor(gain: Gain, before: Tensor, after: Tensor) -> Tensor:
    """One over the size that a norm divided by `(batch, n)` float64, from what it gave."""
    moved = linear(gain, before.double())
    given = after.double() if gain.bias is None else after.double() - gain.bias.to(moved)
    return (moved * given).sum(-1) / moved.pow(2).sum(-1).clamp_min(1e-300)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return bool((a - b).abs().amax() <= CLOSE * b.abs().amax().clamp_min(1e-12))
