"""Ways to rank patches: by what the class token looks at, by what all look at, by chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headwise.compress.tokens.reduction import Ranked
from headwise.compress.tokens.sight import Sight

FUSES = ("", "scores", "mean")


@dataclass(frozen=True)
class ClassAttention(Ranked):
    """Keep what the class token looks at, mean over heads (EViT, Liang et al. 2022, arXiv
    2202.07800, section 3.2). `fuse`: what becomes of the rest, see `Ranked`."""

    fuse: str = "scores"
    needs_class: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fuse(self.fuse)

    def scores(self, sight: Sight) -> Tensor:
        return sight.class_attention().mean(1)


@dataclass(frozen=True)
class ReceivedMass(Ranked):
    """Keep what all tokens look at: mean attention received, over queries and heads (column sums
    of the map, without its matrix). Needs no class token."""

    fuse: str = ""

    def __post_init__(self) -> None:
        check_fuse(self.fuse)

    def scores(self, sight: Sight) -> Tensor:
        return sight.received().mean(1)


@dataclass(frozen=True)
class Random(Ranked):
    """The control: patches drawn by chance, from `seed` and the layer, anew for each image."""

    seed: int = 0
    fuse: str = ""
    needs_map: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fuse(self.fuse)

    def scores(self, sight: Sight) -> Tensor:
        random = torch.Generator().manual_seed(1000003 * self.seed + sight.layer)
        return torch.rand(sight.sizes.shape, generator=random).to(sight.sizes.device)


@dataclass(frozen=True)
class Flow(Ranked):
    """Keep what counted over the layers so far, not in one alone (FlowCut, Tong et al. 2025, arXiv
    2505.19536, section 4).

    In each layer a patch's score is (class attention + similarity of its value to the class
    token's, each a distribution over patches) times the l1 norm of its value; scores are carried
    on as `decay` times the old and 1 - decay times the new. Where the schedule says None, the
    number of patches follows the entropy H of the class attention over n patches, with `target`
    left at the end and r layers to come: (n - target) / sqrt(r) * (1 - (H / log n)^2) of them go,
    as many as the sharpest image of the batch says; in the last layer all but `target`. The form
    of both is that of the authors' package (flowcut 1.0.1).
    """

    target: int = 1
    decay: float = 0.5
    place: ClassVar[str] = "after"
    watches: ClassVar[bool] = True
    needs_class: ClassVar[bool] = True

    def scores(self, sight: Sight) -> Tensor:
        assert sight.state is not None
        return sight.state

    def observe(self, sight: Sight) -> Tensor:
        relation = sight.class_attention().mean(1)
        values, first = sight.values, sight.values[:, :, :1]
        likeness = (first @ values.transpose(-1, -2)).softmax(-1)[:, :, 0, sight.special :].mean(1)
        amount = values.mean(1)[:, sight.special :].norm(p=1, dim=-1)
        new = (_share(relation) + _share(likeness)) * amount
        return new if sight.state is None else self.decay * sight.state + (1 - self.decay) * new

    def count(self, sight: Sight) -> int:
        n, left = sight.patches, sight.depth - 1 - sight.layer
        if left == 0 or n <= self.target:
            return min(n, self.target)
        p = _share(sight.class_attention().mean(1))
        sharpness = 1 - (torch.special.entr(p).sum(1) / torch.log(torch.tensor(float(n)))) ** 2
        gone = (n - self.target) / left**0.5 * float(sharpness.max())
        return max(n - round(gone), self.target)


def _share(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True)


def check_fuse(fuse: str) -> None:
    if fuse not in FUSES:
        raise ValueError(f"fuse={fuse!r}: expected one of {', '.join(map(repr, FUSES))}")
