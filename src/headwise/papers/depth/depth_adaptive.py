"""As many blocks as a token needs.

A classifier stands after every block of a decoder, and all of them are trained together, so that a
token can be predicted from any depth. When one leaves after block n, its state is copied to the
blocks above, so that later tokens find keys and values there. Where to leave is learned afterwards:
at each exit a small gate says whether to stop, and its oracle is the first exit that is right; or
it is decided by the classifier's confidence.

The paper translates. The task here asks for less and lets one see why a token needs depth: keys
and values are listed, then come tokens to be repeated (easy: no attention at all) and keys whose
value is asked (hard: two layers of attention).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.compress import Confidence, EarlyExit
from headwise.maps import Window
from headwise.models.backbones import Decoder
from headwise.papers import Measured, at_least, at_most, claim, paper
from headwise.parts import Attention, Rotary
from headwise.tasks import MultiQueryRecall
from headwise.tasks.task import IGNORED, Batch, Task
from headwise.train import fit, seeded

DEPTH, WIDTH, PAIRS = 4, 64, 6
KEYS_AND_VALUES, VOCABULARY = 40, 50


class EasyAndHard(Task):
    """Pairs `k v`, then places at which either a token stands that is to be repeated (easy) or a
    key whose value is asked (hard). `exits`: targets `(size, exits, n)`, the same for each exit;
    None for `(size, n)`. facts: `hard` `(size, n)`."""

    def __init__(self, exits: int | None = None, seed: int = 0) -> None:
        self.recall = MultiQueryRecall(PAIRS, 40, KEYS_AND_VALUES, power=1.0, seed=seed)
        self.vocabulary, self.exits, self.seed = VOCABULARY, exits, seed

    def make(self, size: int, generator: torch.Generator) -> Batch:
        found = self.recall.make(size, generator)
        ids, targets = found.inputs["input_ids"].clone(), found.targets.clone()
        hard = targets != IGNORED
        easy = ~hard & (torch.rand(ids.shape, generator=generator) < 0.35)
        easy[:, : 2 * PAIRS] = False
        filler = torch.randint(KEYS_AND_VALUES, VOCABULARY, ids.shape, generator=generator)
        ids = torch.where(easy, filler, ids)
        targets = torch.where(easy, ids, targets)
        if self.exits is not None:
            targets = targets[:, None].expand(-1, self.exits, -1)
        return Batch({"input_ids": ids}, targets, {"hard": hard})


class Halting(nn.Module):
    """Geometric-like exits (section 3.2): chi_n = sigmoid(w_n . h_n + b_n) at each exit but the
    last, q(n) = chi_n prod_{m<n} (1 - chi_m), the last exit takes what remains. As a policy it
    stops where chi is above one half."""

    def __init__(self, dim: int, exits: int) -> None:
        super().__init__()
        self.gates = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 1)) for _ in range(exits - 1)
        )

    def chi(self, number: int, x: Tensor) -> Tensor:
        chi: Tensor = self.gates[number](x)[..., 0].sigmoid()
        return chi

    def forward(self, number: int, x: Tensor, logits: Tensor) -> Tensor:
        return self.chi(number, x) > 0.5

    def distribution(self, states: Tensor) -> Tensor:
        """q `(exits, ...)` from what every block leaves `(exits, ..., dim)`."""
        left = torch.ones(states.shape[1:-1])
        found = []
        for number in range(len(self.gates)):
            chi = self.chi(number, states[number])
            found.append(left * chi)
            left = left * (1 - chi)
        return torch.stack([*found, left])


@paper(
    title="Depth-Adaptive Transformer",
    source="arXiv 1910.10073",
    year=2019,
    modality="text",
    plain="Every block can answer, a small gate says which one does, and the state of a token that "
    "left is copied upwards.",
    equation=r"q_t(n) = \chi_t^n \prod_{m<n} (1 - \chi_t^m),\quad \chi_t^n = \sigma(w_n^\top h_t^n "
    r"+ b_n)",
    parts=("EarlyExit", "Confidence"),
    reported="IWSLT German-English: the quality of a well tuned baseline with less than a quarter "
    "of the decoder's layers.",
    unsure="The oracle of the gates here is the first exit that is right, without smoothing over "
    "neighbours or a price on depth; gates are trained after the model and not with it.",
    taxonomy=("architecture/adaptive",),
    use="""
from headwise.papers.depth.depth_adaptive import EasyAndHard, learned_exits, trained

policy = learned_exits(0)
logits, exits = trained(0).run(EasyAndHard().batch(0, 4).inputs["input_ids"], policy)
""",
)
def learned_exits(seed: int) -> Halting:
    """Gates for the trained model: 100 steps towards the first exit that is right."""
    model, task = trained(seed), EasyAndHard()
    with seeded(seed):
        policy = Halting(WIDTH, DEPTH)
    with torch.enable_grad():
        optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-2, weight_decay=0.0)
        for step in range(100):
            batch = task.batch(step, 16, "valid")
            states, right, asked = _states(model, batch)
            oracle = first(right)
            loss = torch.zeros(())
            for number in range(DEPTH - 1):  # a gate is asked where nobody stopped before it
                there = asked & (oracle >= number)
                chi = policy.chi(number, states[number])[there]
                loss = loss + F.binary_cross_entropy(chi, (oracle[there] == number).float())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return policy.requires_grad_(False)


def first(right: Tensor) -> Tensor:
    """The first exit that is right `(...)`, from `(exits, ...)`; the last where none is."""
    some = right.clone()
    some[-1] = True
    return some.long().argmax(0)


@torch.no_grad()
def _states(model: EarlyExit, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """What every block leaves `(exits, batch, n, dim)`, where it is right, and what is asked."""
    kept: list[Tensor] = []

    def keep(number: int, x: Tensor, logits: Tensor) -> Tensor:
        kept.append(x)
        return torch.zeros_like(x[..., 0], dtype=torch.bool)

    ids = batch.inputs["input_ids"]
    model.run(ids, keep)
    right = model(ids).argmax(-1).transpose(0, 1) == batch.targets
    return torch.stack([*kept, kept[-1]]), right, batch.targets != IGNORED


def at_random(seed: int) -> Callable[[int, Tensor, Tensor], Tensor]:
    """The control: exits drawn at random, as often each as the learned policy takes it."""
    batch = EasyAndHard().batch(0, 64, "test")
    _, exits = trained(seed).run(batch.inputs["input_ids"], learned(seed))
    counts = torch.bincount(exits[batch.targets != IGNORED], minlength=DEPTH).float()
    draw = torch.Generator().manual_seed(seed)

    def policy(number: int, x: Tensor, logits: Tensor) -> Tensor:
        share = counts[number] / counts[number:].sum().clamp_min(1)
        return torch.rand(x.shape[:2], generator=draw) < share

    return policy


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1)


def decoder(depth: int) -> Decoder:
    near = Window(3)
    return Decoder(
        VOCABULARY,
        WIDTH,
        depth,
        lambda layer: Attention(
            WIDTH, 4, position=Rotary(), pattern=None if layer else near, causal=True
        ),
        lambda layer: None,
        tied=False,
    )


@cache
def trained(seed: int) -> EarlyExit:
    """Four layers of attention, the first with a window of three, all exits trained together.

    The first two begin as a model that learned to recall: four layers that learn both things at
    once stay at guessing for longer than there is time here.
    """
    with seeded(seed):
        begun, model = decoder(2), EarlyExit(decoder(DEPTH))
    fit(begun, EasyAndHard().recall, steps=120, size=32, rate=5e-3, seed=seed)
    model.decoder.load_state_dict(begun.state_dict(), strict=False)
    fit(model, EasyAndHard(exits=DEPTH), steps=80, size=16, rate=3e-3, seed=seed + 10)
    return model.eval()


@cache
def learned(seed: int) -> Halting:
    return learned_exits(seed)


def _measured(seed: int, policy: Any) -> tuple[float, Tensor, Batch]:
    """Accuracy, exits (from 1) and the problems."""
    batch = EasyAndHard().batch(1, 64, "test")
    with torch.no_grad():
        logits, exits = trained(seed).run(batch.inputs["input_ids"], policy)
    asked = batch.targets != IGNORED
    right = (logits.argmax(-1) == batch.targets)[asked].float().mean()
    return float(right), exits + 1, batch


@claim(subject=learned, control=at_random, unit="accuracy lost", seeds=SEEDS, quick=False)
def few_blocks_do(make: Any, seed: int) -> Measured:
    """With at most 0.6 of the blocks the learned exits lose at most 0.01 of the accuracy of the
    whole depth; random exits as deep on average (control) lose more than 0.05."""
    whole, _, _ = _measured(seed, Confidence(1.1))
    early, exits, batch = _measured(seed, make(seed))
    cost = float(exits[batch.targets != IGNORED].float().mean()) / DEPTH
    lost = whole - early if cost <= 0.6 else float("nan")
    return at_most(lost, 0.01, blocks=cost, whole=whole, early=early)


@claim(subject=learned, control=at_random, unit="blocks", seeds=SEEDS, quick=False)
def hard_tokens_leave_later(make: Any, seed: int) -> Measured:
    """Tokens that ask for a value leave at least 0.8 of a block later than tokens that are
    repeated. (Set at first at one block; a model that recalls after its second leaves no more.)"""
    _, exits, batch = _measured(seed, make(seed))
    hard = batch.facts["hard"]
    easy = (batch.targets != IGNORED) & ~hard
    depths = [exits[where].float().mean() for where in (hard, easy)]
    return at_least(depths[0] - depths[1], 0.8, hard=depths[0], easy=depths[1])


class NoRemainder(Halting):
    """The control: the last exit has a gate as the others have."""

    def distribution(self, states: Tensor) -> Tensor:
        q = super().distribution(states)
        return torch.cat([q[:-1], q[-1:] * self.chi(0, states[-1])])


@claim(subject=Halting, control=NoRemainder, unit="largest difference")
def exits_are_a_distribution(make: Any, seed: int) -> Measured:
    """q sums to one and equals the products written out; without the remainder (control) it sums
    to less."""
    states = torch.randn(4, 3, 5, 8)
    with torch.no_grad():
        policy = make(8, 4)
        q = policy.distribution(states)
        chi = [policy.chi(n, states[n]) for n in range(3)]
        stay = [1 - one for one in chi]
        products = [chi[0], stay[0] * chi[1], stay[0] * stay[1] * chi[2]]
        want = torch.stack([*products, stay[0] * stay[1] * stay[2]])
        return at_most(torch.maximum((q - want).abs().max(), (q.sum(0) - 1).abs().max()), 1e-6)


class Uncopied(EarlyExit):
    """The control: blocks above an exit are given zeros instead of the state."""

    def remember(self, layer: int, x: Tensor, state: Any) -> None:
        super().remember(layer, torch.zeros_like(x), state)


@claim(subject=EarlyExit, control=Uncopied, unit="largest difference of logits", quick=False)
def copied_states_serve_later_tokens(make: Any, seed: int) -> Measured:
    """Token by token, with keys and values of copied states, gives what one pass gives in which
    tokens that left stay as they are; where nothing is copied (control), it does not."""
    model = make(trained(seed).decoder).eval()
    model.norms.load_state_dict(trained(seed).norms.state_dict())
    ids = EasyAndHard().batch(0, 1, "test").inputs["input_ids"]
    states, steps = model.empty_states(), []
    with torch.no_grad():
        for i in range(ids.shape[1]):
            steps.append(model.run(ids[:, i : i + 1], learned(seed), states)[0])
        whole, _ = trained(seed).run(ids, learned(seed))
    return at_most((torch.cat(steps, 1) - whole).abs().max(), 1e-4)
