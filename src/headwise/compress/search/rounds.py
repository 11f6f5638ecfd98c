"""One round of a search: which candidates go, taking them out for good, making up for them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from headwise.compress.search.asking import Text
from headwise.compress.search.candidates import Candidate
from headwise.compress.structure.channels import prune_channels
from headwise.compress.structure.heads import prune_heads
from headwise.compress.structure.layers import drop_layers
from headwise.compress.structure.recovery import compensate
from headwise.models import ModelView, UnsupportedModelError

WHOLE = ("attention", "mlp", "layers")
"""Kinds of which one goes in a round: two together cost more than the sum of their prices."""


def saved(candidate: Candidate, what: str) -> float:
    """What goes with a candidate, in parameters, or in multiplications a token for time."""
    return candidate.parameters if what == "params" else candidate.work


def pick(
    given: Sequence[Candidate], prices: Tensor, what: str, need: float, view: ModelView
) -> list[Candidate]:
    """The candidates that cost least for what they save, until `need` is saved; fewer where there
    are no more. Of `WHOLE` at most one; nothing that another one takes out already."""
    order = sorted(
        range(len(given)), key=lambda n: float(prices[n]) / max(saved(given[n], what), 1.0)
    )
    groups = {a.layer: a.cached_heads for a in view.attentions}
    chosen: list[Candidate] = []
    left = need
    for number in order:
        one = given[number]
        if left <= 0:
            break
        same = [other for other in chosen if other.layer == one.layer]
        if one.kind in WHOLE and (same or any(other.kind in WHOLE for other in chosen)):
            continue
        if any(other.kind in WHOLE and _covers(other.kind, one.kind) for other in same):
            continue
        if one.kind == "heads":
            gone = sum(other.kind == "heads" for other in same)
            if gone + 1 >= groups[one.layer]:
                continue  # the last one stays
        chosen.append(one)
        left -= saved(one, what)
    return chosen


def take_out(model: nn.Module, chosen: Sequence[Candidate]) -> None:
    """Slice the tensors; the model afterwards is smaller, and remembers the steps."""
    heads = [(c.layer, head) for c in chosen if c.kind == "heads" for head in c.which]
    if heads:
        prune_heads(model, heads)
    channels: dict[int, list[int]] = {}
    for one in chosen:
        if one.kind == "channels":
            channels.setdefault(one.layer, []).extend(one.which)
    if channels:
        prune_channels(model, channels)
    for kind in WHOLE:  # layers last: they change the numbers of others
        layers = [c.layer for c in chosen if c.kind == kind]
        if layers:
            drop_layers(model, layers, parts="layer" if kind == "layers" else kind)


def recover(model: nn.Module, original: nn.Module, text: Text, layers: Sequence[int]) -> None:
    """Fit the matrices that are left to what the original gave on the calibration text. layers:
    which of the original's each layer that is left was."""
    few = [batch.inputs for batch in text.few]
    try:
        compensate(model, original, text.given, few, layers=layers)
    except UnsupportedModelError:  # post-norm: attention and MLP do not add up
        compensate(model, original, text.given, few, target="output", layers=layers)


def _covers(taken: str, other: str) -> bool:
    return taken == "layers" or {"heads": "attention", "channels": "mlp"}.get(other) == taken
