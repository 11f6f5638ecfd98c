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
    """Two layers of ten random heads of 16 in a width of 160; one direction goes from head 3 of the
    first to the keys of head 7 of the second."""
    with seeded(seed):
        model = Decoder(8, 160, 2, lambda layer: Attention(160, 10), norm=nn.Identity) \
            if False else _random(seed)
    return model


def _random(seed: int) -> Decoder:
    with seeded(seed):
        model = Decoder(
            8, 160, 2, mixer=lambda layer: Attention(160, 10, causal=True), norm=nn.Identity
        )
    look = model_view(model)
    direction = torch.nn.functional.normalize(torch.randn(160), dim=0)
    first, second = look.attentions
    with torch.no_grad():
        out, key = first.output_weight()[3], second.key_weight()[7]
        out[:, 5] = direction * out[:, 5].norm()
        key[2] = direction * key[2].norm()
    return model
