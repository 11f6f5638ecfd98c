"""The logit lens: what a model would answer if it stopped after each layer.

nostalgebraist 2020, "interpreting GPT: the logit lens": the residual after layer l goes through
the final norm and the unembedding as if it were the last one. A tuned lens (`tuned_lens.py`) maps
it to the last layer's terms first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from headwise.instruments.examples import Examples, digests, model_view, read_examples
from headwise.instruments.lens_result import Lens
from headwise.instruments.lens_targets import real_rows, targets_of, token_ids
from headwise.instruments.provenance import model_name, versions
from headwise.instruments.readout import Readout
from headwise.instruments.run import evaluating
from headwise.instruments.tokens import Tokens
from headwise.models import ModelView

__all__ = ["Lens", "Translator", "lens"]

_NUMBERS = 1 << 24  # logits that are held of one layer at a time


class Translator(Protocol):
    """What makes of a lens more than the logit lens: `translate(residual, layer)` gives what is
    read out instead of the residual `(batch, m, width)` that layer `layer` reads."""

    kind: str

    def translate(self, residual: Tensor, layer: int) -> Tensor: ...

    def check(self, view: ModelView) -> None:
        """Raise ValueError for a model that it was not made for."""


def lens(
    model: nn.Module | ModelView,
    inputs: Any,
    kind: str | Translator = "logit",
    *,
    target: str | Tensor | None = None,
    top: int = 5,
    tokenizer: Any | None = None,
    processor: Any | None = None,
    tokens: int | None = None,
    windows: int | None = 1,
    batch_size: int = 8,
    block: int | None = None,
) -> Lens:
    """Read every layer's residual out in the vocabulary (or in the classes).

    inputs: as `headwise.see` takes them. kind: "logit", or a tuned lens. target: what is right:
    "next" (the next token, or `labels` among the inputs; the default of causal models and where
    labels are given), "final" (the model's own first token; the default elsewhere), ids
    `(examples, n)` with -1 for none, or classes `(examples,)`. top: likeliest tokens that are
    kept. tokens, windows: how a text is cut. block: positions of a batch that are read out at a
    time, as many as make 16 M logits by default; (layers x n x vocabulary) is never held, the
    residuals `(layers + 1, batch, n, width)` of one batch are.

    Whatever stands between the last layer and the logits is the model's own code, so the last
    layer's reading is the model's answer. Rows that are padding are left out.
    Raises UnsupportedModelError for a model without a head, ValueError for targets that do not fit.
    """
    view = model_view(model)
    if isinstance(kind, str) and kind != "logit":
        raise ValueError(f"kind={kind!r}: expected 'logit', or a tuned lens (fit_lens)")
    if top < 1:
        raise ValueError(f"top={top}: expected 1 or more")
    translator = None if isinstance(kind, str) else kind
    if translator is not None:
        translator.check(view)
    batches = read_examples(view.model, inputs, tokenizer, processor, tokens, windows, batch_size)
    tables: list[dict[str, np.ndarray]] = []
    layers = 0
    with evaluating(view.model), torch.no_grad():
        for batch in batches:
            read = Readout(view, batch.inputs)
            layers = len(read.residuals)
            right = targets_of(view, batch, read, target)
            tables.append(_look(read, translator, right, batch, top, block))
    joined = {
        name: np.concatenate([table[name] for table in tables], 1 if name in _BY_LAYER else 0)
        for name in tables[0]
    }
    words = Tokens(tokenizer, getattr(view.model, "config", None))
    seen = {int(i) for name in ("token", "target", "top") for i in np.unique(joined[name])} - {-1}
    named = dict(zip(sorted(seen), words.texts(sorted(seen)), strict=True))
    if not read.positions:
        named = _classes(view) or named
    return Lens(
        kind="logit" if translator is None else translator.kind,
        layers=["embedding", *(f"layer {n}" for n in range(layers - 1))],
        **joined,
        words=named,
        provenance={
            "model": model_name(view.model),
            "model_class": type(view.model).__name__,
            "inputs": digests(batches),
            "versions": versions(),
        },
    )


_BY_LAYER = ("top", "top_probability", "loss", "rank", "entropy", "kl")


def _look(
    read: Readout,
    translator: Translator | None,
    right: Tensor,
    batch: Examples,
    top: int,
    block: int | None,
) -> dict[str, np.ndarray]:
    """Numbers of one batch, rows being its real positions, example after example."""
    found: list[dict[str, list[Tensor]]] = []
    for rows in _blocks(read, block):
        final = _by_position(read, read(read.last[:, rows])).log_softmax(-1)
        wanted = right[:, rows] if read.positions else right
        of_layers: dict[str, list[Tensor]] = {}
        for layer, residual in enumerate(read.residuals):
            there = residual[:, rows]
            if layer < len(read.residuals) - 1:
                if translator is not None:
                    there = translator.translate(there, layer)
                logits = _by_position(read, read(there))
                logs = logits.log_softmax(-1)
            else:
                logs = final
            for name, value in _numbers(logs, final, wanted, top).items():
                of_layers.setdefault(name, []).append(value)
        found.append(of_layers)
    whole = {
        name: torch.cat([torch.stack(part[name]) for part in found], 2) for name in found[0]
    }  # (layers, batch, rows, ...)
    real = real_rows(batch.inputs, right)
    examples = torch.arange(batch.rows.start, batch.rows.stop)[:, None].expand_as(right)
    places = torch.arange(right.shape[1]).expand_as(right)
    alone = torch.full_like(right, -1)
    ids = token_ids(batch.inputs) if read.positions else None
    fits = ids is not None and ids.shape == right.shape
    table = {
        "example": examples,
        "position": places if read.positions else alone,
        "token": ids if fits and ids is not None else alone,
        "target": right,
    }
    out = {name: value.cpu()[real].numpy() for name, value in table.items()}
    return out | {name: value.cpu()[:, real].numpy() for name, value in whole.items()}


def _numbers(logs: Tensor, final: Tensor, right: Tensor, top: int) -> dict[str, Tensor]:
    """Of log-probabilities `(batch, rows, vocabulary)`, everything `(batch, rows, ...)`."""
    best = logs.topk(min(top, logs.shape[-1]), -1)
    mine = logs.gather(-1, right.clamp_min(0)[..., None])
    asked = right >= 0
    return {
        "top": best.indices,
        "top_probability": best.values.exp(),
        "loss": torch.where(asked, -mine[..., 0], torch.nan),
        "rank": torch.where(asked, (logs > mine).sum(-1), -1),
        "entropy": torch.special.entr(logs.exp()).sum(-1),
        # where the final answer leaves nothing, 0 log 0 is 0
        "kl": torch.where(final == -torch.inf, 0.0, final.exp() * (final - logs)).sum(-1),
    }


def _by_position(read: Readout, logits: Tensor) -> Tensor:
    return logits.float() if read.positions else logits.float()[:, None]


def _blocks(read: Readout, block: int | None) -> Iterator[slice]:
    batch, n = read.last.shape[:2]
    if not read.by_row:
        yield slice(0, n)
        return
    size = max(1, _NUMBERS // (batch * read.output.shape[-1])) if block is None else block
    if size < 1:
        raise ValueError(f"block={block}: expected 1 position or more")
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def _classes(view: ModelView) -> dict[int, str]:
    names = getattr(getattr(view.model, "config", None), "id2label", None) or {}
    return {int(i): str(name) for i, name in names.items()}
