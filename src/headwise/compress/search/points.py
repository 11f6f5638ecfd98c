"""One model on the way: counted, timed and judged beside the original."""

from __future__ import annotations

from torch import nn

from headwise.compress.search.asking import Text
from headwise.compress.search.curve import Point
from headwise.compress.search.quality import measure_quality
from headwise.compress.search.targets import Limit
from headwise.compress.search.timing import median_seconds, share_of_time
from headwise.compress.structure.costs import Cost, cost
from headwise.compress.structure.walking import first_of


def point_of(
    model: nn.Module,
    original: nn.Module,
    first: Cost,
    text: Text,
    limit: Limit | None,
    repeats: int,
) -> tuple[Point, float]:
    """(point of the curve, seconds of a forward pass of the original). first: the original's
    costs; seconds are of one window of the held-out text, medians of `repeats`."""
    now = cost(model, text.tokens)
    found = measure_quality(model, original, text.held_out)
    one = first_of(text.held_out[0])
    if model is original:
        ratio, theirs = 1.0, median_seconds(model, one, repeats)
    else:
        ratio, _, theirs = share_of_time(model, original, one, repeats)
    left = {
        "params": now.parameters / first.parameters,
        "bytes": now.bytes / first.bytes,
        "flops": now.flops / first.flops,
        "time": ratio,
    }
    if first.cache_bytes_per_token:
        left["kv"] = now.cache_bytes_per_token / first.cache_bytes_per_token
    within = limit is None or limit.holds(found.loss, found.loss_change, found.agreement, found.kl)
    return Point(left, found, within=within), theirs
