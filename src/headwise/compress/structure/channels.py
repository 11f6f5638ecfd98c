"""Channels of feed-forward parts that are gone: rows of what feeds them, columns of what reads
them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.compress.step import Step, take
from headwise.compress.structure.feeds import FeedForward, feed_forward, layers_of
from headwise.compress.structure.nothing import NoFeedForward
from headwise.compress.structure.real import real_tokens
from headwise.compress.structure.slicing import add_bias, keep_along, keep_columns, keep_rows
from headwise.compress.structure.surgery import put
from headwise.instruments.examples import model_view, read_examples
from headwise.instruments.run import evaluating
from headwise.models import ModelView, view
from headwise.models.projections import features_first
from headwise.models.sites import Site, recording


@dataclass(frozen=True)
class PruneChannels(Step):
    """Remove channels, (layer, (channel, ...)) with channels as numbered at that moment. `stack`:
    as `headwise.view` calls it. `bias`: give the down projections that lose channels a bias."""

    channels: tuple[tuple[int, tuple[int, ...]], ...]
    stack: str | None = None
    bias: bool = False

    def apply(self, model: nn.Module) -> None:
        for feed, kept in _planned(view(model), self):
            _cut(feed, kept, self.bias, model)


def prune_channels(
    model: nn.Module | ModelView,
    channels: Mapping[int, Iterable[int]] | float,
    *,
    stack: str | None = None,
    how: str = "zero",
    inputs: Any = None,
    multiple: int = 1,
    **reading: Any,
) -> None:
    """Take channels out of feed-forward parts for good, in place: the model gives what it gave
    with them set to zero, and computes and stores less.

        prune_channels(model, {3: [0, 7, 11]})
        prune_channels(model, 0.25, inputs=texts, tokenizer=tokenizer)

    channels: layer -> channels that go; or a share of every layer's, those with the lowest
    `channel_scores` on `inputs` (in the forms of `headwise.see`). multiple: with a share, as many
    channels stay as are a multiple of this (matrix products like 8 or 16). how: "zero", or "mean"
    to fold what the removed ones gave on average over `inputs` into the bias of the down
    projection, which gets one if it had none. stack: needed where the model has several.

    Raises ValueError for layers and channels that are not there, UnsupportedModelError where the
    matrices were not found; the model is then as it was.
    """
    look = model_view(model)
    if how not in ("zero", "mean"):
        raise ValueError(f"how={how!r}: expected 'zero' or 'mean'")
    by_share = not isinstance(channels, Mapping)
    if (by_share or how == "mean") and inputs is None:
        raise ValueError("a share of the channels, and how='mean', are measured: give inputs=")
    layers_of(look, stack)
    examples = None if inputs is None else read_examples(look.model, inputs, **reading)
    if isinstance(channels, Mapping):
        chosen = {int(at): sorted({int(c) for c in some}) for at, some in channels.items()}
    else:
        if not 0 <= channels < 1:
            raise ValueError(f"a share of {channels}: expected 0 or more and less than 1")
        scores = _scores(look, stack, examples or [], how)
        chosen = {at: _lowest(score, channels, multiple) for at, score in scores.items()}
    rows = tuple((at, tuple(some)) for at, some in sorted(chosen.items()) if some)
    step = PruneChannels(rows, stack, how == "mean")
    plans = _planned(look, step)
    constants: list[Tensor] = []
    if how == "mean":
        means = _moments(look, stack, examples or [])
        for feed, _ in plans:
            some = chosen[feed.layer.index]
            weight = features_first(feed.down).detach()[:, some].double()
            constants.append(weight @ means[feed.layer.index][0][some])
    take(look.model, step)
    for (feed, _), constant in zip(plans, constants, strict=bool(constants)):
        with torch.no_grad():
            assert isinstance(feed.down.bias, Tensor)
            feed.down.bias += constant.to(feed.down.bias)


def channel_scores(
    model: nn.Module | ModelView,
    inputs: Any,
    *,
    stack: str | None = None,
    how: str = "zero",
    **reading: Any,
) -> dict[int, Tensor]:
    """What each channel gives to the residual, by layer: `(channels,)`, float64.

    "zero": |W_down[:, c]| times the root mean square of the channel over the real tokens of
    `inputs`, which is the root mean square of what the residual loses with the channel (weight
    times activation norm, Wanda: Sun et al. 2023, arXiv 2306.11695, eq. 1, gathered over the
    column). "mean": with the standard deviation instead, which is what it loses when the mean is
    folded into the bias (FLAP: An et al. 2023, arXiv 2312.11983, eq. 6).
    """
    look = model_view(model)
    if how not in ("zero", "mean"):
        raise ValueError(f"how={how!r}: expected 'zero' or 'mean'")
    layers_of(look, stack)
    return _scores(look, stack, read_examples(look.model, inputs, **reading), how)


def _scores(look: ModelView, stack: str | None, examples: list[Any], how: str) -> dict[int, Tensor]:
    moments = _moments(look, stack, examples)
    found = {}
    for layer in layers_of(look, stack):
        if layer.index in moments:
            mean, square = moments[layer.index]
            size = square if how == "zero" else (square - mean**2).clamp(min=0)
            weight = features_first(feed_forward(layer).down).detach().double()
            found[layer.index] = weight.norm(dim=0) * size.sqrt()
    return found


def _moments(
    look: ModelView, stack: str | None, examples: list[Any]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Mean and mean square of every channel over the real tokens, by layer."""
    layers = [layer for layer in layers_of(look, stack) if layer.mlp_ends]
    several = len(look.stacks) > 1
    sites = {
        layer: Site("neurons", layer.index, layer.stack if several else None) for layer in layers
    }
    sums: dict[int, list[Any]] = {layer.index: [0, 0, 0.0] for layer in layers}
    with evaluating(look.model), torch.no_grad(), recording(look, sites.values()) as seen:
        for batch in examples:
            look.model(**batch.given)
            for layer, site in sites.items():
                out = seen[site].double()  # (batch, n, channels), or flattened
                shape = out.shape[:2] if out.dim() == 3 else (len(out),)
                real = real_tokens(batch.given, layer.stack, shape).to(out)
                flat, weights = out.flatten(0, -2), real.flatten()
                total = sums[layer.index]
                total[0] = total[0] + weights @ flat
                total[1] = total[1] + weights @ flat**2
                total[2] += float(weights.sum())
    return {at: (m / max(1.0, n), s / max(1.0, n)) for at, (m, s, n) in sums.items()}


def _lowest(scores: Tensor, share: float, multiple: int) -> list[int]:
    stay = round(len(scores) * (1 - share))
    stay = min(len(scores), max(multiple, round(stay / multiple) * multiple))
    return sorted(scores.argsort()[: len(scores) - stay].tolist())


def _planned(look: ModelView, step: PruneChannels) -> list[tuple[FeedForward, list[int]]]:
    layers = {layer.index: layer for layer in layers_of(look, step.stack)}
    given = dict(step.channels)
    plans = []
    for at, removed in step.channels:
        if at not in layers:
            raise ValueError(f"layer {at}: this stack has layers 0 to {max(layers)}")
        feed = feed_forward(layers[at])
        wrong = [c for c in removed if not 0 <= c < feed.channels]
        if wrong:
            raise ValueError(
                f"layer {at} has channels 0 to {feed.channels - 1}; it has no channel {wrong[0]}"
            )
        feed.check_sliceable()
        same = [i for i, one in layers.items() if one.module is layers[at].module]
        if len(same) > 1 and any(given.get(i) != removed for i in same):
            raise ValueError(
                f"layers {', '.join(map(str, same))} run the same feed-forward part: name the same "
                "channels in all of them"
            )
        if at == same[0]:
            gone = set(removed)
            plans.append((feed, [c for c in range(feed.channels) if c not in gone]))
    return plans


def _cut(feed: FeedForward, kept: list[int], bias: bool, model: nn.Module) -> None:
    if bias:
        add_bias(feed.down, features_first(feed.down).shape[0])
    if not kept and feed.layer.mlp is not None:
        had: Any = getattr(feed.down, "bias", None)
        nothing = NoFeedForward.of(feed.layer.mlp)
        nothing.bias = had  # the same parameter, so that a constant can still be added to it
        put(model, feed.layer.mlp, nothing)
        return
    for up in feed.ups:
        keep_rows(up, feed.rows(up, kept))
    keep_columns(feed.down, kept)
    if feed.thresholds is not None:
        keep_along(feed.thresholds, "thresholds", kept, 0)
    feed.say_count(len(kept))
