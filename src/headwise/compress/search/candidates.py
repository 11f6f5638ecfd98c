"""What could go next: heads, slices of channels, attentions, feed-forward parts, whole layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from headwise.compress.structure.costs import row_flops
from headwise.compress.structure.feeds import feed_forward
from headwise.models import AttentionView, LayerView, ModelView, Site, UnsupportedModelError
from headwise.models.projections import features_first
from headwise.models.sites import Write

KINDS = ("heads", "channels", "attention", "mlp", "layers")
SLICE = 16
"""A feed-forward part goes in so many slices."""
OFFERED = 3
"""Slices of one layer that can go in a round: prices of more would speak of another model."""


@dataclass(frozen=True)
class Candidate:
    """Something that can be taken out at once.

    kind: of `KINDS`. which: heads (of all that share one key-value head) or channels. parameters:
    how many go with it. work: multiplications a token that go with it, at the length that was
    asked about.
    """

    kind: str
    layer: int
    which: tuple[int, ...]
    parameters: int
    work: float
    parts: tuple[str, ...] = ("attention", "mlp")
    """Of a layer: those that it has, which all go with it."""

    def __str__(self) -> str:
        where = f"L{self.layer}"
        if self.kind == "heads":
            return " ".join(f"{where}H{head}" for head in self.which)
        if self.kind == "channels":
            return f"{where} {len(self.which)} channels"
        return where if self.kind == "layers" else f"{where} {self.kind}"

    def writes(self) -> dict[Site, Write]:
        """What takes it out of a run, the tensors as large as before: how its price is measured.
        Each write is handed the tensor at its site and changes it in place of a copy."""
        if self.kind in ("heads", "channels"):
            site = Site("heads" if self.kind == "heads" else "neurons", self.layer)
            return {site: lambda there: without(there, self.which)}
        kinds = self.parts if self.kind == "layers" else (self.kind,)
        return {Site(kind, self.layer): lambda there: there * 0 for kind in kinds}


def without(there: Tensor, which: Sequence[int]) -> Tensor:
    """`(batch, n, parts, ...)` with some parts nothing."""
    changed = there.clone()
    changed[:, :, list(which)] = 0
    return changed


def candidates(
    view: ModelView,
    kinds: Sequence[str],
    tokens: int,
    channel_scores: Mapping[int, Tensor] | None = None,
) -> list[Candidate]:
    """Everything of these kinds that can go, with what it saves.

    tokens: length of the inputs, for the work of attention. channel_scores: layer -> `(channels,)`;
    the slices of a layer that are candidates are those of its lowest scores. One group of heads of
    an attention, one slice of a feed-forward part, one attention and one feed-forward part always
    stay. Raises ValueError for kinds that are not in `KINDS`, UnsupportedModelError for a model of
    several stacks.
    """
    _check(view, kinds)
    parts = _parts(view, tokens)
    attentions = sum(bool(part.groups) for part in parts)
    feeds = sum(part.feeds for part in parts)
    found: list[Candidate] = []
    for part in parts:
        if "heads" in kinds and len(part.groups) > 1:
            found += part.groups
        if "attention" in kinds and part.groups and attentions > 1:
            found.append(Candidate("attention", part.layer, (), *part.attention))
        scores = (channel_scores or {}).get(part.layer)
        if "channels" in kinds and scores is not None:
            found += _slices(part, scores)
        if "mlp" in kinds and part.feeds and feeds > 1:
            found.append(Candidate("mlp", part.layer, (), *part.feed))
        last = (attentions == 1 and part.groups) or (feeds == 1 and part.feeds)
        has = (*(("attention",) if part.groups else ()), *(("mlp",) if part.feeds else ()))
        if "layers" in kinds and len(parts) > 1 and has and not last:
            both = [a + b for a, b in zip(part.attention, part.feed, strict=True)]
            found.append(Candidate("layers", part.layer, (), int(both[0]), both[1], has))
    return found


def removable(view: ModelView, kinds: Sequence[str], tokens: int) -> tuple[int, float]:
    """(parameters, multiplications a token) that can go at most, all rounds together."""
    _check(view, kinds)
    parts = _parts(view, tokens)
    heads = [1 / len(p.groups) if "heads" in kinds and p.groups else 1.0 for p in parts]
    channels = [1 / SLICE if "channels" in kinds and p.channels else 1.0 for p in parts]
    gone = []
    for unit in range(2):
        attention = [(p.attention[unit], left) for p, left in zip(parts, heads, strict=True)]
        feed = [(p.feed[unit], left) for p, left in zip(parts, channels, strict=True)]
        if {"attention", "mlp"} & set(kinds):
            gone.append(
                _most(attention, bool({"attention", "layers"} & set(kinds)))
                + _most(feed, bool({"mlp", "layers"} & set(kinds)))
            )
        else:  # attention and feed-forward part go together, and stay in the same layer
            both = [
                (a + f, (a * x + f * y) / max(a + f, 1))
                for (a, x), (f, y) in zip(attention, feed, strict=True)
            ]
            gone.append(_most(both, "layers" in kinds))
    return int(gone[0]), gone[1]


def _most(each: Sequence[tuple[float, float]], whole: bool) -> float:
    """What can go of parts (cost, share of it that stays where it is cut); `whole`: they can go as
    they are, all but the cheapest one to keep."""
    kept = [cost * left for cost, left in each if cost]
    if not kept:
        return 0.0
    return sum(cost for cost, _ in each) - (min(kept) if whole else sum(kept))


def in_words(chosen: Sequence[Candidate]) -> tuple[str, ...]:
    """What goes, layer by layer, the slices of one layer together."""
    channels: dict[int, int] = {}
    for one in chosen:
        if one.kind == "channels":
            channels[one.layer] = channels.get(one.layer, 0) + len(one.which)
    rest = sorted((one for one in chosen if one.kind != "channels"), key=lambda one: one.layer)
    return (
        *(str(one) for one in rest),
        *(f"L{layer} {count} channels" for layer, count in sorted(channels.items())),
    )


def sizes(view: ModelView) -> list[tuple[int, int]]:
    """(heads, channels) of every layer, 0 where a layer has no such part."""
    return [
        (sum(a.heads for a in layer.attentions if a.kind == "self"), _feed(layer)[1])
        for layer in view.layers
    ]


@dataclass(frozen=True)
class _Parts:
    """A layer's groups of heads, its channels (0 where they cannot be told apart, as of experts),
    and what its attention and its feed-forward part take: (parameters, multiplications)."""

    layer: int
    groups: list[Candidate]
    channels: int
    feed: tuple[int, float]

    @property
    def attention(self) -> tuple[int, float]:
        return sum(g.parameters for g in self.groups), sum(g.work for g in self.groups)

    @property
    def feeds(self) -> bool:
        return self.feed[0] > 0


def _parts(view: ModelView, tokens: int) -> list[_Parts]:
    found = []
    for layer in view.layers:
        own = [a for a in layer.attentions if a.kind == "self" and a.heads]
        groups = _groups(own[0], tokens) if own else []
        per_channel, channels = _feed(layer)
        feed = (per_channel * channels, float(per_channel * channels))
        if not channels and layer.mlp is not None:
            whole = {id(p): p.numel() for p in layer.mlp.parameters()}
            feed = (sum(whole.values()), row_flops(layer.mlp) / 2)
        found.append(_Parts(layer.index, groups, channels, feed))
    return found


def _slices(part: _Parts, scores: Tensor) -> list[Candidate]:
    """The channels of the lowest scores, a slice at a time; one slice always stays."""
    if not part.channels:
        return []
    size = -(-part.channels // SLICE)
    order, cost = scores.argsort().tolist(), part.feed[0] // part.channels * size
    count = min(OFFERED, (part.channels - 1) // max(1, size))
    return [
        Candidate("channels", part.layer, tuple(sorted(order[at : at + size])), cost, cost)
        for at in range(0, count * size, size)
    ]


def _check(view: ModelView, kinds: Sequence[str]) -> None:
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"kinds={list(kinds)}: expected some of {', '.join(KINDS)}")
    if len(view.stacks) > 1:
        raise UnsupportedModelError(
            f"{type(view.model).__name__} has the stacks {', '.join(view.stacks)}; the search "
            "works on models of one, compress.prune_heads and drop_layers on each of them"
        )


def _groups(attention: AttentionView, tokens: int) -> list[Candidate]:
    """Heads by key-value head: with a group its keys and values go, and the rest stays as it is."""
    query, key = attention.query_weight(), attention.key_weight()
    value, output = attention.value_weight(), attention.output_weight()
    seen = tokens / 2 if attention.causal else tokens
    found = []
    for group in range(attention.cached_heads):
        heads = tuple(h for h, read in enumerate(attention.key_value_of) if read == group)
        parameters = len(heads) * (query[0].numel() + output[0].numel())
        parameters += key[0].numel() + value[0].numel()
        mixing = len(heads) * seen * (query.shape[1] + value.shape[1])
        found.append(Candidate("heads", attention.layer, heads, parameters, parameters + mixing))
    return found


def _feed(layer: LayerView) -> tuple[int, int]:
    """(parameters of one channel, channels) of a plain feed-forward part, (0, 0) of another."""
    try:
        feed = feed_forward(layer)
    except UnsupportedModelError:
        return 0, 0
    matrices = (features_first(one) for one in (*feed.ups, feed.down))
    return sum(m.numel() for m in matrices) // max(1, feed.channels), feed.channels
