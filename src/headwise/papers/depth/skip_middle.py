"""Tokens that leave out a span of middle blocks, from the middle outward.

Middle layers are the most redundant. So each block of the first half adds a score of its own to
what a token has gathered, one minus the sum (clamped) is the token's gate, and block l shares it
with its mirror L - 1 - l: once closed, a gate stays closed up to the mirror, and the token skips
the whole span between. Nobody attends to a token that is skipped: its keys carry log gate. Norms
before and after every sublayer keep the residual's size known to blocks on both sides of the span,
and a coefficient that follows the gates steers their mean to a target.

The paper reports no gain over dense models with fewer layers, and none is claimed here: what is
claimed is that it does what it says, and that what is skipped is not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from headwise.models.backbones import Decoder
from headwise.papers import Measured, at_most, claim, paper, within
from headwise.parts import AddBias, Attention, Mlp, Rotary, Sandwich
from headwise.parts.slots import Given
from headwise.tasks import PythonManual
from headwise.train import fit, seeded

CLOSED = -1e9
"""Added to the scores of keys whose gate is zero."""


class Gates(nn.Module):
    """log gates of the keys, for the score of every attention of a model: `(batch, 1, 1, n)`."""

    now: Tensor | None = None

    def forward(self, given: Given) -> Tensor:
        assert self.now is not None
        opened = self.now > 0
        logs = torch.where(opened, self.now, 1.0).log()
        return torch.where(opened, logs, CLOSED)[:, None, None]


@paper(
    title="Learning to Skip the Middle Layers of Transformers",
    source="arXiv 2506.21103",
    year=2025,
    modality="text",
    plain="A learned gate lets a token skip a symmetric span of middle blocks, and nobody attends "
    "to it there.",
    equation=r"g_l = 1 - \min\bigl(1, \sum_{k \le l} \max(0, w_k^\top x_k + b_k)\bigr),"
    r"\quad g_{L-1-l} = g_l",
    parts=("Sandwich", "AddBias", "Attention"),
    reported="No better loss at equal FLOPs than dense models with fewer layers: a negative "
    "result, by the authors' own account.",
    unsure="Gates are as in the authors' program. Of its controllers the proportional one is here; "
    "the one that moves coefficients by a constant a step swings for thousands of steps. It also "
    "steers the gates' variance, which is left out.",
    taxonomy=("architecture/adaptive",),
    use="""
from headwise.papers.depth.skip_middle import SkipMiddle

model = SkipMiddle(vocabulary=64, dim=32, depth=6)  # train; model.eval() skips for good
""",
)
class SkipMiddle(nn.Module):
    """Tokens `(batch, n)` to logits `(batch, n, vocabulary)` with `depth` (even) blocks.

    `gate`: each of the `depth / 2` scores starts with this bias and small weights. In training
    everything is computed and weighed; in evaluation mode a block runs the open tokens alone.
    `target`: mean gate that `penalty` steers each gate to, None for no steering; `gain`: its
    coefficient for a gate is so many times what that gate is above the target.
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        depth: int,
        heads: int = 4,
        bias: float = 0.0,
        target: float | None = None,
        gain: float = 5.0,
    ) -> None:
        super().__init__()
        if depth % 2:
            raise ValueError(f"blocks come in pairs: depth must be even, not {depth}")
        self.gates = Gates()
        self.decoder = Decoder(
            vocabulary,
            dim,
            depth,
            lambda layer: Attention(
                dim, heads, position=Rotary(), score=AddBias(self.gates), causal=True
            ),
            lambda layer: Mlp(dim, 2 * dim),
            wiring=Sandwich(),
            norm=nn.RMSNorm,
        )
        self.scores = nn.ModuleList(nn.Linear(dim, 1) for _ in range(depth // 2))
        for score in self.scores:
            nn.init.normal_(cast(Tensor, score.weight), std=0.02)
            nn.init.constant_(cast(Tensor, score.bias), bias)
        self.depth, self.target, self.gain = depth, target, gain
        self.means: Tensor | None = None
        self.runs = 0
        """Tokens that ran a block, all blocks together, in the last call."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.decoder.embed(input_ids)
        gathered = x.new_zeros(x.shape[:2])
        gates: list[Tensor] = []
        self.runs = 0
        for layer in range(self.depth):
            if layer < self.depth // 2:
                gathered = gathered + self.scores[layer](x)[..., 0].relu()
                gates.append(1 - gathered.clamp(0, 1))
            gate = gates[min(layer, self.depth - 1 - layer)]
            x = self.blend(layer, x, gate) if self.training else self.skip(layer, x, gate)
        self.means = torch.stack([gate.mean() for gate in gates])
        logits: Tensor = self.decoder.answer(self.decoder.stack.wiring.end(x))
        return logits

    def blend(self, layer: int, x: Tensor, gate: Tensor, positions: Tensor | None = None) -> Tensor:
        """One block, all of it: x + g F(x), with gated keys."""
        stack: Any = self.decoder.stack
        self.gates.now = gate

        def mix(y: Tensor) -> Tensor:
            out: Tensor = stack.mixers[layer](y, positions=positions)
            return out

        for place, sublayer in (("mix", mix), ("feed", stack.feeds[layer])):
            added = stack.wiring.around(x, layer, place, sublayer) - x
            x = x + gate[..., None] * added
        self.runs += gate.numel()
        return x

    def skip(self, layer: int, x: Tensor, gate: Tensor) -> Tensor:
        """The same for open tokens only: the others are neither queries nor keys nor fed."""
        out = x.clone()
        for row, opened in enumerate(gate > 0):
            at = opened.nonzero()[:, 0]
            if len(at):
                part = self.blend(layer, x[row : row + 1, at], gate[row : row + 1, at], at)
                out[row, at] = part[0]
        return out

    def penalty(self) -> Tensor:
        """Coefficients times mean gates."""
        assert self.means is not None
        if self.target is None:
            return self.means.sum() * 0.0
        coefficients = self.gain * (self.means.detach() - self.target)
        return (coefficients * self.means).sum()


class Ungated(Gates):
    """Scores stay what they are."""

    def forward(self, given: Given) -> Tensor:
        return torch.zeros(1, 1, 1, 1)


def ungated_keys(**sizes: Any) -> SkipMiddle:
    """The control: closed tokens are attended to as ever."""
    model = SkipMiddle(**sizes)
    for mixer in model.decoder.stack.mixers:
        cast(Any, mixer).score.read = Ungated()
    return model


# -- experiments ----------------------------------------------------------------------------------

SIZES = {"vocabulary": 40, "dim": 32, "depth": 6}


def ids(n: int = 24) -> Tensor:
    return torch.randint(40, (3, n), generator=torch.Generator().manual_seed(4))


def undecided(make: Callable[..., SkipMiddle]) -> SkipMiddle:
    """Scores large enough that some tokens close early, some late, some never."""
    with seeded(1):
        model = make(**SIZES)
        with torch.no_grad():
            for score in model.scores:
                nn.init.normal_(cast(Tensor, score.weight), std=1.5)
                nn.init.constant_(cast(Tensor, score.bias), -0.3)
            nn.init.normal_(model.decoder.embed.weight, std=0.5)
    return model


def half_open(**sizes: Any) -> SkipMiddle:
    """The control: every gate begins below one."""
    return SkipMiddle(**sizes, bias=0.1)


def open_gates(**sizes: Any) -> SkipMiddle:
    return SkipMiddle(**sizes, bias=-1.0)


@claim(subject=open_gates, control=half_open, unit="largest difference of logits")
def open_gates_are_the_dense_model(make: Callable[..., SkipMiddle], seed: int) -> Measured:
    """With all gates at one, the logits are those of a plain decoder with the same weights."""
    model = make(**SIZES)
    dense = Decoder(
        40,
        32,
        6,
        lambda layer: Attention(32, 4, position=Rotary(), causal=True),
        lambda layer: Mlp(32, 64),
        wiring=Sandwich(),
        norm=nn.RMSNorm,
    )
    dense.load_state_dict(model.decoder.state_dict())
    with torch.no_grad():
        return at_most((model(ids()) - dense(ids())).abs().max(), 1e-4)


@claim(control=ungated_keys, unit="largest difference of logits")
def what_is_skipped_is_not_computed(make: Callable[..., SkipMiddle], seed: int) -> Measured:
    """Running the open tokens of each block alone gives what weighing everything gives, and runs
    fewer tokens; where closed tokens are still attended to (control), it does not."""
    model = undecided(make)
    with torch.no_grad():
        whole = model.train()(ids())
        all_runs = model.runs
        alone = model.eval()(ids())
    share = model.runs / all_runs
    difference = (whole - alone).abs().max() if share < 0.9 else float("nan")
    return at_most(difference, 1e-4, share_of_block_runs=share)


@claim(control=ungated_keys, unit="largest change of another token")
def nobody_attends_to_a_skipped_token(make: Callable[..., SkipMiddle], seed: int) -> Measured:
    """Where a token's gate is zero, whatever stands in its place changes no other token's block,
    and it leaves as it came."""
    model = undecided(make)
    x, gate = torch.randn(2, 12, 32), torch.ones(2, 12)
    gate[:, [3, 7]] = 0.0
    other = x.clone()
    other[:, [3, 7]] += 5.0
    with torch.no_grad():
        a, b = model.blend(2, x, gate), model.blend(2, other, gate)
    stays = (b - other)[:, [3, 7]].abs().max()
    return at_most((a - b)[:, gate[0] > 0].abs().max() + stays, 1e-6)


def steered(**sizes: Any) -> SkipMiddle:
    return SkipMiddle(**sizes, target=0.6)


def unsteered(**sizes: Any) -> SkipMiddle:
    """The control: coefficients are zero."""
    return SkipMiddle(**sizes, target=0.6, gain=0.0)


@claim(subject=steered, control=unsteered, unit="mean gate", seeds=(0, 1), quick=False)
def coefficients_find_the_target(make: Callable[..., SkipMiddle], seed: int) -> Measured:
    """Over the last 60 of 160 steps the mean gate is within 0.05 of its target of 0.6, while the
    model learns to write; with coefficients of zero (control) it is not."""
    task, gates = PythonManual(32), []
    with seeded(seed):
        model = make(vocabulary=task.vocabulary, dim=32, depth=4)

    def note(step: int, loss: float) -> None:
        assert model.means is not None
        gates.append(float(model.means.detach().mean()))

    fitted = fit(model, task, steps=160, size=8, rate=5e-3, decay=0.0, seed=seed, each=note)
    mean = sum(gates[-60:]) / 60
    return within(mean, 0.6, 0.05, loss=fitted.loss, lowest=min(gates[-60:]))
