"""Vision tokens are judged by what flowed through them in all layers so far.

Pruning by one layer's attention contradicts itself: what a layer ignores the next may need. FlowCut
looks at the flow of information instead. The class token is its relay, so that its row stands for
the many-step flow; a token's score in one layer is its share of that row plus the likeness of its
value to the class token's, times the l1 norm of its value; scores are carried on from layer to
layer, half the old and half the new. How many tokens go is asked anew at every second layer: the
sharper the class token's row (the lower its entropy), and the fewer layers are left, the more.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.compress import reduce_tokens
from headwise.compress.tokens.ranking import Flow, Random
from headwise.compress.tokens.record import Record
from headwise.compress.tokens.sight import Sight
from headwise.models import view
from headwise.models.backbones import VisionPatches
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture
from headwise.papers.digit_readers import share_right, trained_reader
from headwise.parts import Attention


@paper(
    title="FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language "
    "Models",
    source="arXiv 2505.19536",
    year=2025,
    modality="multimodal",
    plain="Vision tokens go layer by layer, by scores that are carried on over layers and in "
    "numbers that follow the entropy of the class token's attention.",
    equation=r"I_l = \tfrac12 I_{l-1} + \tfrac12 (a_l + b_l) \lVert v_l \rVert_1, \qquad "
    r"\Delta n_l = \frac{n - n^*}{\sqrt{L - l}} \Big(1 - \big(\tfrac{H(a_l)}{\log n}\big)^2\Big)",
    parts=("Attention",),
    reported="LLaVA-1.5-7B: 1.6 % above the best before at 88.9 % fewer tokens; LLaVA-NeXT: 4.3 % "
    "at 94.4 %, prefill 3.2 times as quick.",
    unsure="The rule for the number of tokens and the weights are those of the authors' package "
    "(flowcut 1.0.1, for CLIP); pruning goes on there inside the language model, here it ends "
    "with the vision encoder.",
    taxonomy=("beyond/tokens",),
    use="""
from headwise.papers.digit_readers import held_out_digits, trained_reader
from headwise.papers.tokens.flowcut import flowcut

with flowcut(trained_reader(0), target=4) as record:
    logits = trained_reader(0)(held_out_digits()[0])
record.counts  # layer -> how many patches it left
""",
)
def flowcut(model: Any, target: int, every: int = 2) -> AbstractContextManager[Record]:
    """A vision encoder that ends with `target` patches. Tokens go after the layers that have a
    multiple of `every` layers behind them, the last one among them."""
    return _flowing(model, Flow(target), every)


def by_chance(model: Any, target: int, every: int = 2) -> AbstractContextManager[Record]:
    """The control: as many tokens after the same layers, drawn at random."""
    return _flowing(model, _AnyFlow(target), every)


def by_one_layer(model: Any, target: int, every: int = 2) -> AbstractContextManager[Record]:
    """The control: nothing is carried on, each layer judges for itself."""
    return _flowing(model, Flow(target, decay=0.0), every)


def evenly(model: Any, target: int, every: int = 2) -> AbstractContextManager[Record]:
    """The control: numbers that do not ask the map."""
    return _flowing(model, _EvenFlow(target), every)


@dataclass(frozen=True)
class _AnyFlow(Flow):
    def scores(self, sight: Sight) -> Tensor:
        return Random().scores(sight)


@dataclass(frozen=True)
class _EvenFlow(Flow):
    def count(self, sight: Sight) -> int:
        left = sight.depth - 1 - sight.layer
        gone = (sight.patches - self.target) / (left**0.5) * 0.5 if left else sight.patches
        return max(sight.patches - round(gone), self.target)


def _flowing(model: Any, flow: Flow, every: int) -> AbstractContextManager[Record]:
    depth = len(view(model).layers)
    layers = [layer for layer in range(depth) if (depth - 1 - layer) % every == 0]
    return reduce_tokens(model, schedule=dict.fromkeys(layers), how=flow)


# -- experiments ----------------------------------------------------------------------------------

Way = Callable[..., AbstractContextManager[Record]]
SEEDS = (0, 1, 2)
PATCHES = 36


class Planted(torch.nn.Module):
    """Class attentions that are given: layer -> logits of patches `(PATCHES,)`, values alike.

    The first two features are where keys say their logit, layer by layer; the residual is not
    changed, so that tokens stay what they were.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        depth = len(logits)
        self.model = VisionPatches(
            6,
            1,
            8 * depth,
            depth,
            mixer=lambda layer: Attention(8 * depth, 1),
            channels=depth,
            class_token=True,
            positions=None,
        )
        self.logits = logits
        stack: Any = self.model.stack
        patches: Any = self.model.patches
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()
            class_token: Any = self.model.class_token
            class_token[-1] = 1.0  # says: ask
            for layer, mixer in enumerate(stack.mixers):
                patches.weight[layer, layer] = 1.0
                mixer.project.query.weight[0, -1] = (8 * depth) ** 0.5
                mixer.project.key.weight[0, layer] = 1.0
                mixer.project.value.weight[1, -2] = 1.0  # all values alike
            patches.bias[-2] = 1.0
            class_token[-2] = 1.0
        for place in stack.wiring.norms.values():
            for i in range(depth):
                place[i] = torch.nn.Identity()

    def images(self) -> Tensor:
        """One image whose patches hold their logits of each layer `(1, depth, 6, 6)`."""
        return self.logits.view(1, len(self.logits), 6, 6)


@claim(control=by_one_layer, unit="share of the tokens that matter among those kept")
def flow_outlives_a_contradiction(way: Way, seed: int) -> Measured:
    """12 tokens matter in every layer, 12 others draw more attention in the layer where tokens go
    and none before: 9 of 10 that matter stay; a single layer's scores keep under 6 of 10."""
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(PATCHES, generator=random)
    matter, distract = order[:12], order[12:24]
    logits = torch.full((4, PATCHES), -3.0)
    logits[:, matter] = 2.0
    logits[3, distract] = 2.5
    planted = Planted(logits)
    with torch.no_grad(), way(planted.model, 12, 4) as record:
        planted.model(planted.images())
    return at_least(float((record.kept(3)[0, matter] >= 0).float().mean()), 0.9)


@claim(control=evenly, unit="tokens that go more where attention is sharper")
def the_sharper_the_more_go(way: Way, seed: int) -> Measured:
    """After the first of two layers, a sharp row (a few tokens have it all) takes out at least 10
    tokens of 36 more than a flat one."""
    random = torch.randn(2, PATCHES, generator=torch.Generator().manual_seed(seed))
    gone = []
    for scale in (0.1, 6.0):
        planted = Planted(scale * random)
        with torch.no_grad(), way(planted.model, 4, 1) as record:
            planted.model(planted.images())
        assert record.counts[1] == 4  # the budget is met to the token
        gone.append(PATCHES - record.counts.get(0, PATCHES))
    return at_least(gone[1] - gone[0], 10, flat=gone[0], sharp=gone[1])


@claim(control=by_chance, unit="accuracy lost", seeds=SEEDS, quick=False)
def a_quarter_of_the_tokens_is_enough(way: Way, seed: int) -> Measured:
    """A model trained with 16 patches loses at most 0.8 points with a target of 2; where the same
    numbers are drawn at random, more."""
    model = trained_reader(seed)
    whole = share_right(model)
    with way(model, 2, 1):
        lost = whole - share_right(model)
    return at_most(lost, 0.008, whole=whole)


@picture
def entropy_and_counts() -> Picture:
    """Patches left after the first of two layers, by how sharp the class token's row is."""
    random = torch.randn(2, PATCHES, generator=torch.Generator().manual_seed(0))
    scales = [0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0]
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for name, way in (("FlowCut", flowcut), ("evenly (control)", evenly)):
        left: list[float] = []
        for scale in scales:
            planted = Planted(scale * random)
            with torch.no_grad(), way(planted.model, 4, 1) as record:
                planted.model(planted.images())
            left.append(record.counts.get(0, PATCHES))
        lines[name] = (scales, left)
    return Picture(
        title="The sharper the attention, the fewer patches are left after the first layer",
        x="deviation of the class token's scores, nats",
        y="patches left of 36 (4 after the second)",
        lines=lines,
    )
