"""What a lens holds an answer against: the right token (or class) of every row."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.instruments.examples import Examples
from headwise.instruments.metrics import Inputs
from headwise.instruments.readout import Readout
from headwise.models import ModelView

__all__ = ["next_tokens", "real_rows", "targets_of", "token_ids"]


def token_ids(inputs: Inputs) -> Tensor | None:
    found = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    return found if isinstance(found, Tensor) else None


def real_rows(inputs: Inputs, right: Tensor) -> Tensor:
    mask = _mask(inputs)
    fits = isinstance(mask, Tensor) and mask.shape == right.shape
    return mask.bool().cpu() if fits and mask is not None else torch.ones(right.shape).bool()


def targets_of(
    view: ModelView, batch: Examples, read: Readout, target: str | Tensor | None
) -> Tensor:
    logits = read.output if read.positions else read.output[:, None]
    if isinstance(target, Tensor):
        mine = target[batch.rows].to(logits.device)
        if mine.shape != logits.shape[:-1] and mine.shape != (len(batch),):
            raise ValueError(
                f"target has shape {tuple(target.shape)}: expected (examples, "
                f"{logits.shape[1]}) ids with -1 for none, or (examples,) classes"
            )
        if mine.dim() == 1 and read.positions:
            raise ValueError("target (examples,) is for models that answer once an example")
        return mine.view(logits.shape[:-1])
    labelled = batch.inputs.get("labels") is not None
    asked = target or ("next" if view.causal or labelled else "final")
    if asked == "final":
        return logits.argmax(-1)
    if asked != "next":
        raise ValueError(f"target={target!r}: expected 'next', 'final', or a tensor of ids")
    return next_tokens(view, batch.inputs, logits.shape[:2], read.positions)


def next_tokens(view: ModelView, inputs: Inputs, shape: tuple[int, ...], positions: bool) -> Tensor:
    """What is right at each row `(batch, rows)`, -1 where nothing is asked: labels of the inputs
    (shifted by one in models that look back only), else the next token.

    Raises ValueError where neither is there.
    """
    labels, ids = inputs.get("labels"), token_ids(inputs)
    if labels is not None and not positions:
        return torch.as_tensor(labels).view(shape)
    later = view.causal and "decoder_input_ids" not in inputs
    if labels is not None and not later:
        return torch.where(labels >= 0, labels, -1)
    known = labels if labels is not None else ids
    if known is None or known.shape != shape or not positions:
        raise ValueError(
            "what is right is not known here: give labels among the inputs, or target='final'"
        )
    nothing = torch.full_like(known[:, :1], -1)
    found = torch.cat([known[:, 1:], nothing], 1)
    mask = _mask(inputs)
    if labels is None and mask is not None and mask.shape == known.shape:
        there = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1).bool()
        found = torch.where(there, found, -1)
    return torch.where(found >= 0, found, -1)


def _mask(inputs: Inputs) -> Tensor | None:
    """Of the sequence that is answered for."""
    speaks = "decoder_input_ids" in inputs
    return inputs.get("decoder_attention_mask" if speaks else "attention_mask")
