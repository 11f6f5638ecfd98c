"""Seconds of two models on the same input, in turns, so that what the machine does meanwhile
falls on both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from headwise.instruments.examples import Examples


def share_of_time(
    changed: nn.Module, original: nn.Module, examples: Examples, repeats: int = 7
) -> tuple[float, float, float]:
    """(median of changed / original within a turn, median seconds of each): one forward pass, after
    one that does not count."""
    ratios, ours, theirs = [], [], []
    with torch.no_grad():
        for turn in range(-1, repeats):
            a = seconds(lambda: changed(**examples.given))
            b = seconds(lambda: original(**examples.given))
            if turn >= 0:
                ratios.append(a / b)
                ours.append(a)
                theirs.append(b)
    return statistics.median(ratios), statistics.median(ours), statistics.median(theirs)


def median_seconds(model: nn.Module, examples: Examples, repeats: int = 7) -> float:
    """Of one forward pass, after one that does not count."""
    with torch.no_grad():
        found = [seconds(lambda: model(**examples.given)) for _ in range(repeats + 1)]
    return statistics.median(found[1:])


def seconds(run: Callable[[], object]) -> float:
    """Of one call, all work on a GPU included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
