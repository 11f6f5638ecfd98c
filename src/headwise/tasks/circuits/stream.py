"""Weights written by hand: a residual stream with named parts, and heads that move them.

A head is two matrices over the stream: where it looks, scores x_i^T Q x_j, and what it carries,
sum_j P_ij O x_j. Both are sums of blocks between named parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.models.backbones.decoder import Decoder
from headwise.models.backbones.stack import MakeFeed
from headwise.parts import Attention
from headwise.parts.feed.mlp import Mlp
from headwise.parts.position.absolute import Learned
from headwise.parts.project.heads import MultiHead

SHARP = 12.0
"""Score of what a head looks for, over what it does not: weights of 1 - n e^-12."""
LOUD = 30.0
"""What decoys write: far more than any part of a circuit does."""

Block = tuple[str, str, Tensor | float]
"""From one part of the stream to another; a number stands for that many times the identity (on
the smaller of the two)."""


class Stream:
    """Names for the coordinates of a residual stream: `Stream(token=16, out=16)["out"]` is a slice.

    The part `place` is a one-hot position, which attentions see (it is added to what they read,
    and is not in the residual stream itself).
    """

    def __init__(self, **sizes: int) -> None:
        self.parts: dict[str, slice] = {}
        self.width = 0
        for name, size in sizes.items():
            self.parts[name] = slice(self.width, self.width + size)
            self.width += size

    def __getitem__(self, name: str) -> slice:
        return self.parts[name]

    def size(self, name: str) -> int:
        part = self.parts[name]
        return part.stop - part.start

    def matrix(self, *blocks: Block) -> Tensor:
        """`(width, width)`, rows by the first name: the sum of the blocks."""
        made = torch.zeros(self.width, self.width)
        for row, column, block in blocks:
            if not isinstance(block, Tensor):
                block = block * torch.eye(self.size(row), self.size(column))
            made[self[row], self[column]] += block
        return made

    def always(self, column: str, wanted: Tensor, strength: float = SHARP) -> Block:
        """A block of scores that every query has: `wanted` `(size,)` of the key's part."""
        return "place", column, strength * wanted.expand(self.size("place"), -1)

    def loud(self, source: str, strength: float = LOUD) -> Tensor:
        """What a decoy carries: the part `source` to the part `unread`, which nobody reads."""
        return self.matrix(("unread", source, strength))

    def sink(self) -> Tensor:
        """Where a sink looks: at the first token, whatever the query is."""
        return self.matrix(self.always("place", torch.eye(self.size("place"))[0]))

    def back(self, distance: int) -> Tensor:
        """Where a head looks that goes `distance` tokens back."""
        n = self.size("place")
        return self.matrix(
            ("place", "place", SHARP * torch.ones(n).diag().roll(distance, 0).tril(-distance))
        )


def attention(stream: Stream, heads: int, causal: bool = True) -> Attention:
    """An attention over a stream whose heads do nothing yet; with a part `place`, positions."""
    made = Attention(
        stream.width,
        heads,
        project=MultiHead(head_dim=stream.width),
        position=Learned(stream.size("place")) if causal else None,
        causal=causal,
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        if causal:
            position: Any = made.position
            position.table[:, stream["place"]] = torch.eye(stream.size("place"))
    return made


@torch.no_grad()
def write_head(module: Any, head: int, looks: Tensor, carries: Tensor) -> None:
    """Head number `head` of an attention: scores x_i^T looks x_j, output carries x_j, both
    `(width, width)`."""
    width = len(looks)
    rows = slice(head * width, (head + 1) * width)
    module.project.query.weight[rows] = looks.T * width**0.5  # scores are divided by that
    module.project.key.weight[rows] = torch.eye(width)
    module.project.value.weight[rows] = carries
    module.merge.linear.weight[:, rows] = torch.eye(width)  # head outputs are what is added


def decoder(
    stream: Stream,
    vocabulary: int,
    layers: list[list[tuple[Tensor, Tensor]]],
    embedding: Mapping[str, Tensor],
    unembedding: Mapping[str, Tensor],
    feed: MakeFeed | None = None,
) -> Decoder:
    """A decoder without norms. layers: for each layer, for each head, where it looks and what it
    carries. embedding, unembedding: part of the stream -> `(vocabulary, size)`."""
    model = Decoder(
        vocabulary,
        stream.width,
        len(layers),
        mixer=lambda layer: attention(stream, len(layers[layer])),
        feed=(lambda layer: None) if feed is None else feed,
        norm=lambda width: nn.Identity(),
        tied=False,
    )
    weights: Any = model
    with torch.no_grad():
        for table, parts in (
            (weights.embed.weight, embedding),
            (weights.head.linear.weight, unembedding),
        ):
            table.zero_()
            for part, block in parts.items():
                table[:, stream[part]] = block
        for module, heads in zip(model.stack.mixers, layers, strict=True):
            for number, (looks, carries) in enumerate(heads):
                write_head(module, number, looks, carries)
    return model.eval()


def blank_mlp(stream: Stream, hidden: int) -> Mlp:
    """A feed-forward layer with ReLU that does nothing yet."""
    made = Mlp(stream.width, hidden, F.relu)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    return made
