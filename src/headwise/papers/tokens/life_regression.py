"""One look early on tells each patch how many layers it will live.

Pruning patches layer by layer asks a scorer in every layer where they go. Here a small head reads
the patches once and regresses a life for each, a number of layers; layer j works on the patches
whose life is not over. While it is trained nothing is cut: a patch of life l counts in layer j's
softmax with weight sigmoid((l - j) / T), so that gradients reach the lives, and a penalty draws
their mean to the budget. Afterwards patches are really gone when their life is over, and no later
layer has anything to decide: lives are nested by themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from headwise.compress import reduce_tokens
from headwise.compress.tokens.ranking import Random
from headwise.compress.tokens.record import Record
from headwise.compress.tokens.reduction import Ranked
from headwise.compress.tokens.sight import Sight
from headwise.maps import Scores
from headwise.models.backbones import VisionPatches
from headwise.papers import Measured, at_least, at_most, claim, paper
from headwise.papers.digit_readers import held_out_digits, untrained_reader
from headwise.parts import Attention, kernels
from headwise.tasks import Digits
from headwise.train import fit, seeded


@paper(
    title="Life Regression based Patch Slimming for Vision Transformers",
    source="arXiv 2304.04926",
    year=2023,
    modality="image",
    plain="A head regresses once, at the start, after how many layers each patch is discarded.",
    equation=r"l = L \, \sigma(w^\top x_0 + b), \quad m_{ij} = \sigma\big((l_i - j)/T\big), \quad "
    r"A_{qi} = \frac{m_{ij} e^{s_{qi}}}{\sum_k m_{kj} e^{s_{qk}}}",
    parts=("Attention",),
    reported="Quicker inference at competitive accuracy and fewer epochs of training than scorers "
    "in several layers, on ImageNet.",
    unsure="Only the abstract was at hand: the soft form of the mask, the place of the head (on "
    "the embedded patches) and the penalty are ours.",
    taxonomy=("beyond/tokens", "architecture/adaptive"),
    use="""
from headwise.papers.digit_readers import held_out_digits
from headwise.papers.tokens.life_regression import trained

lively = trained(0)
with lively.slim() as record:
    # one image at a time: each has its own number of patches
    logits = lively(held_out_digits()[0][:1])
record.counts
""",
)
class Lives(nn.Module):
    """A vision transformer of ours whose patches have lives.

    In training they fade; in `slim` they go. `budget`: mean life as a share of the depth.
    """

    def __init__(
        self, model: VisionPatches, budget: float = 0.5, temperature: float = 0.25
    ) -> None:
        super().__init__()
        self.model, self.budget, self.temperature = model, budget, temperature
        self.depth = len(model.stack.mixers)
        self.head = nn.Linear(model.dim, 1)
        self.asked = 0
        self.lives: Tensor | None = None
        for layer, mixer in enumerate(model.stack.mixers):
            assert isinstance(mixer, Attention)
            mixer.editor = _Fading(self, layer)

    def regress(self, patches: Tensor) -> Tensor:
        """Lives in layers `(batch, patches)`, from 0 to depth, of patches `(batch, n, dim)`."""
        self.asked += 1
        found: Tensor = self.depth * self.head(patches).squeeze(-1).sigmoid()
        return found

    def forward(self, pixel_values: Tensor) -> Tensor:
        x, _ = self.model.embed(pixel_values)
        self.lives = self.regress(x[:, 1:])
        answer: Tensor = self.model(pixel_values)
        return answer

    def penalty(self) -> Tensor:
        """Asked for by `fit`: how far the mean life is from the budget."""
        assert self.lives is not None
        return 4.0 * (self.lives.mean() / self.depth - self.budget) ** 2

    def slim(self) -> AbstractContextManager[Record]:
        """Patches really go, before the first layer that they do not live to see."""
        return reduce_tokens(self.model, schedule=dict.fromkeys(range(self.depth)), how=_Dead(self))


class _Fading:
    """Keys count by how alive they are: sigmoid((l - j - 1/2) / T), hard outside training."""

    def __init__(self, owner: Lives, layer: int) -> None:
        self.owner, self.layer = [owner], layer  # a list: no module inside a module's attention

    def __call__(self, attention: Attention, scores: Scores, v: Tensor, keys: Any, at: Any) -> Any:
        owner = self.owner[0]
        lives = owner.lives
        if lives is None or scores.n_k != lives.shape[1] + 1:
            return None  # the dead are gone
        log = nn.functional.logsigmoid((lives - self.layer - 0.5) / owner.temperature)
        if not owner.training:
            dead = (lives <= self.layer + 0.5) & (lives < lives.amax(1, keepdim=True))
            log = torch.zeros_like(lives).masked_fill(dead, -torch.inf)
        bias = nn.functional.pad(log, (1, 0))[:, None, None]
        scores = dataclasses.replace(scores, bias=bias.expand(-1, -1, scores.n_q, -1))
        return kernels.attend(attention, scores, v), scores, v


@dataclass(frozen=True)
class _Dead(Ranked):
    """Keeps whoever lives to see the next layer, at least one; the longest-lived of a batch."""

    owner: Lives
    place: ClassVar[str] = "before"
    watches: ClassVar[bool] = True
    needs_map: ClassVar[bool] = False

    def observe(self, sight: Sight) -> Tensor:
        if sight.state is not None:
            return sight.state
        assert self.owner.lives is not None
        return self.owner.lives

    def scores(self, sight: Sight) -> Tensor:
        assert sight.state is not None
        return sight.state

    def count(self, sight: Sight) -> int:
        assert sight.state is not None
        return max(1, int((sight.state > sight.layer + 0.5).sum(1).max()))


class LivesByChance(Lives):
    """The control: lives are drawn, with the same mean."""

    def regress(self, patches: Tensor) -> Tensor:
        self.asked += 1
        random = torch.Generator().manual_seed(patches.shape[0])
        drawn = torch.rand(patches.shape[:2], generator=random) * 2 * self.budget
        return self.depth * drawn.clamp(max=1.0) + 0.0 * self.head(patches).squeeze(-1)


class LivesByLayer(Lives):
    """The control: every layer asks anew, by chance, who stays."""

    def slim(self) -> AbstractContextManager[Record]:
        self.asked += self.depth - 1
        return reduce_tokens(self.model, schedule=dict.fromkeys(range(self.depth), 0.7),
                             how=Random())  # fmt: skip


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1)
Kind = Callable[..., Lives]


def lively(kind: Kind, seed: int) -> Lives:
    """Untrained, with lives that differ."""
    with seeded(seed):
        made = kind(untrained_reader(seed, 8, 2, 32, 3, 4))
        nn.init.normal_(made.head.weight, std=1.0)
    return made.eval()


@claim(control=LivesByLayer, unit="largest difference")
def what_is_gone_is_what_was_masked(kind: Kind, seed: int) -> Measured:
    """Image by image, logits with the dead masked out of every softmax and with the dead really
    gone are the same to 1e-5."""
    model, apart = lively(kind, seed), 0.0
    with torch.no_grad():
        for image in held_out_digits()[0][:8]:
            masked = model(image[None])
            with model.slim() as record:
                gone = model(image[None])
            assert record.counts, "nobody died"
            apart = max(apart, float((masked - gone).abs().max()))
    return at_most(apart, 1e-5)


@claim(control=LivesByLayer, unit="scorers asked in one pass")
def one_look_is_enough(kind: Kind, seed: int) -> Measured:
    """Patches go in several layers, and who goes is asked once."""
    model = lively(kind, seed)
    with torch.no_grad(), model.slim():
        model(held_out_digits()[0][:1])
    return at_most(model.asked, 1)


@cache
def trained(seed: int) -> Lives:
    """Reads digits with half of the patches' layers."""
    return _trained(Lives, seed)


@cache
def _trained(kind: Any, seed: int) -> Lives:
    with seeded(seed):
        model: Lives = kind(untrained_reader(seed, 8, 2, 32, 3, 4))
    fit(model, Digits(), steps=200, size=64, rate=6e-3, seed=seed)
    return model.eval()


def right(model: Lives) -> float:
    images, labels = held_out_digits()
    with torch.no_grad():
        return float((model(images).argmax(-1) == labels).float().mean())


@claim(control=LivesByChance, unit="accuracy above random lives", seeds=SEEDS, quick=False)
def lives_that_are_learned_are_worth_more(kind: Kind, seed: int) -> Measured:
    """After training at half of the patches' layers, 3 points more of the digits are read than
    with lives drawn at random, for which a model was trained as well."""
    model, chance = _trained(kind, seed), _trained(LivesByChance, seed)
    found = right(model), right(chance)
    assert model.lives is not None
    return at_least(found[0] - found[1], 0.03, accuracy=found[0],
                    life=float(model.lives.mean()) / model.depth)  # fmt: skip
