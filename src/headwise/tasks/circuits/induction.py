"""Two layers that continue a repetition: a previous-token head, then an induction head."""

from __future__ import annotations

import torch

from headwise.models.backbones.decoder import Decoder
from headwise.tasks.circuits.known import Contrast, KnownCircuit, KnownEdge
from headwise.tasks.circuits.stream import LOUD, SHARP, Stream, decoder
from headwise.tasks.repeat import Repeat

GAIN = 10.0
"""Logit of the answer."""
DECOYS = {
    (0, 0): "a sink: all weight on the first token, the largest output",
    (0, 2): "a second previous-token head, whose output nobody reads",
    (0, 3): "looks everywhere alike and adds the same to all logits",
    (1, 0): "a sink",
    (1, 1): "an induction head by its pattern, whose output nobody reads",
    (1, 3): "looks at the token itself",
}


def induction(length: int = 8, vocabulary: int = 16) -> KnownCircuit:
    """Olsson et al. 2022 (arXiv 2209.11895) as weights: L0H1 writes down which token stood before;
    L1H2 looks for the place before which the current token stood, and copies what stands there.

    The previous-token head reaches the induction head through its keys alone (K-composition,
    Elhage et al. 2021). The control copies from `length - 1` tokens back, with L1H3, by position;
    L0H1, L1H1 and L1H2 have the same patterns as in the circuit.
    """
    task = Repeat(length=length, vocabulary=vocabulary)
    return KnownCircuit(
        name="induction",
        model=_model(task, by_content=True),
        task=task,
        heads=frozenset({(0, 1), (1, 2)}),
        feeds=frozenset(),
        edges=frozenset(
            {
                KnownEdge("embed", "L0H1.v"),
                KnownEdge("L0H1", "L1H2.k"),
                KnownEdge("embed", "L1H2.q"),
                KnownEdge("embed", "L1H2.k"),  # not the place of the same token
                KnownEdge("embed", "L1H2.v"),
                KnownEdge("L1H2", "logits"),
            }
        ),
        decoys=DECOYS,
        contrast=lambda size, seed: _contrast(task, size, seed, swap_before=True),
        control=lambda: _control(task),
    )


def _control(task: Repeat) -> KnownCircuit:
    decoys = {head: what for head, what in DECOYS.items() if head != (1, 3)}
    return KnownCircuit(
        name="induction by position",
        model=_model(task, by_content=False),
        task=task,
        heads=frozenset({(1, 3)}),
        feeds=frozenset(),
        edges=frozenset({KnownEdge("embed", "L1H3.v"), KnownEdge("L1H3", "logits")}),
        decoys={
            **decoys,
            (0, 1): "a previous-token head that L1H2 reads",
            (1, 2): "an induction head by its pattern, whose output nobody reads",
        },
        contrast=lambda size, seed: _contrast(task, size, seed, swap_before=False),
    )


def _model(task: Repeat, by_content: bool) -> Decoder:
    vocabulary, first = task.vocabulary, task.length + task.gap
    s = Stream(
        token=vocabulary,
        before=vocabulary,
        out=vocabulary,
        unread=vocabulary,
        place=first + task.length,
    )
    loud, copy = s.loud("token"), s.matrix(("out", "token", 1.0))
    to_all = s.matrix(("out", "token", LOUD * torch.ones(vocabulary, vocabulary)))
    # the first token has no token before it, and sees itself: own tokens are marked down
    match = s.matrix(("token", "before", SHARP), ("token", "token", -SHARP))
    lower = [
        (s.sink(), 2 * loud),
        (s.back(1), s.matrix(("before", "token", 1.0))),
        (s.back(1), loud),
        (s.matrix(), to_all),
    ]
    upper = [
        (s.sink(), 2 * loud),
        (match, loud),
        (match, copy if by_content else loud),
        (s.back(0), loud) if by_content else (s.back(first - 1), copy),
    ]
    eye = torch.eye(vocabulary)
    return decoder(s, vocabulary, [lower, upper], {"token": eye}, {"out": GAIN * eye})


def _contrast(task: Repeat, size: int, seed: int, swap_before: bool) -> Contrast:
    """Half of the second copy is shown. Corrupted, the last token of it and one that has not come
    yet have changed their places in the first copy, so that another token follows; or, for models
    that go by position, what follows them has."""
    ids = task.batch(seed, size, "test").inputs["input_ids"]
    shown = task.length // 2
    clean = ids[:, : task.length + task.gap + shown]
    one, other = (shown - 1, shown + 1) if swap_before else (shown, shown + 2)
    corrupted = clean.clone()
    corrupted[:, one], corrupted[:, other] = clean[:, other], clean[:, one]
    wrong = clean[:, other + 1] if swap_before else clean[:, other]
    return Contrast({"input_ids": clean}, {"input_ids": corrupted}, clean[:, shown], wrong)
