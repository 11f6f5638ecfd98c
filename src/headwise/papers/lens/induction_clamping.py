"""Holding parts of a model fixed while it trains, to see what an induction head waits for.

Ablations after training tell which heads matter in the end, not why they came when they came. The
paper clamps chosen activations to a prescribed value in every step of training, forward and
backward, as optogenetics does with neurons. An induction circuit has three parts that must all be
there before any of them pays: looking at the previous token in the first layer (A), matching the
current token with what stood before in the second (B), and copying (C). Given A from the start,
the sudden drop of the loss comes early; with A held at something useless it does not come.

Here patterns are clamped: the map of some heads is a table, whatever their queries and keys say,
which therefore get no gradient at all. `Clamped` does it in attentions of our own, `Hold` under
`headwise.swap` in models of others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.edits.change import Call, Change
from headwise.models import Site, touching, view
from headwise.models.backbones import Decoder
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture
from headwise.parts import Attention, Normalize, Rotary, Softmax
from headwise.tasks import WanderingRepeat
from headwise.train import fit, seeded

DIM, HEADS, DEPTH = 64, 8, 2
STEPS, SIZE, RATE = 600, 32, 2e-3
SEEDS = (0, 1)
Pattern = Callable[[int], Tensor]
"""n -> weights `(n, n)`, rows of which sum to 1."""


def previous_token(n: int) -> Tensor:
    """All weight on the token before; the first token looks at itself."""
    return F.one_hot((torch.arange(n) - 1).clamp(min=0), n).float()


def uniform(n: int) -> Tensor:
    """The same weight on every token so far."""
    seen = torch.ones(n, n).tril()
    return seen / seen.sum(1, keepdim=True)


@paper(
    title="What needs to go right for an induction head? A mechanistic study of in-context "
    "learning circuits and their formation",
    source="arXiv 2404.07129",
    year=2024,
    modality="text",
    plain="Attention maps are clamped to chosen patterns during all of training, which shows that "
    "induction heads wait for a previous-token head, and then form at once.",
    equation=r"P_h := \hat{P} \;\Rightarrow\; \frac{\partial \mathcal{L}}{\partial W_Q^h} = "
    r"\frac{\partial \mathcal{L}}{\partial W_K^h} = 0 \quad\text{in every step}",
    parts=("Attention", "Softmax", "Rotary"),
    reported="Two layers of attention with eight heads on few-shot labels of images: three "
    "subcircuits together time the phase change; induction heads add up.",
    unsure="The task is ours, repetition at an unknown distance instead of exemplars with labels: "
    "with two exemplars a uniform first layer suffices, and a small model finds that.",
    taxonomy=("beyond/analysis",),
    use="""
import torch

from headwise.papers.lens.induction_clamping import Clamped, previous_token
from headwise.parts import Attention

layer = Attention(64, 8, normalize=Clamped(previous_token, heads=(0, 1)), causal=True,
                  backend="dense")
layer(torch.randn(2, 10, 64)).sum().backward()
layer.project.query.weight.grad[:16].abs().max()    # exactly 0: the heads 0 and 1
""",
)
class Clamped(Normalize):
    """The maps of `heads` (None: all) are `pattern(n)`, the others softmax of their scores.

    Needs whole maps, so the attention is built with backend="dense"; raises ValueError where it is
    handed some rows only, as in decoding.
    """

    shift_invariant = True

    def __init__(self, pattern: Pattern, heads: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.pattern, self.clamped, self.free = pattern, heads, Softmax()

    def forward(self, logits: Tensor) -> Tensor:
        rows, n = logits.shape[-2:]
        if rows != n:
            raise ValueError(
                f"Clamped has whole maps only, not {rows} rows of {n} keys: build the attention "
                'with backend="dense", and do not decode step by step'
            )
        table = self.pattern(n).to(logits).expand_as(logits)
        if self.clamped is None:
            return table
        held = torch.zeros(logits.shape[1], 1, 1, dtype=torch.bool, device=logits.device)
        held[list(self.clamped)] = True
        return torch.where(held, table, self.free(logits))


@dataclass(frozen=True, eq=False)
class Hold(Change):
    """The same under `headwise.swap`, around a training loop: `swap(model, {0: Hold(uniform)})`."""

    pattern: Pattern
    discards = True

    def after(self, call: Call, out: Tensor) -> Tensor:
        if call.n_q != call.n_k:
            raise ValueError(f"Hold has whole maps only, not {call.n_q} rows of {call.n_k} keys")
        group = len(call.heads) // call.value.shape[1]
        return self.pattern(call.n_k).to(out) @ call.value.repeat_interleave(group, 1)


def model(clamp: Pattern | None, second: int = HEADS) -> Decoder:
    """Two layers of attention, the other with `second` heads; the maps of the first are held where
    a pattern is given."""

    def mixer(layer: int) -> Attention:
        held = Softmax() if clamp is None or layer else Clamped(clamp)
        return Attention(
            DIM,
            second if layer else HEADS,
            position=Rotary(),
            normalize=held,
            causal=True,
            backend="dense",
        )

    task = WanderingRepeat()
    made = Decoder(task.vocabulary, DIM, DEPTH, mixer, feed=lambda layer: None, tied=False)
    # an embedding as large as what heads add: else nobody sees the token beside the one before it
    nn.init.normal_(made.embed.weight)
    return made


@cache
def trained(clamp: Pattern | None, seed: int, second: int = HEADS) -> tuple[Decoder, list[float]]:
    """The model, and its loss by step; it ends where the task is solved."""
    with seeded(seed):
        made = model(clamp, second)
    done = fit(
        made,
        WanderingRepeat(),
        steps=STEPS,
        size=SIZE,
        rate=RATE,
        schedule="constant",
        decay=0.0,
        target=0.1,
        seed=seed,
    )
    return made.eval(), done.losses


def smooth(losses: list[float], wide: int = 20) -> Tensor:
    return torch.tensor(losses).unfold(0, wide, 1).mean(1)


def steps_to_half(losses: list[float]) -> int:
    """Steps until half of the drop from guessing to nothing; all of them where it never comes."""
    half = torch.tensor(WanderingRepeat().vocabulary).log() / 2
    below = (smooth(losses) < half).nonzero()
    return int(below[0]) + 20 if len(below) else STEPS


@claim(subject=previous_token, control=uniform, unit="of the steps", seeds=SEEDS, quick=False)
def given_its_first_half_induction_comes_early(clamp: Pattern, seed: int) -> Measured:
    """With the first layer held at previous tokens, half of the drop takes at most 0.6 of the steps
    of the free run from the same seed on the same data; held at uniform maps it does not."""
    steps, free = (steps_to_half(trained(c, seed)[1]) for c in (clamp, None))
    return at_most(steps / free, 0.6, clamped=steps, free=free)


@claim(subject=uniform, control=previous_token, unit="of guessing", seeds=SEEDS, quick=False)
def without_it_the_drop_does_not_come(clamp: Pattern, seed: int) -> Measured:
    """With the first layer held at uniform maps, the loss stays over half of that of guessing for
    1.3 times the steps that the free run takes for that half."""
    free = steps_to_half(trained(None, seed)[1])
    losses = smooth(trained(clamp, seed)[1])
    at = min(int(1.3 * free), STEPS) - 20
    chance = torch.tensor(float(WanderingRepeat().vocabulary)).log()
    return at_least(losses[min(at, len(losses) - 1)] / chance, 0.5, steps=at + 20)


def eight_heads(seed: int) -> Decoder:
    return trained(None, seed)[0]


def one_head(seed: int) -> Decoder:
    """The control: a second layer of one head, as wide as the eight together."""
    return trained(None, seed, 1)[0]


@torch.no_grad()
def with_heads(made: Decoder, kept: set[int]) -> float:
    """Loss in nats with these heads of the second layer alone."""
    batch = WanderingRepeat().batch(0, 256, "test")

    def keep(out: Tensor) -> Tensor:
        which = torch.tensor([h in kept for h in range(out.shape[2])])
        return out * which[:, None].to(out)

    with touching(view(made), {Site("heads", 1): keep}):
        return float(WanderingRepeat().loss(made(**batch.inputs), batch))


@claim(subject=eight_heads, control=one_head, unit="nats", seeds=SEEDS, quick=False)
def induction_heads_add_up(make: Callable[[int], Decoder], seed: int) -> Measured:
    """Keeping any one head of the second layer alone costs at least 0.5 nats more than taking any
    one away: no head is the circuit, and none is needed."""
    made = make(seed)
    heads = set(range(view(made).attentions[1].heads))
    alone = min(with_heads(made, {head}) for head in heads)
    without = max(with_heads(made, heads - {head}) for head in heads)
    return at_least(alone - without, 0.5, alone=alone, without=without)


def clamped_map(logits: Tensor) -> Tensor:
    """The maps of the first two heads are the table."""
    return Clamped(previous_token, heads=(0, 1))(logits)


def strongly_pushed(logits: Tensor) -> Tensor:
    """The control: their scores get 8 more where the table looks, and the softmax stays."""
    more = torch.zeros(logits.shape[1], 1, 1)
    more[:2] = 8.0
    pushed: Tensor = Softmax()(logits + more * previous_token(logits.shape[-1]))
    return pushed


@claim(subject=clamped_map, control=strongly_pushed, unit="largest gradient")
def clamped_heads_get_no_gradient(weigh: Callable[[Tensor], Tensor], seed: int) -> Measured:
    """Not a small gradient: none, of the queries and keys of the clamped heads alone."""
    with seeded(seed):
        q, k, v = (torch.randn(2, 4, 9, 8, requires_grad=True) for _ in range(3))
        wanted = torch.randn(2, 4, 9, 8)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    out = weigh((q @ k.mT).masked_fill(hidden, -torch.inf)) @ v
    (out * wanted).sum().backward()
    grads: list[Any] = [x.grad for x in (q, k, v)]
    others = min(float(grad[:, 2:].abs().max()) for grad in grads)
    assert others > 0  # the free heads, and all values, learn
    assert float(grads[2][:, :2].abs().max()) > 0
    return at_most(max(float(g[:, :2].abs().max()) for g in grads[:2]), 0.0, free_heads=others)


@picture
def when_it_comes() -> Picture:
    """Loss by step under each clamp."""
    runs = {"free": None, "previous token": previous_token, "uniform": uniform}
    return Picture(
        title="Loss while the first layer's maps are held",
        x="step",
        y="nats",
        lines={
            name: (range(20, len(trained(c, 0)[1]) + 1), smooth(trained(c, 0)[1]).tolist())
            for name, c in runs.items()
        },
    )
