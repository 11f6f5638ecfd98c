"""The masks that a model builds, as patterns.

`mask_function` is what transformers calls when a model with our attention asks for a mask. It
returns a `PatternMask`: to the model's code a boolean tensor of the right shape, which takes no
memory; to our attention the pattern itself. A model that computes with its mask (slices, moves,
joins it) gets the real tensor at that moment, so that nothing is lost but memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headwise.maps import Full, KeyMask, Mask, Padding, Pattern
from headwise.models.errors import UnsupportedModelError
from headwise.models.rule import Rule, recognise

BOOLEAN_USES = frozenset({"where", "masked_fill", "index", "masked_select"})
"""Operations whose result may be of another type although they use the mask as a boolean."""


class PatternMask(Tensor):
    """A boolean tensor `(batch, 1, n_q, n_k)`, True = may look, that exists as a pattern.

    What is made of it (slices, joins) is a PatternMask too, which then holds the real tensor.
    `keys`: `(batch, n_k)`, True where a key is real, or None where nothing is padded.
    """

    pattern: Pattern | None
    keys: Tensor | None
    table: Tensor | None

    @staticmethod
    def of(
        pattern: Pattern,
        shape: tuple[int, int, int],
        device: torch.device | str,
        keys: Tensor | None = None,
    ) -> PatternMask:
        """Of a pattern over (batch, n_q, n_k)."""
        batch, n_q, n_k = shape
        made = PatternMask._empty((batch, 1, n_q, n_k), torch.device(device))
        made.pattern, made.keys = pattern, keys
        return made

    @staticmethod
    def holding(table: Tensor) -> PatternMask:
        """Of a boolean tensor of any shape."""
        made = PatternMask._empty(tuple(table.shape), table.device)
        made.table = table
        return made

    @staticmethod
    def _empty(shape: tuple[int, ...], device: torch.device) -> PatternMask:
        made = Tensor._make_wrapper_subclass(PatternMask, shape, dtype=torch.bool, device=device)
        assert isinstance(made, PatternMask)
        made.pattern = made.keys = made.table = None
        return made

    def dense(self) -> Tensor:
        """The tensor that it stands for."""
        if self.table is None:
            assert self.pattern is not None
            batch, _, n_q, n_k = self.shape
            table = self.pattern.mask(n_q, n_k, batch, 1, self.device)
            self.table = table.expand(batch, 1, n_q, n_k).contiguous()
        return self.table

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PatternMask({self.pattern!r}, shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("detach", "alias"):
            return args[0]
        made = func(*_dense(args), **_dense(kwargs or {}))
        if isinstance(made, Tensor) and made.dtype == torch.bool:
            return cls.holding(made)
        # Whoever adds a mask to scores, or joins it with an additive one, expects 0 and -inf;
        # booleans become 0 and 1 there, and nothing would be masked, silently.
        floating = isinstance(made, Tensor) and made.is_floating_point()
        if floating and name not in BOOLEAN_USES:
            raise UnsupportedModelError(
                f"the model calculates with its attention mask ({func}) instead of handing it to "
                "its attention; whether it means a boolean or an additive mask cannot be known"
            )
        return made


def _dense(value: Any) -> Any:
    if isinstance(value, PatternMask):
        return value.dense()
    if isinstance(value, (list, tuple)):
        return type(value)(_dense(item) for item in value)
    if isinstance(value, dict):
        return {key: _dense(item) for key, item in value.items()}
    return value


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> PatternMask:
    """transformers' mask interface: the mask of `batch_size` x `q_length` queries from position
    `q_offset` and `kv_length` keys from `kv_offset`, where `mask_function` allows and the 2-D
    `attention_mask` is True.

    `kwargs` are settings of other implementations (dtype, permission to skip a mask ...).
    """
    if mask_function is None:
        from transformers.masking_utils import causal_mask_function as mask_function
    assert mask_function is not None
    rule = Rule(
        function=mask_function,
        batch=batch_size,
        n_q=q_length,
        n_k=kv_length,
        q_offset=int(q_offset),
        kv_offset=int(kv_offset),
        device=device,
        vectorised=not use_vmap,
    )
    pattern = recognise(rule)
    keys = _real_keys(attention_mask, kv_length, int(kv_offset))
    if keys is not None:
        pattern = pattern & padding(keys)
    return PatternMask.of(pattern, (batch_size, q_length, kv_length), device, keys)


def _real_keys(attention_mask: Tensor | None, n_k: int, kv_offset: int) -> Tensor | None:
    """`(batch, n_k)`, or None where every key is real. Keys that the mask does not reach are
    not: that is how transformers pads it for caches with room to spare."""
    if attention_mask is None:
        return None
    keys = attention_mask.bool()
    missing = n_k + kv_offset - keys.shape[-1]
    if missing > 0:
        keys = torch.nn.functional.pad(keys, (0, missing))
    keys = keys[:, kv_offset : kv_offset + n_k]
    return None if bool(keys.all()) else keys


def padding(keys: Tensor) -> Pattern:
    """The pattern of real keys `(batch, n_k)`: lengths where they tell it, a key mask if not."""
    n_k = keys.shape[-1]
    lengths = keys.sum(-1)
    at = torch.arange(n_k, device=keys.device)
    if bool((keys == (at < lengths[:, None])).all()):
        return Padding(lengths)
    if bool((keys == (at >= n_k - lengths[:, None])).all()):
        return Padding(lengths, left=True, n=n_k)
    return KeyMask(keys)


def pattern_of(mask: Tensor, n_q: int, n_k: int) -> tuple[Pattern, Tensor | None, Tensor | None]:
    """(pattern, additive bias or None, real keys or None) of the mask that reached an attention.

    Raises UnsupportedModelError for a mask that is neither boolean nor additive over n_q x n_k.
    """
    if mask.dim() != 4 or mask.shape[2] not in (1, n_q) or mask.shape[3] not in (1, n_k):
        raise UnsupportedModelError(
            f"an attention mask of shape {tuple(mask.shape)} reached an attention of {n_q} queries "
            f"and {n_k} keys; expected (batch or 1, heads or 1, {n_q}, {n_k})"
        )
    if isinstance(mask, PatternMask):
        if mask.pattern is not None:
            return mask.pattern, None, mask.keys
        mask = mask.dense()
    whole = mask.expand(*mask.shape[:2], n_q, n_k)
    if mask.dtype == torch.bool:
        return Mask(whole), None, None
    if not mask.is_floating_point():
        raise UnsupportedModelError(
            f"an attention mask of {mask.dtype} reached an attention; expected booleans (True = "
            "may look) or numbers to be added to the scores"
        )
    # what transformers adds to forbid is the lowest number of some type, or minus infinity
    forbidden = whole <= torch.finfo(mask.dtype).min / 2
    rest = whole.masked_fill(forbidden, 0.0)
    pattern: Pattern = Mask(~forbidden) if bool(forbidden.any()) else Full()
    return pattern, rest if bool(rest.any()) else None, None
