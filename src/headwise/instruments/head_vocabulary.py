"""What heads and neurons say in words: their directions read out in the vocabulary.

A head's W_OV = sum_i s_i u_i v_i^T: where it attends to tokens along v_i it writes u_i, which the
unembedding turns into tokens promoted (Dar et al. 2022, arXiv 2209.02535; Millidge and Black 2022,
The singular value decompositions of transformer weight matrices are highly interpretable). W_QK in
the same way gives pairs of a query's tokens and a key's. A neuron's value vector, its column of the
last projection, is read out as it is (Geva et al. 2022, arXiv 2203.14680).

Folded in: gains and centring of the norms on either side. Left out: division by a norm's size,
positions, biases and whatever stands between. The sign of a singular pair is free, (u, v) and
(-u, -v) are one component: so every direction has two sides, each with what it reads and writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.instruments.examples import model_view
from headwise.instruments.folded import attention_at
from headwise.instruments.qk_ov import ov, qk
from headwise.instruments.readout import output_stack
from headwise.instruments.token_tables import as_read, embedding_table, linear_head
from headwise.instruments.tokens import Tokens
from headwise.models import ModelView, UnsupportedModelError
from headwise.models.projections import features_first
from headwise.models.spots import down_projection

__all__ = [
    "Direction",
    "Words",
    "attended",
    "neurons_say",
    "said",
    "token_logits",
    "written",
    "written_by_all",
]


@dataclass(frozen=True)
class Words:
    """The tokens with the largest numbers, the largest first. ids, texts (the ids where there is no
    tokenizer), and what each got."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    logits: tuple[float, ...]

    def __str__(self) -> str:
        return " ".join(repr(text) for text in self.texts)


@dataclass(frozen=True)
class Direction:
    """One singular component of a circuit, with its two sides.

    strength: its singular value; share: of the matrix's squared norm. For OV `reads` -> `writes`,
    and `reads_other` -> `writes_other`; for QK reads are the query's tokens, writes the key's.
    """

    strength: float
    share: float
    reads: Words
    writes: Words
    reads_other: Words
    writes_other: Words


def written(
    model: nn.Module | ModelView,
    layer: int,
    head: int,
    tokenizer: Any | None = None,
    directions: int = 3,
    top: int = 8,
) -> list[Direction]:
    """What a head of the answering stack writes: the strongest components of its W_OV.

    `reads`: tokens whose embedding lies most along v, as the head reads a token alone. `writes`:
    logits promoted when it does, for an embedding of as much as the size of a norm's output.
    Of the two sides the one comes first whose writes are the more extreme.

    Raises ValueError for a head that is not there, UnsupportedModelError where weights, gains, an
    embedding or an unembedding are not known.
    """
    view = model_view(model)
    tokens, words = _embedded(view, layer), _words(view, tokenizer)
    return _written(view, (layer, head), tokens, words, directions, top)


def written_by_all(
    model: nn.Module | ModelView, tokenizer: Any | None = None, top: int = 8
) -> dict[tuple[int, int], Direction]:
    """The strongest component of every head of the answering stack: (layer, head) -> what
    `written` gives first. Raises as `written`."""
    view = model_view(model)
    words, stack = _words(view, tokenizer), output_stack(view)
    made: dict[tuple[int, int], Direction] = {}
    for attention in view.attentions:
        if attention.stack == stack and attention.kind == "self":
            tokens = _embedded(view, attention.layer)
            for head in range(attention.heads):
                at = (attention.layer, head)
                (made[at],) = _written(view, at, tokens, words, 1, top)
    return made


def _written(
    view: ModelView,
    at: tuple[int, int],
    tokens: Tensor,
    words: Tokens,
    directions: int,
    top: int,
) -> list[Direction]:
    u, s, vh = ov(view, *at, stack=output_stack(view)).svd()
    wrote = token_logits(view, (u * s)[:, :directions].mT).mT
    return _directions(s, tokens @ vh[:directions].mT, wrote, words, top)


def attended(
    model: nn.Module | ModelView,
    layer: int,
    head: int,
    tokenizer: Any | None = None,
    directions: int = 3,
    top: int = 8,
    offset: int = 0,
) -> list[Direction]:
    """Which queries look for which keys: the strongest components of a head's W_QK, `reads` being
    the query's tokens and `writes` the key's; `offset` as in `qk`. Raises as `written`."""
    view = model_view(model)
    circuit = qk(view, layer, head, offset=offset, stack=output_stack(view))
    u, s, vh = circuit.svd()
    tokens = _embedded(view, layer)
    asked, keys = tokens @ u[:, :directions], tokens @ (vh[:directions].mT * s[:directions])
    return _directions(s, asked, keys, _words(view, tokenizer), top)


def neurons_say(
    model: nn.Module | ModelView,
    layer: int,
    neurons: Sequence[int] | None = None,
    tokenizer: Any | None = None,
    top: int = 8,
) -> list[tuple[Words, Words]]:
    """For each neuron of a layer (all by default), the tokens that its value vector promotes and
    those that it suppresses (their logits are negative).

    Raises ValueError for a layer or neuron that is not there, UnsupportedModelError where there is
    no single last projection, or no unembedding.
    """
    view = model_view(model)
    stack = output_stack(view)
    found = next((x for x in view.layers if x.stack == stack and x.index == layer), None)
    if found is None:
        raise ValueError(f"layer={layer}: stack {stack} has {len(view.layers)} layers")
    weight = features_first(down_projection(found)).detach()
    chosen = range(weight.shape[1]) if neurons is None else neurons
    bad = [n for n in chosen if not 0 <= n < weight.shape[1]]
    if bad:
        raise ValueError(f"neurons {bad[:3]}: layer {layer} has 0 to {weight.shape[1] - 1}")
    logits = token_logits(view, weight[:, list(chosen)].mT.double())
    words = _words(view, tokenizer)
    return [(said(row, words, top), said(row, words, top, least=True)) for row in logits]


def token_logits(model: nn.Module | ModelView, directions: Tensor) -> Tensor:
    """What directions `(..., width)` of the residual add to the logits `(..., vocabulary)`, but for
    the division by the final norm's size. Raises UnsupportedModelError where nothing linear does.
    """
    view = model_view(model)
    table, final = linear_head(view)
    seen = final.after_output(directions.reshape(-1, view.width).mT)
    # the table in pieces: a copy of it in float64 would be twice as large as the model's own
    parts = [part.detach().to(seen) @ seen for part in table.split(16384)]
    return torch.cat(parts).mT.view(*directions.shape[:-1], len(table))


def said(row: Tensor, words: Tokens, top: int, least: bool = False) -> Words:
    """The tokens with the largest (or least) numbers of a row `(vocabulary,)`."""
    found = row.topk(min(top, len(row)), largest=not least)
    ids = tuple(found.indices.tolist())
    return Words(ids, tuple(words.texts(ids)), tuple(found.values.tolist()))


def _directions(s: Tensor, read: Tensor, wrote: Tensor, words: Tokens, top: int) -> list[Direction]:
    share = (s**2 / (s**2).sum()).tolist()
    made = []
    for i, (a, b) in enumerate(zip(read.mT, wrote.mT, strict=True)):
        middle = b - b.mean()  # what all tokens get changes no answer
        sign = 1.0 if middle.max() >= -middle.min() else -1.0
        sides = [said(sign * end * x, words, top) for end in (1, -1) for x in (a, middle)]
        made.append(Direction(float(s[i]), share[i], *sides))
    return made


def _embedded(view: ModelView, layer: int) -> Tensor:
    stack = output_stack(view)
    table = embedding_table(view, stack)
    if isinstance(table, str):
        raise UnsupportedModelError(table)
    return as_read(table.detach().double(), attention_at(view, layer, stack))


def _words(view: ModelView, tokenizer: Any | None) -> Tokens:
    return Tokens(tokenizer, getattr(view.model, "config", None))
