"""Three layers that name the indirect object: duplicate token, inhibition, name mover."""

from __future__ import annotations

import torch

from headwise.models.backbones.decoder import Decoder
from headwise.parts.feed.mlp import Mlp
from headwise.tasks.circuits.known import Contrast, KnownCircuit, KnownEdge
from headwise.tasks.circuits.stream import LOUD, SHARP, Stream, blank_mlp, decoder
from headwise.tasks.indirect_objects import IndirectObjects

NAMES = ("Ada", "Bo", "Cy", "Di", "Ed", "Fay", "Gil", "Hal")
GAIN = 10.0
DECOYS = {
    (0, 1): "a sink",
    (1, 1): "a second inhibition head, whose output nobody reads",
    (1, 2): "a previous-token head",
    (2, 0): "a second name mover that looks at the right name, whose output nobody reads",
    (2, 2): "looks at all names alike and adds the same to all logits",
}


def indirect_object(names: tuple[str, ...] = NAMES) -> KnownCircuit:
    """The backbone of the circuit that Wang et al. 2022 (arXiv 2211.00593) found in GPT-2 small.

    L0H2 (duplicate token) stands at a name, finds the same name earlier and writes down which;
    L1H0 (inhibition) stands at the last "to", finds the duplicated name by that (keys) and brings
    it (values); L2H1 (name mover) stands there too, looks at all names but the one that was
    brought (queries), and copies what it sees to the logits. There are no backups.

    The control counts: L0H0 looks at all names alike, the feed-forward layer of layer 0 turns
    how often a name was seen into a logit that is highest for once. The three heads of the circuit
    have the same patterns in it, and nobody reads them.
    """
    task = IndirectObjects(names)
    return KnownCircuit(
        name="indirect object",
        model=_model(task, by_inhibition=True),
        task=task,
        heads=frozenset({(0, 2), (1, 0), (2, 1)}),
        feeds=frozenset(),
        edges=frozenset(
            {
                KnownEdge("embed", "L0H2.q"),
                KnownEdge("embed", "L0H2.k"),
                KnownEdge("embed", "L0H2.v"),
                KnownEdge("embed", "L1H0.q"),
                KnownEdge("L0H2", "L1H0.k"),
                KnownEdge("L0H2", "L1H0.v"),
                KnownEdge("embed", "L2H1.q"),
                KnownEdge("L1H0", "L2H1.q"),
                KnownEdge("embed", "L2H1.k"),
                KnownEdge("embed", "L2H1.v"),
                KnownEdge("L2H1", "logits"),
            }
        ),
        decoys={**DECOYS, (0, 0): "looks at all names alike, and nobody reads it"},
        contrast=lambda size, seed: _contrast(task, size, seed),
        control=lambda: _control(task),
    )


def _control(task: IndirectObjects) -> KnownCircuit:
    return KnownCircuit(
        name="indirect object by counting",
        model=_model(task, by_inhibition=False),
        task=task,
        heads=frozenset({(0, 0)}),
        feeds=frozenset({0}),
        edges=frozenset(
            {
                KnownEdge("embed", "L0H0.k"),
                KnownEdge("embed", "L0H0.v"),
                KnownEdge("L0H0", "L0 mlp"),
                KnownEdge("L0 mlp", "logits"),
            }
        ),
        decoys={
            **DECOYS,
            (0, 2): "a duplicate-token head that L1H0 reads",
            (1, 0): "an inhibition head that L2H1 reads",
            (2, 1): "a name mover that looks at the right name, whose output nobody reads",
        },
        contrast=lambda size, seed: _contrast(task, size, seed),
    )


def _model(task: IndirectObjects, by_inhibition: bool) -> Decoder:
    vocabulary, count, n = task.vocabulary, len(task.names), task.length
    # word: whether it is a name, whether it is "to"
    s = Stream(
        **dict.fromkeys(("name", "twice", "held", "seen", "out", "unread"), count),
        **{"word": 2, "level": 1, "place": n},
    )
    is_name, is_to = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    any_name = s.always("word", is_name)
    first = s.always("place", torch.eye(n)[0])  # never a name: what heads see that find nothing
    same = s.matrix(("name", "name", 2 * SHARP), ("place", "place", -2 * SHARP), first)
    marked = s.matrix(("word", "twice", 2 * SHARP * is_to[:, None] * torch.ones(count)))
    free = s.matrix(
        ("word", "word", 2 * SHARP * is_to[:, None] * is_name), ("held", "name", -SHARP)
    )
    copy, loud = s.matrix(("out", "name", 1.0)), s.loud("name")
    counted = s.matrix(("seen", "name", 1.0))
    to_all = s.matrix(("level", "name", LOUD * torch.ones(1, count)))
    lower = [
        (s.matrix(any_name), loud if by_inhibition else counted),
        (s.sink(), s.loud("word", 2 * LOUD)),
        (same, s.matrix(("twice", "name", 1.0))),
    ]
    middle = [
        (marked, s.matrix(("held", "twice", 1.0))),
        (marked, s.loud("twice")),
        (s.back(1), loud),
    ]
    upper = [
        (free, loud),
        (free, copy if by_inhibition else loud),
        (s.matrix(any_name), to_all),
    ]
    people = [task.ids[name] for name in task.names]
    names, words, out = (torch.zeros(vocabulary, size) for size in (count, 2, count))
    names[people], words[people] = torch.eye(count), is_name
    words[task.ids["to"]] = is_to
    out[people] = GAIN * torch.eye(count)

    def feed(layer: int) -> Mlp | None:
        return None if by_inhibition or layer else _once(s)

    embedding = {"name": names, "word": words}
    reads = {"out": out, "level": torch.ones(vocabulary, 1)}
    return decoder(s, vocabulary, [lower, middle, upper], embedding, reads, feed)


def _once(s: Stream) -> Mlp:
    """Name by name 1 for a third of the weight, 0 for none and for two thirds: a text names three
    times somebody."""
    count = s.size("seen")
    made = blank_mlp(s, 2 * count)
    with torch.no_grad():
        made.up.weight[:, s["seen"]] = torch.eye(count).repeat(2, 1)
        made.up.bias[count:] = -1 / 3
        made.down.weight[s["out"]] = torch.cat([3 * torch.eye(count), -6 * torch.eye(count)], 1)
    return made


def _contrast(task: IndirectObjects, size: int, seed: int) -> Contrast:
    """Sentences of one length; corrupted, the third mention is of the other person."""
    rows: list[int] = []
    drawn = size
    while len(rows) < size:
        drawn *= 2
        batch = task.batch(seed, drawn, "test")
        ids, facts = batch.inputs["input_ids"], batch.facts
        rows = (facts["template"] == 0).nonzero()[:size, 0].tolist()
    clean, right, wrong = ids[rows], facts["answer"][rows], facts["wrong"][rows]
    clean = clean[:, : int((clean[0] != 0).sum())]
    giver = clean.shape[1] - 1 - (clean == wrong[:, None]).flip(1).long().argmax(1)
    corrupted = clean.clone()
    corrupted[torch.arange(size), giver] = right
    return Contrast({"input_ids": clean}, {"input_ids": corrupted}, right, wrong)
