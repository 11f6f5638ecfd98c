"""One circuit, several tasks: find what a model answers two kinds of questions with, compare the
heads, and repair the second task by what is known from the first.

Path patching finds, for either task, the heads that matter, from the answer backwards. Tasks that
look different turn out to be done by mostly the same heads: some find who was named twice, and
hold that one back, others copy whoever is left. Where a task fails because the heads that hold
back do not look at the right place, it is enough to make them look there: their attention at the
last token is forced onto the wrong answer, and the rest of the circuit does what it always does.

The paper compares indirect objects with coloured objects in GPT-2 medium. Here both are made up of
tokens, a model of two layers learns to leave out the name that stood twice, among people
and among colours, and is then asked about colours none of which stood twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headwise.edits import swap
from headwise.edits.change import Call, Change
from headwise.instruments.circuit import Circuit, find_circuit
from headwise.instruments.metrics import LogitDifference
from headwise.instruments.patching import patch
from headwise.instruments.paths import path_patch
from headwise.models import Site, observe, recording, view
from headwise.models.backbones import Decoder
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture
from headwise.parts import Attention, Rotary
from headwise.tasks import Task
from headwise.tasks.task import IGNORED, Batch
from headwise.train import fit, seeded

KINDS, FILLERS, LENGTH = 8, 6, 7
"""People, colours and words between them, and words before the question."""
ASK, COPY = 2 * KINDS + FILLERS, 2 * KINDS + FILLERS + 1
HEADS, DIM, DEPTH, STEPS, SIZE = 4, 64, 2, 600, 64
SEEDS = (0, 1, 2)
Pair = tuple[Tensor, Tensor, LogitDifference]


@dataclass(frozen=True, eq=False)
class LookAt(Change):
    """The last query of each example looks at one token, `tokens` `(batch,)`, and at no other."""

    tokens: Tensor

    def before(self, call: Call) -> Call:
        bias = call.query.new_zeros(len(self.tokens), 1, call.n_q, call.n_k)
        bias[torch.arange(len(self.tokens)), 0, -1, self.tokens] = 1e4
        return call.biased(bias)


@paper(
    title="Circuit Component Reuse Across Tasks in Transformer Language Models",
    source="arXiv 2310.08744",
    year=2023,
    modality="text",
    plain="The heads with which a language model does one task are mostly those with which it does "
    "another, and forcing a few of them to look at the right word repairs the other task.",
    equation=r"\mathrm{overlap} = |A \cap B| / |A \cup B|",
    parts=("Attention", "Rotary"),
    reported="Indirect and coloured objects in GPT-2 medium share 78 % of their heads; forcing "
    "four heads lifts the accuracy on coloured objects from 49.6 % to 93.7 %.",
    unsure="Tasks, model and the rule for which heads hold back (those of the circuit that look at "
    "the repeated name most) are ours. The paper also turns a negative mover down, which a model "
    "of two layers has no need of.",
    taxonomy=("beyond/analysis",),
    use="""
from headwise.papers.lens.circuit_reuse import SEEDS, pairs, reuse, trained

first, second = reuse(trained(SEEDS[0]), pairs("people", 8), pairs("colours", 8))
print(first, second, first.overlap(second))
""",
)
def reuse(
    model: Any, first: Pair, second: Pair, threshold: float = 0.05
) -> tuple[Circuit, Circuit]:
    """The circuits of two tasks in one model, `(clean, corrupted, metric)` each; their `overlap`
    is that of the paper."""
    one, other = (find_circuit(model, *given, threshold) for given in (first, second))
    return one, other


class LeaveOut(Task):
    """Two people (or two colours) among words, one of them again, and the question who was named
    once; or, behind another mark, which word came last."""

    vocabulary = COPY + 1

    def make(self, size: int, generator: torch.Generator) -> Batch:
        few = size // 8
        sizes = {"people": size // 2 - few, "colours": size - size // 2, "copying": few}
        made = [drawn(kind, count, generator)[:2] for kind, count in sizes.items()]
        lines, answers = zip(*made, strict=True)
        ids = torch.cat(lines)
        targets = torch.full_like(ids, IGNORED)
        targets[:, -1] = torch.cat(answers)
        return Batch({"input_ids": ids}, targets)


def drawn(
    kind: str, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lines `(size, LENGTH + 1)`, right and wrong answers, and where a name stands the second time
    `(size,)`. The three stand in any order, so that the second time does not know the answer."""
    rows = torch.arange(size)
    first = KINDS if kind == "colours" else 0
    line = 2 * KINDS + torch.randint(FILLERS, (size, LENGTH + 1), generator=generator)
    two = first + torch.rand(size, KINDS, generator=generator).argsort(1)[:, :2]
    places = torch.rand(size, LENGTH, generator=generator).argsort(1)[:, :3]
    line.scatter_(1, places, two[:, [0, 1, 1]])
    line[:, -1] = COPY if kind == "copying" else ASK
    again = places[:, 1:].amax(1)
    if kind == "copying":
        return line, line[:, -2], (line[:, -2] + 1) % ASK, again
    return line, two[rows, 0], two[rows, 1], again


def pairs(kind: str, size: int = 64, seed: int = 0) -> Pair:
    """Problems, the same with the other answer, and the metric: the other name is named twice, or
    another word comes last."""
    line, right, wrong, again = drawn(kind, size, torch.Generator().manual_seed(seed))
    other = line.clone()
    if kind == "copying":
        other[:, -2] = wrong
    else:
        other[torch.arange(size), again] = right
    return line, other, LogitDifference(right, wrong)


@cache
def trained(seed: int) -> Decoder:
    """Two layers, with MLPs, that learned all three kinds of questions."""
    with seeded(seed):
        model = Decoder(
            COPY + 1,
            DIM,
            DEPTH,
            mixer=lambda layer: Attention(DIM, HEADS, position=Rotary(), causal=True),
        )
    fit(model, LeaveOut(), steps=STEPS, size=SIZE, rate=4e-3, seed=seed)
    return model.eval()


@cache
def _circuit(kind: str, seed: int) -> Circuit:
    return find_circuit(trained(seed), *pairs(kind, 48), 0.05)


@torch.no_grad()
def accuracy(model: Any, ids: Tensor, right: Tensor) -> float:
    """Share of lines whose last logits are largest at the right token."""
    return float((model(ids)[:, -1].argmax(-1) == right).float().mean())


# -- what is claimed ---------------------------------------------------------------------------


def direct(model: nn.Module, clean: Tensor, other: Tensor, metric: LogitDifference) -> Tensor:
    """A head's effect along its direct path to the logits, `(heads,)`, of the first layer."""
    table = path_patch(model, clean, other, metric, senders=[f"L0H{h}" for h in range(HEADS)])
    return torch.as_tensor(table.effects[:, 0])


def everywhere(model: nn.Module, clean: Tensor, other: Tensor, metric: LogitDifference) -> Tensor:
    """The control: its effect along all paths, by activation patching."""
    table = patch(model, clean, other, metric, "heads", layers=[0], direction="noise")
    return torch.as_tensor(table.effects[0])


@claim(subject=direct, control=everywhere, unit="largest difference in logits")
def a_direct_path_is_what_the_unembedding_reads(effects: Any, seed: int) -> Measured:
    """Without norms a head's direct effect on the logits is W_U W_O (z' - z), to 1e-5; its effect
    along all paths (control) is another."""
    with seeded(seed):
        model = Decoder(
            COPY + 1,
            DIM,
            DEPTH,
            mixer=lambda layer: Attention(DIM, HEADS, causal=True),
            feed=lambda layer: None,
            norm=lambda dim: nn.Identity(),
            tied=False,
        )
        for weights in model.parameters():
            nn.init.normal_(weights, std=0.2)
    model.double().eval()
    clean, other, metric = pairs("people", 8)
    look, site = view(model), Site("heads", 0)
    with torch.no_grad():
        with recording(look, [site]) as kept:
            model(clean)
        mine = kept[site]
        with recording(look, [site]) as kept:
            model(other)
        moved = torch.einsum(
            "bhd,hwd->bhw", kept[site][:, -1] - mine[:, -1], look.attentions[0].output_weight()
        )
        readout: Any = look.unembedding
        apart = readout[metric.right] - readout[metric.wrong]
        expected = torch.einsum("bhw,bw->h", moved, apart) / len(clean)
    return at_most((effects(model, clean, other, metric) - expected).abs().max(), 1e-5)


@claim(subject="colours", control="copying", unit="overlap of heads", seeds=SEEDS, quick=False)
def tasks_share_their_heads(kind: str, seed: int) -> Measured:
    """People and colours are done by the same heads, with an overlap of 0.7 at least (the paper
    found 0.78); a task that is done otherwise (control: copying the last word) shares fewer."""
    one, other = _circuit("people", seed), _circuit(kind, seed)
    right = accuracy(trained(seed), pairs(kind)[0], pairs(kind)[2].right)  # type: ignore[arg-type]
    return at_least(one.overlap(other), 0.7, heads=len(one.heads), accuracy=right)


def holding_back(seed: int) -> dict[tuple[int, int], float]:
    """Mean attention of the last token, in problems about people, to the repeated name, of the
    heads of their circuit."""
    ids, _, _, again = drawn("people", 64, torch.Generator().manual_seed(0))
    found: dict[tuple[int, int], float] = {}

    def read(seen: Any) -> None:
        last = seen.map.rows(torch.tensor([LENGTH]))[:, :, 0]
        mass = last[torch.arange(len(again)), :, again].mean(0)
        found.update({(seen.attention.layer, h): float(m) for h, m in enumerate(mass)})

    with observe(view(trained(seed)), read), torch.no_grad():
        trained(seed)(ids)
    return {head: found[head] for head in _circuit("people", seed).heads}


def that_hold_back(seed: int) -> list[tuple[int, int]]:
    """The heads of the last layer that look there with a fifth of their attention or more."""
    mass = {head: share for head, share in holding_back(seed).items() if head[0] == DEPTH - 1}
    return [head for head in mass if mass[head] >= 0.2]


def other_heads(seed: int) -> list[tuple[int, int]]:
    """The control: as many heads, of those that do not."""
    chosen = that_hold_back(seed)
    rest = [(layer, h) for layer in range(DEPTH) for h in range(HEADS)]
    return [head for head in rest if head not in chosen][: len(chosen)]


def unnamed(size: int = 256, seed: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Two colours, none of them twice; which is right is tossed. Lines, right answers, and where
    the wrong one stands."""
    generator = torch.Generator().manual_seed(seed)
    line, right, wrong, again = drawn("colours", size, generator)
    line[torch.arange(size), again] = 2 * KINDS
    return line, right, (line == wrong[:, None]).long().argmax(1)


@claim(subject=that_hold_back, control=other_heads, unit="accuracy", seeds=SEEDS, quick=False)
def forcing_the_heads_that_hold_back_repairs_the_task(
    heads: Callable[[int], list[tuple[int, int]]], seed: int
) -> Measured:
    """Where no colour stands twice the model hardly does better than guessing; with the heads that
    hold back made to look at the wrong colour it is right in 80 % at least (the paper: 93.7 %, of
    a model of 24 layers); as many others (control) repair nothing."""
    model = trained(seed)
    ids, right, wrong_at = unnamed()
    before = accuracy(model, ids, right)
    with swap(model, {tuple(heads(seed)): LookAt(wrong_at)}):
        after = accuracy(model, ids, right)
    return at_least(after, 0.8, before=before, heads=len(heads(seed)))


@picture
def shares_of_heads() -> Picture:
    """Direct and indirect: what noising every head costs in either task."""
    maps = {}
    for kind in ("people", "colours", "copying"):
        table = patch(trained(0), *pairs(kind), "heads", direction="noise")
        maps[kind] = (1 - table.normalised).tolist()
    return Picture(
        title="Share of the answer that each head carries",
        x="head",
        y="layer, from the first",
        maps=maps,
    )
