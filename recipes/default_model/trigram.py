"""The baseline to be beaten: an interpolated trigram model with modified Kneser-Ney smoothing.

Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1998),
equations 26 and 27: every order gives up a discount D(c) of each count c, estimated from the
counts of counts, and the mass that it gives up goes to the order below, whose counts are in how
many different contexts a token was seen. Below the unigrams stands the uniform distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ORDER = 3


@dataclass(frozen=True)
class Level:
    """One order. An n-gram is coded as the number whose digits, in base `vocabulary`, are its
    tokens; all arrays are sorted by code."""

    grams: np.ndarray  # (kinds,) int64
    shares: np.ndarray  # (kinds,) float64: discounted count over the total of its context
    contexts: np.ndarray  # (contexts,) int64: the n-gram without its last token
    reserved: np.ndarray  # (contexts,) float64: mass left to the order below


class Trigram:
    """Counts of `stream` (tokens,), ids below `vocabulary`; every distribution sums to one."""

    def __init__(self, stream: np.ndarray, vocabulary: int) -> None:
        if len(stream) < ORDER:
            raise ValueError(f"a trigram model needs at least {ORDER} tokens, got {len(stream)}")
        self.vocabulary = vocabulary
        tokens = stream.astype(np.int64)
        codes = (tokens[:-2] * vocabulary + tokens[1:-1]) * vocabulary + tokens[2:]
        grams, counts = np.unique(codes, return_counts=True)
        levels = [_level(grams, counts, vocabulary)]
        for length in range(ORDER - 1, 0, -1):
            # without the first token; how many n-grams one longer end in this one
            grams, counts = np.unique(grams % vocabulary**length, return_counts=True)
            levels.append(_level(grams, counts, vocabulary))
        self.levels = tuple(reversed(levels))

    def probability(self, before: np.ndarray, last: np.ndarray, token: np.ndarray) -> np.ndarray:
        """P(token | before, last), elementwise on integer arrays of one shape, as float64."""
        before, last, token = (np.asarray(a, dtype=np.int64) for a in (before, last, token))
        contexts = (np.zeros_like(last), last, before * self.vocabulary + last)
        result = np.full(token.shape, 1.0 / self.vocabulary)
        for level, context in zip(self.levels, contexts, strict=True):
            share = _find(level.grams, level.shares, context * self.vocabulary + token, 0.0)
            result = share + _find(level.contexts, level.reserved, context, 1.0) * result
        return result

    def loss(self, stream: np.ndarray) -> float:
        """Mean of -log P in nats a token over `stream` from its third token on, every token with
        its two true predecessors."""
        return float(-np.log(self.probability(stream[:-2], stream[1:-1], stream[2:])).mean())


def _level(grams: np.ndarray, counts: np.ndarray, vocabulary: int) -> Level:
    discount = discounts(counts)[np.minimum(counts, 3)]
    contexts, place = np.unique(grams // vocabulary, return_inverse=True)
    totals = np.bincount(place, weights=counts)
    reserved = np.bincount(place, weights=discount) / totals
    return Level(grams, (counts - discount) / totals[place], contexts, reserved)


def discounts(counts: np.ndarray) -> np.ndarray:
    """D(0..3), the last for three and more, from the counts of counts (equation 26); 3/4 of a
    count where too few n-grams were seen to estimate them."""
    seen = np.bincount(np.minimum(counts, 5), minlength=5)[1:5].astype(float)
    if (seen == 0).any():
        return np.array([0.0, 0.75, 0.75, 0.75])
    y = seen[0] / (seen[0] + 2 * seen[1])
    estimated = [c - (c + 1) * y * seen[c] / seen[c - 1] for c in (1, 2, 3)]
    return np.array([0.0, *np.clip(estimated, 0.05, (1.0, 2.0, 3.0))])


def _find(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, default: float) -> np.ndarray:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], default)
