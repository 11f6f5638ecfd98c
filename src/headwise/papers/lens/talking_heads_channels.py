"""Channels of a few dimensions between heads of different layers.

A head that inhibits others, or marks an item of a list, must tell later heads something. The paper
asks where in the residual stream it does, from weights alone: the writer's W_OV is cut into its
singular components s u v^T, and each is scored against a later head's W_QK or W_OV by the usual
composition score. A component that later heads read stands far above the rest, also where the score
of the whole matrix, in which it is one of head_dim, shows nothing. That is a communication channel,
and it is a handle: scale what the head writes along u, or take the component out of the weights,
and the reader is steered.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.instruments.composition_scores import composition, composition_by_component
from headwise.instruments.examples import model_view
from headwise.instruments.folded import attention_at
from headwise.instruments.qk_ov import ov
from headwise.models import ModelView, Site, observe, touching
from headwise.models.backbones import Decoder
from headwise.papers import Measured, Picture, at_least, claim, paper, picture
from headwise.parts import Attention, Rotary
from headwise.tasks import WanderingRepeat
from headwise.train import fit, seeded

Head = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Channel:
    """A singular component of a writer that a reader reads. score: |A u| / |A|; strength: s;
    direction: u `(width,)`."""

    writer: Head
    component: int
    reader: Head
    kind: str
    score: float
    strength: float
    direction: Tensor

    def scaled(self, model: nn.Module | ModelView, factor: float) -> AbstractContextManager[None]:
        """While this lasts, the writer's output along the direction is multiplied by `factor`;
        0 is the model whose W_OV lacks the component."""
        return scaled(model, self.writer, self.direction[:, None], factor)


def scaled(
    model: nn.Module | ModelView, writer: Head, directions: Tensor, factor: float
) -> AbstractContextManager[None]:
    """What a head writes along orthonormal directions `(width, k)`, times `factor`."""
    view = model_view(model)
    layer, head = writer
    weight = attention_at(view, layer).output_weight()[head].detach().double()
    # the heads' outputs are before W_O: what moves them along u there is its pseudo-inverse
    back = (torch.linalg.pinv(weight) @ directions.to(weight)).mT
    along = (directions.to(weight).mT @ weight).mT

    def write(out: Tensor) -> Tensor:
        one = out[:, :, head]
        moved = one + (factor - 1) * (one @ along.to(one)) @ back.to(one)
        return torch.cat([out[:, :, :head], moved[:, :, None], out[:, :, head + 1 :]], 2)

    return touching(view, {Site("heads", layer): write})


@paper(
    title="Talking Heads: Understanding Inter-layer Communication in Transformer Language Models",
    source="arXiv 2406.09519",
    year=2024,
    modality="text",
    plain="Cut what a head writes into singular components and score each against later heads: "
    "single directions come out over which heads signal to each other.",
    equation=r"\mathrm{CS}(u_i s_i v_i^\top, W) = \frac{\lVert W u_i s_i v_i^\top \rVert_F}"
    r"{\lVert W \rVert_F \, \lVert u_i s_i v_i^\top \rVert_F}",
    parts=(),
    reported="In GPT-2 small inhibition heads signal to mover heads over one or two dimensions; "
    "setting them improves recall from lists of items, often by over 20 %.",
    unsure="The channels are those of GPT-2 small there. Here a two-layer model is trained on "
    "induction, whose channel carries which token it was, and so has more than two dimensions.",
    taxonomy=("beyond/analysis",),
    use="""
from headwise.models.backbones import Decoder
from headwise.papers.lens.talking_heads_channels import channels
from headwise.parts import Attention
import torch

model = Decoder(32, 64, 2, mixer=lambda layer: Attention(64, 4, causal=True))
best = channels(model, (0, 1))[0]
with best.scaled(model, 0.0):
    model(torch.zeros(1, 8, dtype=torch.long))
""",
)
def channels(
    model: nn.Module | ModelView, writer: Head, kinds: tuple[str, ...] = ("q", "k", "v")
) -> list[Channel]:
    """Every component of a writer against every later head, the highest score first."""
    u, s, _ = ov(model, *writer).svd()
    scores = composition_by_component(model, writer, kinds)
    found = [
        Channel(writer, i, reader, kind, float(score), float(s[i]), u[:, i])
        for kind, readers in scores.items()
        for reader, each in readers.items()
        for i, score in enumerate(each)
    ]
    return sorted(found, key=lambda channel: -channel.score)


# -- planted: one direction between two of a hundred pairs of heads


def planted(seed: int) -> Decoder:
    """Two layers of ten random heads of 16. One direction goes from head 3 of the first to the keys
    of head 7 of the second, half as strong as what else the head writes, and apart from it."""
    with seeded(seed):
        model = Decoder(
            8, 160, 2, mixer=lambda layer: Attention(160, 10, causal=True), norm=nn.Identity
        )
        direction = nn.functional.normalize(torch.randn(160), dim=0)
    first, second = model_view(model).attentions
    with torch.no_grad():
        out, value = first.output_weight()[3], first.value_weight()[3]
        size, read = out.norm(dim=0).mean(), nn.functional.normalize(value[5], dim=0)
        value -= torch.outer(value @ read, read)
        value[5] = read * value[4].norm()
        out -= torch.outer(direction, direction @ out)
        out[:, 5] = 0.5 * size * direction
        key = second.key_weight()[7]
        key[2] = direction * key[2].norm()
    return model


def by_component(model: nn.Module) -> dict[tuple[Head, Head], float]:
    """K-composition of every pair: its best component."""
    return {
        ((0, writer), reader): float(each.max())
        for writer in range(10)
        for reader, each in composition_by_component(model, (0, writer), ("k",))["k"].items()
    }


def by_whole_matrix(model: nn.Module) -> dict[tuple[Head, Head], float]:
    """The control: the score as it was before the paper."""
    return {(p.writer, p.reader): p.score for p in composition(model, ("k",)).top(100)}


@claim(
    subject=by_component,
    control=by_whole_matrix,
    unit="standard deviations above the other pairs",
    seeds=(0, 1, 2),
)
def one_direction_is_found_among_a_hundred_pairs(score: Any, seed: int) -> Measured:
    """The pair that shares one direction of 16 stands 6 standard deviations above the 99 others by
    its best component; by the whole matrices it does not."""
    scores = score(planted(seed))
    pair = scores.pop(((0, 3), (1, 7)))
    rest = np.array(list(scores.values()))
    return at_least((pair - rest.mean()) / rest.std(), 6.0, score=pair, others=float(rest.max()))


# -- trained: what a two-layer model says to itself when it repeats


def task() -> WanderingRepeat:
    """Eight tokens repeated at a distance that is drawn."""
    return WanderingRepeat()


@cache
def trained(seed: int) -> Decoder:
    """Two layers of four heads, without feed-forward layers."""
    with seeded(seed):
        model = Decoder(
            task().vocabulary,
            64,
            2,
            mixer=lambda layer: Attention(64, 4, position=Rotary(base=100.0), causal=True),
            feed=lambda layer: None,
        )
    fit(model, task(), steps=400, size=64, rate=5e-3, seed=seed, target=0.02)
    return model.eval()


def right(model: nn.Module) -> float:
    """Share of the second copy that is said right."""
    batch = task().batch(0, 256, "test")
    with torch.no_grad():
        said = model(batch.inputs["input_ids"]).argmax(-1)
    asked = batch.targets >= 0
    return float((said == batch.targets)[asked].float().mean())


def by_keys(model: nn.Module) -> Head:
    """The writer of the highest K-composition."""
    return composition(model, ("k",)).top(1)[0].writer


def by_values(model: nn.Module) -> Head:
    """The control: of the highest V-composition, which induction has no use for."""
    return composition(model, ("v",)).top(1)[0].writer


@claim(
    subject=by_keys,
    control=by_values,
    unit="mass on the previous token, over the mean of the other heads",
    seeds=(0, 1, 2),
    quick=False,
)
def weights_name_the_previous_token_head(name: Callable[[nn.Module], Head], seed: int) -> Measured:
    """The head that K-composition names, without running the model, puts at least 0.3 more of its
    attention on the previous token than the other heads of its layer do on average."""
    model = trained(seed)
    masses: list[Tensor] = []
    with (
        torch.no_grad(),
        observe(
            model_view(model),
            lambda r: masses.append(r.map.dense().diagonal(-1, -2, -1).mean((0, 2))),
        ),
    ):
        model(task().batch(0, 64, "test").inputs["input_ids"])
    mass, head = masses[0], name(model)[1]
    others = (mass.sum() - mass[head]) / (len(mass) - 1)
    return at_least(mass[head] - others, 0.3, named=mass[head], others=others)


def channel(model: nn.Module, seed: int) -> list[Tensor]:
    """Four components of the named head: those of the highest score times strength."""
    pair = composition(model, ("k",)).top(1)[0]
    found = [c for c in channels(model, pair.writer, ("k",)) if c.reader == pair.reader]
    found.sort(key=lambda c: -c.score * c.strength)
    return [torch.stack([c.direction for c in found[:4]], 1)]


def any_components(model: nn.Module, seed: int) -> list[Tensor]:
    """The control: four components of the same head, drawn five times."""
    u = ov(model, *by_keys(model)).svd()[0]
    draw = torch.Generator().manual_seed(seed)
    return [u[:, torch.randperm(u.shape[1], generator=draw)[:4]] for _ in range(5)]


@claim(
    subject=channel,
    control=any_components,
    unit="accuracy lost",
    seeds=(0, 1, 2),
    quick=False,
)
def without_the_channel_the_model_forgets(choose: Any, seed: int) -> Measured:
    """Zeroing four of sixteen components of one head, chosen by composition, costs at least 0.12 of
    the accuracy (chance is 0.03); four of the same head's at random cost less.

    The paper's channels have one or two dimensions and carry a flag; which of 32 tokens came before
    takes more. Both are zeroed in what the head writes, which is what zeroing them in W_OV does.
    """
    model = trained(seed)
    before, after = right(model), []
    for directions in choose(model, seed):
        with scaled(model, by_keys(model), directions, 0.0):
            after.append(right(model))
    return at_least(before - float(np.mean(after)), 0.12, before=before)


@picture
def components() -> Picture:
    """Scores of each component of the previous-token head of a trained model, for each reader."""
    model = trained(0)
    scores = composition_by_component(model, by_keys(model), ("k",))["k"]
    return Picture(
        title="K-composition of a previous-token head, component by component",
        x="component, the strongest first",
        y="score",
        lines={
            f"L{layer}H{head}": (list(range(len(each))), each.tolist())
            for (layer, head), each in scores.items()
        },
    )
