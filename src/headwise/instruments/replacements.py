"""What stands in the place of what is taken out: nothing, a mean, another example's, an even look.

    zero       nothing (a layer: adds nothing)
    mean       the mean over a reference set, over its tokens or by position
    resample   what another example of equal length has there
    uniform    heads only: the map is even over what may be seen, values and output stay
               (attention-only ablation)

A `Replacement` is asked once a batch and draw, with the batch's own values at the sites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headwise.instruments.examples import Examples
from headwise.maps import attend
from headwise.models import AttentionReading, ModelView, Site, UnsupportedModelError, observe

__all__ = ["HOW", "Mean", "Replacement", "Resample", "Uniform", "Zero", "real_tokens"]

HOW = ("zero", "mean", "resample", "uniform")

Values = Mapping[Site, Tensor]


class Replacement:
    """`draws`: how many different ones there are; effects are averaged over them."""

    draws = 1

    def of(self, batch: Examples, values: Values, draw: int) -> dict[Site, Tensor]:
        """For every site, what broadcasts to `values[site]` `(batch, n, ...)`."""
        raise NotImplementedError


class Zero(Replacement):
    def of(self, batch: Examples, values: Values, draw: int) -> dict[Site, Tensor]:
        return {site: there.new_zeros(()) for site, there in values.items()}


class Mean(Replacement):
    """Means over reference values that are handed over with `add`, batch by batch; padding counts
    for nothing. by_position: one for each position; where no example is that long, the mean of
    all positions."""

    def __init__(self, view: ModelView, by_position: bool = False) -> None:
        self.view = view
        self.by_position = by_position
        self._sums: dict[Site, Tensor] = {}
        self._counts: dict[Site, Tensor] = {}

    def add(self, inputs: Mapping[str, Tensor], values: Values) -> None:
        for site, there in values.items():
            real = real_tokens(self.view, site, inputs, there.shape[:2]).to(there.device)
            shape = (*real.shape, *[1] * (there.dim() - 2))
            total = (there.double() * real.view(shape)).sum(0)
            count = real.double().sum(0)
            if site in self._sums:
                total, count = _plus(self._sums[site], total), _plus(self._counts[site], count)
            self._sums[site], self._counts[site] = total, count

    def of(self, batch: Examples, values: Values, draw: int) -> dict[Site, Tensor]:
        return {site: self._mean(site, there) for site, there in values.items()}

    def _mean(self, site: Site, there: Tensor) -> Tensor:
        total, count = self._sums[site], self._counts[site]
        overall = total.sum(0) / count.sum().clamp_min(1)
        if not self.by_position:
            return overall.to(there.dtype)
        n = there.shape[1]
        found = overall.expand(n, *overall.shape).clone()
        known = (count[:n] > 0).nonzero()[:, 0]
        found[known] = total[known] / count[known].view(-1, *[1] * (total.dim() - 1))
        return found.to(there.dtype)


class Resample(Replacement):
    """What another example has at the same place. Without a reference, another of the same batch;
    with one, any example of those of the same length.

    Raises ValueError where there is no other of the same length.
    """

    def __init__(self, draws: int, seed: int, reference: Sequence[Values] | None = None) -> None:
        self.draws = draws
        self.seed = seed
        self.reference = reference

    def of(self, batch: Examples, values: Values, draw: int) -> dict[Site, Tensor]:
        count = len(batch)
        # of the examples' own numbers, so that the draw is the same in whatever order they run
        random = torch.Generator().manual_seed(
            (self.seed * 1_000_003 + batch.rows.start * 1009 + draw) % 2**31
        )
        if self.reference is None:
            if count < 2:
                raise ValueError(
                    f"how='resample': example {batch.rows.start + 1} runs alone, and there is no "
                    "other of its length to draw from: give several examples of equal length and "
                    "batch_size 2 or more, or reference="
                )
            # a circle that misses nobody, shifted by at least one: nobody draws itself
            order = torch.randperm(count, generator=random)
            shift = int(torch.randint(1, count, (), generator=random))
            chosen = torch.empty_like(order)
            chosen[order] = order.roll(shift)
            return {site: there[chosen.to(there.device)] for site, there in values.items()}
        fitting = [pool for pool in self.reference if _fits(pool, values)]
        if not fitting:
            lengths = sorted({there.shape[1] for there in values.values()})
            raise ValueError(
                f"how='resample': no reference example has the length of example "
                f"{batch.rows.start + 1} ({', '.join(map(str, lengths))} positions)"
            )
        total = sum(len(next(iter(pool.values()))) for pool in fitting)
        drawn = torch.randint(total, (count,), generator=random)
        return {
            site: torch.cat([pool[site] for pool in fitting])[drawn.to(there.device)]
            for site, there in values.items()
        }


class Uniform(Replacement):
    """What heads give whose maps are even over what they may see. Site by site: what one head's
    even map does to another's values is not in it.

    Raises UnsupportedModelError for attentions that cannot be observed, or that do something to
    the heads' outputs between their maps and their output projection.
    """

    def __init__(self, view: ModelView) -> None:
        self.view = view

    def of(self, batch: Examples, values: Values, draw: int) -> dict[Site, Tensor]:
        found: dict[Site, Tensor] = {}
        sites = {(s.stack or self.view.stacks[0], s.layer, s.attention): s for s in values}

        def read(seen: AttentionReading) -> None:
            at = seen.attention
            site = sites.get((at.stack, at.layer, at.kind))
            if site is None:
                return
            there = values[site]
            own = seen.out.transpose(1, 2)
            real = real_tokens(self.view, site, batch.inputs, there.shape[:2]).to(there.device)
            if own.shape != there.shape or _far(own[real], there[real]):
                raise UnsupportedModelError(
                    f"{at.name}: its heads' outputs are changed between the map and the output "
                    "projection (a gate, a norm), so an even map's output is not known"
                )
            scores = seen.map.scores
            even, _ = attend(
                torch.zeros_like(seen.query), seen.key, seen.value, scores.pattern, scores.scale
            )
            found[site] = even.transpose(1, 2).to(there.dtype)

        with torch.no_grad(), observe(self.view, read):
            _call(self.view.model, batch.inputs)
        return found


def real_tokens(
    view: ModelView, site: Site, inputs: Mapping[str, Tensor], shape: tuple[int, ...] | torch.Size
) -> Tensor:
    """`(batch, n)` bool: which positions at a site are no padding, as far as the inputs say."""
    first = site.stack in (None, view.stacks[0])
    mask = inputs.get("attention_mask" if first else "decoder_attention_mask")
    if mask is not None and mask.shape == tuple(shape):
        return mask.bool()
    return torch.ones(tuple(shape), dtype=torch.bool)


def _plus(a: Tensor, b: Tensor) -> Tensor:
    """Sums by position, of which one may know more positions."""
    if len(a) < len(b):
        a, b = b, a
    found = a.clone()
    found[: len(b)] += b
    return found


def _fits(pool: Values, values: Values) -> bool:
    return all(site in pool and pool[site].shape[1] == v.shape[1] for site, v in values.items())


def _far(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-2 * b.abs().max().clamp_min(1e-6))


def _call(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    model(**inputs)
