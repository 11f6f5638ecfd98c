"""Sets of tokens that a change is about, and where they are among the keys of a call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from headwise.edits.change import Call


def check_tokens(tokens: Any, what: str) -> None:
    """Raises ValueError for what is no set of tokens: token numbers (an int, a range, several
    ints), or booleans `(n,)`, or `(batch, n)` with a row for each sequence."""
    if isinstance(tokens, Tensor):
        if tokens.dtype != torch.bool or tokens.dim() not in (1, 2):
            raise ValueError(
                f"{what}: a tensor of {tokens.dtype} {tuple(tokens.shape)}; give token numbers, or "
                "booleans (n,) or (batch, n)"
            )
        return
    numbers = [tokens] if isinstance(tokens, int) else tokens
    fits = not isinstance(numbers, str | bytes | bool) and isinstance(numbers, Iterable)
    if not fits or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise ValueError(f"{what}: {tokens!r}; give token numbers, or booleans (n,) or (batch, n)")
    if any(n < 0 for n in numbers):
        raise ValueError(f"{what}: {tokens!r}; tokens are counted from 0, the first real one")


def among_keys(tokens: Any, call: Call) -> Tensor:
    """Which keys of a call are these tokens, `(batch or 1, n_k)`."""
    return _among(tokens, call.places.keys(call.n_k, call.query.device), call)


def among_queries(tokens: Any, call: Call) -> Tensor:
    """Which queries of a call are these tokens, `(batch or 1, n_q)`."""
    return _among(tokens, call.places.queries(call.n_q, call.query.device), call)


def _among(tokens: Any, numbers: Tensor, call: Call) -> Tensor:
    if not isinstance(tokens, Tensor):
        asked = torch.tensor(
            [tokens] if isinstance(tokens, int) else list(tokens), dtype=torch.long
        )
        return torch.isin(numbers, asked.to(numbers.device))
    mask = tokens.to(numbers.device)
    batch = call.query.shape[0]
    if mask.dim() == 1:
        mask = mask[None]
    elif batch % len(mask):
        raise ValueError(f"tokens of {len(mask)} sequences are given, {batch} are running")
    else:  # beams of a sequence stand behind each other
        mask = mask.repeat_interleave(batch // len(mask), 0)
    numbers = numbers.expand(len(mask) if len(numbers) == 1 else len(numbers), -1)
    # what was generated later, or is padding, is in no set
    inside = (numbers >= 0) & (numbers < mask.shape[1])
    mask = mask.expand(len(numbers), -1)
    found: Tensor = mask.gather(1, numbers.clamp(0, mask.shape[1] - 1)) & inside
    return found
