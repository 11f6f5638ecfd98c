"""How alike what enters and what leaves spans of layers is: which of them could go.

How alike the attention maps of layers are is `map_similarity` of `shared_maps.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.compress.structure.moments import body_of, run, tokens_of
from headwise.instruments.examples import Examples, model_view, read_examples
from headwise.instruments.run import evaluating
from headwise.models import ModelView, Site, recording

MEANS = ("all", "last")


@dataclass(frozen=True, eq=False)
class LayerSimilarity:
    """What `layer_similarity` measured of one stack of L layers.

    angular `(L, L)`: at [n - 1, l], the angle between the residual that enters layer l and the one
    that enters layer l + n, as a share of pi (0: the same direction, 0.5: at a right angle), NaN
    where l + n > L. cosine: the same as a cosine. influence `(L,)`: 1 - cosine over each single
    layer. stack: its name.
    """

    angular: Tensor
    cosine: Tensor
    stack: str

    @property
    def influence(self) -> Tensor:
        return 1 - self.cosine[0]

    def span(self, count: int) -> tuple[int, ...]:
        """The `count` neighbouring layers whose removal turns the residual least (Gromov et al.
        2024, arXiv 2403.17887, section 3.2: l* = argmin of d(x_l, x_(l+n)))."""
        self._check(count)
        row = self.angular[count - 1, : len(self.angular) - count + 1]
        start = int(row.argmin())
        return tuple(range(start, start + count))

    def least(self, count: int) -> tuple[int, ...]:
        """The `count` layers of least influence, anywhere (ShortGPT, Men et al. 2024, arXiv
        2403.03853, eq. 1)."""
        self._check(count)
        return tuple(sorted(self.influence.argsort()[:count].tolist()))

    def _check(self, count: int) -> None:
        if not 1 <= count < len(self.angular):
            raise ValueError(f"{count} of {len(self.angular)} layers cannot go: at least 1 stays")


def layer_similarity(
    model: nn.Module | ModelView,
    inputs: Any,
    tokens_of_each: str = "all",
    stack: str | None = None,
    **reading: Any,
) -> LayerSimilarity:
    """Angular distance between what enters layers, over spans of every length.

        layer_similarity(model, texts, tokenizer=tok).span(4)       # four layers that may go

    tokens_of_each: "last", the last real token of each example, as Gromov et al. do; "all", mean
    over tokens, as ShortGPT does. stack: which, where a model has several. Nothing is changed.
    Raises ValueError for what does not fit.
    """
    if tokens_of_each not in MEANS:
        raise ValueError(f"tokens_of_each={tokens_of_each!r}: expected one of {', '.join(MEANS)}")
    view = model_view(model)
    name = view.stacks[-1] if stack is None else stack
    if name not in view.stacks:
        raise ValueError(f"stack={stack!r}: the model has {', '.join(view.stacks)}")
    indices = [layer.index for layer in view.layers if layer.stack == name]
    several = name if len(view.stacks) > 1 else None
    sites = [Site("residual", index, several) for index in [*indices, indices[-1] + 1]]
    depth = len(indices)
    cosine = torch.zeros(depth + 1, depth + 1, dtype=torch.float64)
    angle = torch.zeros_like(cosine)
    count = 0
    body = body_of(view.model, [layer.module for layer in view.layers])
    with evaluating(view.model), torch.no_grad():
        for batch in read_examples(view.model, inputs, **reading):
            with recording(view, sites) as kept:
                run(body, batch)
            found = [_chosen(kept[site], batch, tokens_of_each) for site in sites]
            unit = torch.stack([x.double() / x.double().norm(dim=-1, keepdim=True) for x in found])
            for token in unit.unbind(1):  # (depth + 1, width)
                between = (token @ token.T).clamp(-1, 1).cpu()
                cosine += between
                angle += between.arccos() / math.pi
            count += unit.shape[1]
    return LayerSimilarity(
        _by_span(angle / count),
        _by_span(cosine / count),
        name,
    )


def _by_span(between: Tensor) -> Tensor:
    """`(L + 1, L + 1)` between places to `(L, L)`: [n - 1, l] is of l and l + n."""
    depth = len(between) - 1
    found = torch.full((depth, depth), math.nan, dtype=between.dtype)
    for n in range(1, depth + 1):
        found[n - 1, : depth + 1 - n] = between.diagonal(n)
    return found


def _chosen(x: Tensor, batch: Examples, which: str) -> Tensor:
    """Of `(batch, n, width)`, the real tokens or the last of each example: `(tokens, width)`."""
    if which == "all":
        return tokens_of(x, batch)
    mask = batch.inputs.get("attention_mask")
    if mask is None or mask.shape != x.shape[:2]:
        return x[:, -1]
    last = (mask.bool() * torch.arange(x.shape[1], device=x.device)).amax(1)
    return x[torch.arange(len(x), device=x.device), last]
