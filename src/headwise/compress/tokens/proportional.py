"""Keys that count by the patches in them: log(size) added to their scores."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from headwise.maps import Full, Scores
from headwise.models.errors import UnsupportedModelError
from headwise.models.masks import PatternMask
from headwise.parts import Attention, kernels

Added = Callable[[], Tensor | None]
"""What is added to the scores of keys `(batch, 1, 1, n)`, None for nothing."""


def give_log_sizes(module: nn.Module, added: Added, handles: list[Any]) -> None:
    """Let an attention add this to its scores, in place of the mask that its model made for all
    tokens. `handles` gets what takes it off again. Raises UnsupportedModelError for an attention
    that takes no mask, and when it runs for a mask that hides something."""
    if isinstance(module, Attention):
        editor = _Weighted(added, module.editor)
        module.editor = editor
        handles.append(_Restore(module, editor))
        return
    names = list(inspect.signature(module.forward).parameters)
    if "attention_mask" not in names:
        raise UnsupportedModelError(
            f"{type(module).__name__} takes no attention_mask (it takes {', '.join(names)})"
        )
    hook = _Mask(added, names.index("attention_mask"))
    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))


class _Mask:
    """Puts it where transformers' attentions take an additive mask."""

    def __init__(self, added: Added, place: int) -> None:
        self.added, self.place = added, place

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        given = args[self.place] if len(args) > self.place else kwargs.get("attention_mask")
        _hides_nothing(module, given)
        bias = self.added()
        stream = args[0] if args else kwargs.get("hidden_states")
        if bias is not None:
            bias = bias.to(stream.dtype)
        if len(args) > self.place:
            return (*args[: self.place], bias, *args[self.place + 1 :]), kwargs
        return args, {**kwargs, "attention_mask": bias}


class _Weighted:
    """The same for attentions put together from parts, around an edit that is there already."""

    def __init__(self, added: Added, inner: Any) -> None:
        self.added, self.inner = added, inner

    def __call__(
        self, attention: Attention, scores: Scores, v: Tensor, keys: Any, at: tuple[int, int]
    ) -> tuple[Tensor, Scores, Tensor] | None:
        bias = self.added()
        if bias is not None:
            scores = dataclasses.replace(scores, bias=bias.to(v.dtype))
        if self.inner is not None:
            edited: tuple[Tensor, Scores, Tensor] | None = self.inner(
                attention, scores, v, keys, at
            )
            if edited is not None or bias is None:
                return edited
        return None if bias is None else (kernels.attend(attention, scores, v), scores, v)


class _Restore:
    """Takes the weighting off an attention that is put together from parts."""

    def __init__(self, module: Attention, editor: _Weighted) -> None:
        self.module, self.editor = module, editor

    def remove(self) -> None:
        """Raises ValueError where another edit was laid around this one and is still there."""
        now: Any = self.module.editor
        if now is not self.editor:
            raise ValueError("an edit of this attention is still there: undo it first")
        self.module.editor = now.inner


def _hides_nothing(module: nn.Module, mask: Any) -> None:
    if mask is None:
        return
    if isinstance(mask, PatternMask):
        hidden = mask.keys is not None or not isinstance(mask.pattern, Full)
    else:
        hidden = bool((mask < 0).any() if mask.is_floating_point() else (~mask).any())
    if hidden:
        raise UnsupportedModelError(
            f"{type(module).__name__} is handed a mask that hides tokens: tokens cannot be taken "
            "out of padded images"
        )
