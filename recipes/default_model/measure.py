"""What a small causal language model can do and what its heads do, from its own attention matrices.

Short inputs and whole matrices on purpose: these few numbers decide whether a model is shipped,
and they are to be obviously right. All head scores are means of attention weights in 0..1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from recipes.default_model.mixture import FIRST_ORDINARY

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def windows(stream: np.ndarray, length: int, begin: int) -> torch.Tensor:
    """`stream` (tokens,) as rows (rows, length + 1) that each start with the begin token; what
    does not fill a row is left out."""
    rows = len(stream) // length
    if rows == 0:
        raise ValueError(f"{len(stream)} tokens do not fill one window of {length}")
    body = torch.from_numpy(stream[: rows * length].astype(np.int64)).view(rows, length)
    return F.pad(body, (1, 0), value=begin)


@torch.inference_mode()
def text_loss(model: PreTrainedModel, rows: torch.Tensor, skip: int = 0) -> float:
    """Mean cross-entropy in nats a token of rows (rows, length + 1), each token predicted from
    those before it in its row; the first `skip` predictions of each row do not count."""
    total = 0.0
    for row in rows.split(8):
        logits = model(input_ids=row[:, :-1]).logits[:, skip:].float()
        targets = row[:, 1 + skip :]
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    return total / rows[:, 1 + skip :].numel()


def repeated_rows(vocabulary: int, span: int, rows: int, begin: int, seed: int) -> torch.Tensor:
    """The begin token, then `span` uniformly random tokens twice: (rows, 2 * span + 1)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(FIRST_ORDINARY, vocabulary, (rows, span), generator=generator)
    return F.pad(torch.cat([drawn, drawn], 1), (1, 0), value=begin)


@torch.inference_mode()
def attention(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """Attention weights (layers, rows, heads, n, n) of a model in eager attention."""
    weights = model(input_ids=rows, output_attentions=True).attentions
    if weights is None or any(layer is None for layer in weights):
        raise ValueError("no attention matrices came back: load with attn_implementation='eager'")
    return torch.stack(list(weights))


def induction(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """Induction score (layers, heads) on `repeated_rows`: from each token of the second half, the
    mass on the token that followed its first occurrence (Olsson et al. 2022, arXiv 2209.11895)."""
    span = (rows.shape[1] - 1) // 2
    after_earlier = attention(model, rows).diagonal(1 - span, -2, -1)  # key i - span + 1
    return after_earlier[..., 2:].mean((1, -1))  # from query span + 1 on, the second half


def previous_token(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """Mean mass on the previous token (layers, heads), from the second token on."""
    return attention(model, rows).diagonal(-1, -2, -1).mean((1, -1))


def sink(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """Mean mass on the first token (layers, heads), from the second token on."""
    return attention(model, rows)[..., 1:, 0].mean((1, -1))
