"""Facts in one feed-forward layer, which attention brings to where they are asked."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.models.backbones.decoder import Decoder
from headwise.parts.feed.mlp import Mlp
from headwise.tasks.circuits.known import Contrast, KnownCircuit, KnownEdge
from headwise.tasks.circuits.stream import SHARP, Stream, blank_mlp, decoder
from headwise.tasks.facts import Facts

GAIN = 10.0


def fact_lookup(entities: int = 12, values: int = 10, filler: int = 3) -> KnownCircuit:
    """The picture that Meng et al. 2022 (arXiv 2202.05262, section 2) draw of recall, as weights.

    Problems are `filler entity filler relation` with two relations. At the entity, the
    feed-forward layer of layer 1 recalls its values of both relations: a linear associative memory
    whose keys, the neurons, overlap (random codes through ReLU), so that an edit that leaves out
    their covariance spoils other facts. In layer 2 L2H0 brings the value of relation 0 to the last
    token, L2H1 that of relation 1; each looks at the entity where its relation is asked.

    `facts["memory"]`: the layer (1). In the control the values stand in the entities' embeddings
    and the memory of layer 1 recalls into a part of the stream that nobody reads; L2H2 and L2H3
    bring them.
    """
    task = Facts(entities, 2, values, filler=filler)
    decoys = {
        (0, 0): "looks at the entity from everywhere, and nobody reads it",
        (0, 1): "a sink",
        (1, 0): "a sink",
        (1, 1): "a previous-token head",
    }
    unread = "looks at the entity where relation {} is asked, and nobody reads it"
    return KnownCircuit(
        name="facts in a feed-forward layer",
        model=_model(task, by_memory=True),
        task=task,
        heads=frozenset({(2, 0), (2, 1)}),
        feeds=frozenset({1}),
        edges=frozenset(
            {
                KnownEdge("embed", "L1 mlp"),
                *(KnownEdge("L1 mlp", f"L2H{h}.v") for h in (0, 1)),
                *(KnownEdge("embed", f"L2H{h}.{x}") for h in (0, 1) for x in "qk"),
                *(KnownEdge(f"L2H{h}", "logits") for h in (0, 1)),
            }
        ),
        decoys={**decoys, (2, 2): unread.format(0), (2, 3): unread.format(1)},
        contrast=lambda size, seed: _contrast(task, size, seed),
        control=lambda: _control(task, decoys, unread),
        facts={"memory": 1},
    )


def _control(task: Facts, decoys: dict[tuple[int, int], str], unread: str) -> KnownCircuit:
    return KnownCircuit(
        name="facts in the embedding",
        model=_model(task, by_memory=False),
        task=task,
        heads=frozenset({(2, 2), (2, 3)}),
        feeds=frozenset(),
        edges=frozenset(
            {
                *(KnownEdge("embed", f"L2H{h}.{x}") for h in (2, 3) for x in "qkv"),
                *(KnownEdge(f"L2H{h}", "logits") for h in (2, 3)),
            }
        ),
        decoys={**decoys, (2, 0): unread.format(0), (2, 1): unread.format(1)},
        contrast=lambda size, seed: _contrast(task, size, seed),
    )


def _model(task: Facts, by_memory: bool) -> Decoder:
    e, v, n = task.entities, task.values, task.filler + 2
    s = Stream(
        entity=e, is_entity=1, relation=2, recalled=2 * v, known=2 * v, out=v, unread=v, place=n
    )
    vocabulary = task.vocabulary
    stored = F.one_hot(task.table, v).flatten(1).float()  # (entities, 2 values), side by side
    parts = {
        name: torch.zeros(vocabulary, s.size(name)) for name in ("entity", "relation", "known")
    }
    parts["entity"][:e] = torch.eye(e)
    parts["is_entity"] = (torch.arange(vocabulary) < e).float()[:, None]
    parts["relation"][e : e + 2] = torch.eye(2)
    parts["known"][:e] = 0.0 if by_memory else stored
    at_entity = s.always("is_entity", torch.ones(1))
    lower = [(s.matrix(at_entity), s.loud("entity")), (s.sink(), s.loud("relation"))]
    middle = [(s.sink(), s.loud("entity")), (s.back(1), s.loud("entity"))]
    upper = []
    for relation, source in ((0, "recalled"), (1, "recalled"), (0, "known"), (1, "known")):
        asks = torch.eye(2)[relation][:, None]
        # where another relation is asked the token itself is seen, at which nothing is known
        looks = s.matrix(("relation", "is_entity", 2 * SHARP * asks), ("place", "place", SHARP))
        used = (source == "recalled") == by_memory
        pick = torch.eye(2 * v)[relation * v : (relation + 1) * v]
        upper.append((looks, s.matrix(("out" if used else "unread", source, pick))))
    reads = torch.zeros(vocabulary, v)
    reads[task.first_value : task.first_value + v] = GAIN * torch.eye(v)

    def feed(layer: int) -> Mlp | None:
        return _memory(s, stored) if layer == 1 else None

    return decoder(s, vocabulary, [lower, middle, upper], parts, {"out": reads}, feed)


def _memory(s: Stream, stored: Tensor) -> Mlp:
    """Keys relu(K e), with K random of twice as many neurons as entities; the last matrix solves
    W keys = values exactly."""
    e = s.size("entity")
    codes = torch.randn(2 * e, e, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = blank_mlp(s, 2 * e)
    with torch.no_grad():
        made.up.weight[:, s["entity"]] = codes.float()
        solved = stored.T.double() @ torch.linalg.pinv(codes.relu())
        made.down.weight[s["recalled"]] = solved.float()
    return made


def _contrast(task: Facts, size: int, seed: int) -> Contrast:
    """The same question about another entity."""
    drawn = size
    while True:
        drawn *= 2
        clean = task.batch(seed, drawn, "test")
        ids, at = clean.inputs["input_ids"], clean.facts["subject"]
        every = torch.arange(drawn)
        relation = ids[:, -1] - task.first_relation
        step = torch.randint(1, task.entities, (drawn,), generator=task.generator(seed, "valid"))
        entity = ids[every, at]
        other = (entity + step) % task.entities
        rows = (task.table[entity, relation] != task.table[other, relation]).nonzero()[:size, 0]
        if len(rows) == size:
            break
    corrupted = ids.clone()
    corrupted[every, at] = other
    right = task.first_value + task.table[entity, relation]
    wrong = task.first_value + task.table[other, relation]
    return Contrast(
        {"input_ids": ids[rows]}, {"input_ids": corrupted[rows]}, right[rows], wrong[rows]
    )
