"""Tokens that are not crucial are merged into the crucial ones that they resemble.

Dropping the patches that the class token overlooks loses what is in them. Here they are merged
instead: the class token's attention, mean over heads, says which k patches are crucial; each other
patch goes to the crucial one of the largest cosine similarity, and a group becomes the mean of its
members, weighted by their importance. Before any pruning, patches of several scales are fused into
one feature map, so that a token knows more than its own small square. Between three stages of a
vision transformer this cuts a third of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from headwise.compress import Reduction, reduce_tokens
from headwise.compress.tokens.matching import averaged, cosines
from headwise.compress.tokens.ranking import ClassAttention
from headwise.compress.tokens.reduction import groups_of, highest
from headwise.compress.tokens.sight import Sight
from headwise.papers import Measured, at_least, at_most, claim, paper, within
from headwise.papers.digit_readers import (
    share_right,
    trained_reader,
    untrained_reader,
)


@paper(
    title="Multi-Scale And Token Mergence: Make Your ViT More Efficient",
    source="arXiv 2306.04897",
    year=2023,
    modality="image",
    plain="Patches that the class token overlooks are merged into the crucial patch that each "
    "resembles most, by importance; features of several scales are fused before.",
    equation=r"x'_j = \frac{\sum_{i \in G_j} a_i x_i}{\sum_{i \in G_j} a_i}, \quad "
    r"G_j = \{j\} \cup \{ i : j = \mathrm{argmax}_{c \in \mathcal{C}} \cos(x_i, x_c) \}",
    parts=("Attention",),
    reported="DeiT-S: 33 % less computation for 0.1 points of ImageNet accuracy.",
    unsure="Only the abstract was at hand: the weights of the mean, how scales are fused (here "
    "pooled maps, brought back to size and added with learned gates that begin at zero) and the "
    "stages (those of EViT) are ours.",
    taxonomy=("beyond/tokens",),
    use="""
from headwise.compress import reduce_tokens
from headwise.papers.digit_readers import held_out_digits, trained_reader
from headwise.papers.tokens.multiscale_token_merge import MergeIntoCrucial

with reduce_tokens(trained_reader(0, "mean"), keep=0.7, how=MergeIntoCrucial()) as record:
    logits = trained_reader(0, "mean")(held_out_digits()[0])
record.members(2)  # which patches each token of the first image holds
""",
)
@dataclass(frozen=True)
class MergeIntoCrucial(Reduction):
    """Keep the k patches that the class token attends to most, each merged with those of the
    others that resemble it most."""

    needs_class: ClassVar[bool] = True

    def __call__(self, tokens: Tensor, sight: Sight, k: int) -> tuple[Tensor, Tensor]:
        importance = sight.class_attention().mean(1)
        crucial = highest(importance, k)
        groups = groups_of(crucial, tokens.shape[1])
        alike = cosines(tokens.detach())
        columns = crucial[:, None].expand(-1, tokens.shape[1], -1)
        nearest = alike.gather(2, columns).argmax(-1)
        groups = torch.where(groups < 0, nearest, groups)
        return averaged(tokens, importance, groups, k), groups


class MultiScale(nn.Module):
    """Adds to a feature map `(batch, dim, high, wide)` what it looks like at coarser `scales`:
    means over squares, mapped by a matrix each and brought back to size. Gates begin at zero, so
    that a trained encoder computes what it did: `model.patches = nn.Sequential(model.patches,
    MultiScale(dim))`."""

    def __init__(self, dim: int, scales: Sequence[int] = (2, 4)) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.maps = nn.ModuleList(nn.Conv2d(dim, dim, 1) for _ in self.scales)
        self.gates = nn.Parameter(torch.zeros(len(self.scales)))

    def forward(self, x: Tensor) -> Tensor:
        found = x
        for scale, one, gate in zip(self.scales, self.maps, self.gates, strict=True):
            coarse = one(F.avg_pool2d(x, scale, ceil_mode=True))
            found = found + gate * F.interpolate(coarse, size=x.shape[2:], mode="nearest")
        return found


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1, 2)
Make = Callable[[], Reduction]


def dropping() -> Reduction:
    """The control: the same patches are crucial, the others are gone."""
    return ClassAttention("")


@dataclass(frozen=True)
class Elsewhere(MergeIntoCrucial):
    """The control: the others are merged into the crucial patch that they resemble least."""

    def __call__(self, tokens: Tensor, sight: Sight, k: int) -> tuple[Tensor, Tensor]:
        importance = sight.class_attention().mean(1)
        crucial = highest(importance, k)
        groups = groups_of(crucial, tokens.shape[1])
        columns = crucial[:, None].expand(-1, tokens.shape[1], -1)
        farthest = cosines(tokens.detach()).gather(2, columns).argmin(-1)
        groups = torch.where(groups < 0, farthest, groups)
        return averaged(tokens, importance, groups, k), groups


def drawn(seed: int, n: int = 24) -> tuple[Tensor, Sight]:
    """Tokens `(1, n, 8)` and the sight of two heads over them and a class token."""
    random = torch.Generator().manual_seed(seed)
    queries, keys = (torch.randn(1, 2, n + 1, 8, generator=random).double() for _ in range(2))
    tokens = torch.randn(1, n, 8, generator=random).double()
    sizes = torch.ones(1, n).double()
    return tokens, Sight(queries, keys, keys, 8**-0.5, 1, True, sizes, None, False, 0, 1)


@claim(control=Elsewhere, unit="largest difference")
def merged_as_written(make: Make, seed: int) -> Measured:
    """Against loops over tokens in float64, to 1e-6."""
    tokens, sight = drawn(seed)
    found = make()(tokens, sight, 7)[0][0]
    a = sight.class_attention().mean(1)[0].tolist()
    x = [row / row.norm() for row in tokens[0]]
    crucial = sorted(sorted(range(24), key=lambda i: -a[i])[:7])
    groups: dict[int, list[int]] = {j: [j] for j in crucial}
    for i in set(range(24)) - set(crucial):
        groups[crucial[int(torch.stack([x[i] @ x[j] for j in crucial]).argmax())]].append(i)
    want = torch.stack(
        [
            sum((a[i] * tokens[0, i] for i in groups[j]), torch.zeros(8).double())
            / sum(a[i] for i in groups[j])
            for j in crucial
        ]
    )
    return at_most(float((found - want).abs().max()), 1e-6)


@claim(control=dropping, unit="share of the weighted sum that is lost")
def the_weighted_sum_stays(make: Make, seed: int) -> Measured:
    """The sum of all tokens by importance is that of the merged ones by the importance of their
    groups, to 1e-6; dropping loses what was dropped."""
    tokens, sight = drawn(seed)
    small, groups = make()(tokens, sight, 7)
    a = sight.class_attention().mean(1)
    weights = torch.zeros(1, 8).double().scatter_add(1, groups % 8, a)[:, :7]  # -1 is the eighth
    before, after = (a[..., None] * tokens).sum(1), (weights[..., None] * small).sum(1)
    return at_most(float((before - after).norm() / before.norm()), 1e-6)


@dataclass(frozen=True)
class Late(MergeIntoCrucial):
    """The control: tokens go after the layer instead of before its MLP, and only half as many."""

    place: ClassVar[str] = "after"

    def __call__(self, tokens: Tensor, sight: Sight, k: int) -> tuple[Tensor, Tensor]:
        return super().__call__(tokens, sight, (k + tokens.shape[1]) // 2)


@claim(control=Late, unit="share of the work")
def a_third_of_the_work_goes(make: Make, seed: int) -> Measured:
    """Counted on a DeiT-S (12 layers of 384, 196 patches), 0.7 of the patches kept at each of
    three stages: two thirds of it is left, as the paper reports."""
    model = untrained_reader(seed, 224, 16, 384, 12, 6, "first").eval()
    image = torch.zeros(1, 1, 224, 224)

    def counted() -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(image)
        return counter.get_total_flops()

    whole = counted()
    with reduce_tokens(model, keep=0.7, how=make()):
        return within(counted() / whole, 0.67, 0.03)


@claim(control=dropping, unit="points of accuracy above dropping", seeds=SEEDS, quick=False)
def what_is_merged_still_counts(make: Make, seed: int) -> Measured:
    """Where the answer is read off all tokens, and 8, 3 and 1 of 16 patches are crucial in the
    three layers: without training for it, merging is right on a point more than dropping."""
    model = trained_reader(seed, "mean")
    found = []
    for way in (make(), dropping()):
        with reduce_tokens(model, schedule={0: 8, 1: 3, 2: 1}, how=way):
            found.append(share_right(model))
    return at_least(found[0] - found[1], 0.01, merged=found[0], dropped=found[1])
