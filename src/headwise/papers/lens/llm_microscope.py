"""How much a token remembers, and how straight its way through the layers is.

The kit measures, for every token: how well the text before it can be told from its hidden states
alone (contextualization: a small adapter pools the states over layers and reads the prefix out of
them), how far each layer is one linear map (linearity, and each token's distance from that map),
and how many dimensions the states fill. It finds that small tokens, full stops, commas and
articles, hold the most context, and that models lose when these are taken away.

Here is the smallest text in which that must be so: segments of three symbols end in a separator,
and a question about a segment may look at separators only. In the control the same text may be
looked at freely, and separators are as idle as they seem.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.instruments.dimension import effective_rank, two_nn
from headwise.instruments.examples import model_view
from headwise.instruments.hiding import hidden
from headwise.instruments.linearity import Linearity, linearity
from headwise.maps import Causal, Pattern
from headwise.maps.masks import Predicate
from headwise.models import view
from headwise.models.backbones import Decoder
from headwise.models.sites import recording, sites_of
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture, within
from headwise.parts import Attention
from headwise.parts.position.absolute import Learned
from headwise.tasks.task import IGNORED, Batch, Task
from headwise.train import fit, seeded


class Adapter(nn.Module):
    """One token's states `(..., layers + 1, width)` to logits `(..., count, vocabulary)` of the
    tokens before it: pooled over layers with learned weights, then an MLP."""

    def __init__(self, layers: int, width: int, count: int, vocabulary: int) -> None:
        super().__init__()
        self.weights, self.count = nn.Parameter(torch.zeros(layers)), count
        self.read = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 96), nn.GELU(), nn.Linear(96, count * vocabulary)
        )

    def forward(self, states: Tensor) -> Tensor:
        pooled = (states * self.weights.softmax(0)[:, None]).sum(-2)
        found: Tensor = self.read(pooled).unflatten(-1, (self.count, -1))
        return found


@paper(
    title="LLM-Microscope: Uncovering the Hidden Role of Punctuation in Context Memory of "
    "Transformers",
    source="arXiv 2502.15007",
    year=2025,
    modality="text",
    plain="What a token's hidden states say about the text before it, how linear its way through "
    "the layers is, and how many dimensions the states fill.",
    equation=r"C_i = -\log p(x_{<i} \mid h_i^{0..L}), \quad \mathrm{linearity}_l = 1 - \min_A "
    r"\| \tilde X_l A - \tilde X_{l+1} \|_F^2",
    parts=("Attention",),
    reported="Removing stop words, articles and commas lowers accuracy on MMLU and BABILong-4k, "
    "also where a strong model says they are irrelevant.",
    unsure="The paper's adapter feeds a language model that writes the prefix; random symbols "
    "leave it nothing to add, so the three symbols before a token are read at once. That more "
    "contextual tokens are more linear, as the paper finds in large models, is not claimed here.",
    taxonomy=("beyond/analysis",),
    use="""
from headwise.papers.lens.llm_microscope import contextualization, text, trained

found = contextualization(trained("separators", 0), text())  # position -> share told right
""",
)
def contextualization(model: nn.Module, task: Segments, steps: int = 300) -> dict[int, float]:
    """Position -> share of the last three symbols before it that an adapter reads from its states,
    on examples that it was not trained on."""
    return dict(zip(task.places, _contextualization(model, task, steps), strict=True))


# -- text in segments ------------------------------------------------------------------------------

SYMBOLS, LENGTH, SEGMENTS, DIM = 8, 3, 3, 48
SEPARATOR, QUESTION = SYMBOLS, SYMBOLS + 1
TEXT = SEGMENTS * (LENGTH + 1)


class Segments(Task):
    """Three segments of three symbols, each with a separator behind; then the number of a segment,
    whose symbols are asked. Chance 1 in 8."""

    vocabulary = SYMBOLS + 1 + SEGMENTS
    content = tuple(i for i in range(TEXT) if i % (LENGTH + 1) < LENGTH)
    separators = tuple(i for i in range(TEXT) if i % (LENGTH + 1) == LENGTH)
    places = tuple(range(LENGTH, TEXT))  # with three symbols before them

    def make(self, size: int, generator: torch.Generator) -> Batch:
        symbols = torch.randint(SYMBOLS, (size, SEGMENTS, LENGTH), generator=generator)
        ends = torch.full((size, SEGMENTS, 1), SEPARATOR)
        asked = torch.randint(SEGMENTS, (size, 1), generator=generator)
        answer = symbols[torch.arange(size), asked[:, 0]]
        body = torch.cat([symbols, ends], -1).flatten(1)
        ids = torch.cat([body, QUESTION + asked, answer[:, :-1]], 1)
        ignored = torch.full((size, TEXT), IGNORED)
        return Batch({"input_ids": ids}, torch.cat([ignored, answer], 1))


def text() -> Segments:
    return Segments()


def _through_separators(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
    segment, both = LENGTH + 1, (i < TEXT) & (j < TEXT)
    same = both & (i // segment == j // segment)
    separator = (j < TEXT) & (j % segment == LENGTH)
    return same | separator | ((i >= TEXT) & (j >= TEXT))


PATTERNS: dict[str, Callable[[], Pattern]] = {
    "separators": lambda: Predicate(_through_separators),
    "free": Causal,
}


@cache
def trained(pattern: str, seed: int) -> Decoder:
    """Two layers; "separators": another segment is seen through its separator alone."""
    size = TEXT + LENGTH
    with seeded(seed):
        model = Decoder(
            Segments.vocabulary,
            DIM,
            2,
            lambda layer: Attention(
                DIM,
                4,
                position=Learned(size) if layer == 0 else None,
                pattern=PATTERNS[pattern](),
                causal=True,
            ),
        )
    fit(model, text(), steps=350, size=48, rate=5e-3, seed=seed, warmup=0.1)
    return model.eval()


def _states(model: nn.Module, task: Segments, step: int, size: int, split: str) -> Any:
    """States `(size, places, layers + 1, width)`, and the symbols before each `(..., 3)`."""
    look, ids = model_view(model), task.batch(step, size, split).inputs["input_ids"]
    sites = sites_of(look, "residual")
    with torch.no_grad(), recording(look, sites) as seen:
        model(input_ids=ids)
    states = torch.stack([seen[site] for site in sites], 2)[:, list(task.places)]
    before = [[c for c in task.content if c < place][-LENGTH:] for place in task.places]
    return states, ids[:, before]


@cache
def _contextualization(model: nn.Module, task: Segments, steps: int) -> tuple[float, ...]:
    states, symbols = _states(model, task, 0, 2048, "train")
    with seeded(0):
        adapter = Adapter(states.shape[2], states.shape[3], LENGTH, SYMBOLS)
        optimizer = torch.optim.AdamW(adapter.parameters(), 5e-3)
        for _ in range(steps):
            some = torch.randint(len(states), (24,))
            loss = F.cross_entropy(adapter(states[some]).flatten(0, 2), symbols[some].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    states, symbols = _states(model, task, 0, 512, "test")
    with torch.no_grad():
        right = adapter(states).argmax(-1) == symbols
    return tuple(right.float().mean((0, 2)).tolist())


# -- what it comes to ------------------------------------------------------------------------------

SEEDS = (0, 1)
TASK = text()


@claim(subject="separators", control="free", unit="share of symbols", seeds=SEEDS, quick=False)
def separators_remember(pattern: str, seed: int) -> Measured:
    """A separator's states tell the three symbols before it at least 0.25 better than the median
    symbol's do."""
    found = contextualization(trained(pattern, seed), TASK)
    separators = torch.tensor([found[place] for place in TASK.separators])
    symbols = torch.tensor([found[place] for place in TASK.places if place in TASK.content])
    return at_least(
        separators.mean() - symbols.median(),
        0.25,
        separators=separators.mean(),
        symbols=symbols.median(),
        chance=1 / SYMBOLS,
    )


@claim(subject="separators", control="free", unit="accuracy", seeds=SEEDS, quick=False)
def hiding_separators_costs_more(pattern: str, seed: int) -> Measured:
    """Hiding the three separators from everybody lowers accuracy by 0.2 more than hiding three
    symbols at random."""
    model, asked = trained(pattern, seed), TASK.batch(0, 256, "test")
    look, (size, n) = view(model), asked.inputs["input_ids"].shape
    keys = {name: torch.zeros(size, n, dtype=torch.bool) for name in ("none", "ends", "symbols")}
    keys["ends"][:, list(TASK.separators)] = True
    drawn = torch.rand(size, len(TASK.content), generator=torch.Generator().manual_seed(0))
    places = torch.tensor(TASK.content)[drawn.argsort(-1)[:, :SEGMENTS]]
    keys["symbols"].scatter_(1, places, True)
    accuracy: dict[str, float] = {}
    for name, hide in keys.items():
        with torch.no_grad(), hidden(look, look.stacks[0], hide):
            guess = model(**asked.inputs)[:, TEXT:].argmax(-1)
        accuracy[name] = float(torch.eq(guess, asked.targets[:, TEXT:]).float().mean())
    return at_least(accuracy["symbols"] - accuracy["ends"], 0.2, **accuracy)


def not_centred(x: Tensor, y: Tensor) -> Linearity:
    """The control: a map without an offset."""
    return linearity(x, y, centred=False)


@claim(subject=linearity, control=not_centred, unit="1 - linearity", seeds=(0, 1, 2))
def an_affine_layer_is_linear(measure: Callable[..., Linearity], seed: int) -> Measured:
    """Of an affine map linearity is 1."""
    with seeded(seed):
        x = torch.randn(400, 32).double()
        y = x @ torch.randn(32, 32).double() + 3 * torch.randn(32).double()
    return at_most(1 - measure(x, y).score, 1e-6)


def of_few(x: Tensor, y: Tensor) -> Linearity:
    """The control: as few positions as features, for which a map can always be found."""
    return linearity(x[:34], y[:34])


@claim(subject=linearity, control=of_few, unit="linearity", seeds=(0, 1, 2))
def a_bent_layer_is_not(measure: Callable[..., Linearity], seed: int) -> Measured:
    """Of absolute values, which no line fits, linearity is under 0.9 (and near 0)."""
    with seeded(seed):
        x = torch.randn(400, 32).double()
    return at_most(measure(x, x.abs()).score, 0.9)


@claim(subject=two_nn, control=effective_rank, unit="dimensions", seeds=(0, 1, 2))
def two_neighbours_know_the_dimension(measure: Callable[[Tensor], float], seed: int) -> Measured:
    """A curved sheet of 5 dimensions in 64 has 5, give or take 1; counted by variances it has
    more."""
    with seeded(seed):
        inner = torch.rand(2000, 5).double()
        points = torch.sin(inner @ (2 * torch.randn(5, 64).double()) + torch.randn(64).double())
    return within(measure(points), 5.0, 1.0)


@picture
def what_tokens_remember() -> Picture:
    """By position, for both models; separators stand at 3, 7 and 11."""
    return Picture(
        title="Share of the three symbols before a token that its states tell",
        x="position",
        y="share",
        lines={
            name: (list(TASK.places), list(contextualization(trained(name, 0), TASK).values()))
            for name in PATTERNS
        },
    )
