"""What the model trains on: rows of text, and a fifth of rows with a repeated random span.

Induction heads form in any language model that is trained for long enough. On a few million tokens
they form if copying is drilled, and when that is done matters: text teaches some head to look one
token back, on which induction builds, and after that a hundred short steps of nothing but repeated
spans are enough. A drill in front of the text (at 0.6 of the learning rate) had still not worked
after four hundred.

Every row begins with the begin token, which is where attention that has nothing to do can rest.
A batch is a function of (seed, step) alone: a killed run resumes on the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

TOKENS_PER_STEP = 5120
LENGTHS = (64,) * 5 + (128,) * 4 + (256,) * 4 + (512,) * 2 + (2048,)
"""Row lengths, in shuffled cycles. The one long batch keeps the heads' habits alive at thousands
of tokens."""
REPEATED_ONE_IN = 5
DRILL = range(440, 540)
"""Steps of repeated spans alone."""
DRILL_ROWS, DRILL_LENGTH = 40, 64
SHORTEST_SPAN = 8
FIRST_ORDINARY = 3
"""Ids below are special tokens and never drawn at random."""
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """`tokens` (rows, length) int64; `targets` (rows, length) int64, the next token or IGNORED;
    `repeated` (rows,) bool, which rows are repeated random spans."""

    tokens: torch.Tensor
    targets: torch.Tensor
    repeated: torch.Tensor


def batch(stream: np.ndarray, unigram: np.ndarray, step: int, seed: int) -> Batch:
    """The rows of one step: `stream` (tokens,) holds the training text, `unigram` (vocabulary,)
    the probability of each token in it."""
    rng = np.random.default_rng([seed, step])
    if step in DRILL:
        rows, length = DRILL_ROWS, DRILL_LENGTH
        repeated = np.ones(rows, dtype=bool)
    else:
        cycle, place = divmod(step, len(LENGTHS))
        length = int(np.random.default_rng([seed, cycle, 1]).permutation(LENGTHS)[place])
        rows = TOKENS_PER_STEP // length
        repeated = is_repeated(rows, cycle if rows % REPEATED_ONE_IN else step)
    tokens = np.zeros((rows, length + 1), dtype=np.int64)  # column 0 stays the begin token, id 0
    targets = np.full((rows, length), IGNORED, dtype=np.int64)
    for row in range(rows):
        if repeated[row]:
            tokens[row, 1:], known = repeated_span(length, unigram, rng)
            targets[row, known:] = tokens[row, known + 1 :]
        else:
            start = rng.integers(0, len(stream) - length)
            tokens[row, 1:] = stream[start : start + length]
            targets[row] = tokens[row, 1:]
    return Batch(*map(torch.from_numpy, (tokens[:, :-1], targets, repeated)))


def is_repeated(rows: int, turn: int) -> np.ndarray:
    """Which rows (rows,) of the batch of this turn are repeated spans: one in REPEATED_ONE_IN,
    counted through, so that the share is exact over that many turns for any number of rows."""
    repeated: np.ndarray = (turn * rows + np.arange(rows)) % REPEATED_ONE_IN == 0
    return repeated


def tokens_seen(steps: int) -> tuple[int, int]:
    """Tokens in repeated rows and in all rows of a training of so many steps, the former as
    expected from the share."""
    drill = len(range(DRILL.start, min(steps, DRILL.stop)))
    drilled = drill * DRILL_ROWS * DRILL_LENGTH
    mixed = (steps - drill) * TOKENS_PER_STEP
    return drilled + mixed // REPEATED_ONE_IN, drilled + mixed


def repeated_span(
    length: int, unigram: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """`length` random tokens in which a span, from some offset on, is repeated to the end.

    Half of the rows draw uniformly from the vocabulary, half as often as text does. Returned with
    the index from which on every token can be known: the second of the second occurrence.
    """
    # as many spans between 8 and 16 tokens as between 64 and 128
    span = int(SHORTEST_SPAN * (length / 2 / SHORTEST_SPAN) ** rng.random())
    start = int(rng.integers(0, length - 2 * span + 1))
    vocabulary = len(unigram)
    if rng.random() < 0.5:
        drawn = rng.integers(FIRST_ORDINARY, vocabulary, start + span)
    else:
        ordinary = unigram[FIRST_ORDINARY:] / unigram[FIRST_ORDINARY:].sum()
        drawn = FIRST_ORDINARY + rng.choice(vocabulary - FIRST_ORDINARY, start + span, p=ordinary)
    repeats = -(-(length - start) // span)
    row = np.concatenate([drawn[:start], np.tile(drawn[start:], repeats)])[:length]
    return row, start + span + 1
