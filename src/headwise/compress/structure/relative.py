"""Relative biases that one attention computes and all others of its stack are handed (T5).

The table has a column for every head of the original model. Where layers lose different heads,
each has to take its own columns, and hand all of them on.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

KEPT = "headwise_bias_heads"
"""Attribute of an attention: the columns of the bias that its heads read."""


class Columns(nn.Embedding):
    """A table of biases `(buckets, heads)` that gives some columns, and remembers all of them.

    The same parameter under the same name as before. `kept`: the columns that it gives.
    """

    kept: tuple[int, ...]
    whole: Tensor | None

    @classmethod
    def of(cls, table: nn.Module, kept: tuple[int, ...]) -> Columns:
        if isinstance(table, cls):
            table.kept = kept
            return table
        assert isinstance(table, nn.Embedding)
        weight = table.weight
        made = cls(weight.shape[0], weight.shape[1], device="meta")
        made.weight = weight
        made.kept, made.whole = kept, None
        return made

    def forward(self, buckets: Tensor) -> Tensor:
        """`(n_q, n_k)` to `(n_q, n_k, kept heads)`."""
        every = super().forward(buckets)
        self.whole = every.permute(2, 0, 1)[None]
        return every[..., list(self.kept)]


def takes_relative_bias(module: nn.Module) -> bool:
    return hasattr(module, "has_relative_attention_bias")


def keep_biases(module: nn.Module, kept: list[int]) -> None:
    """The heads of this attention that are left, numbered as they are now."""
    before = getattr(module, KEPT, None)
    columns = tuple(kept if before is None else (before[h] for h in kept))
    if before is None:
        module.register_forward_pre_hook(_take, with_kwargs=True)
        module.register_forward_hook(_give, with_kwargs=True)
    setattr(module, KEPT, columns)
    if module.has_relative_attention_bias:
        table = module.relative_attention_bias
        assert isinstance(table, nn.Module)
        module.relative_attention_bias = Columns.of(table, columns)


def own_zeros(module: nn.Module) -> None:
    """Let an attention without a table make its own bias of zeros: the one that it is handed was
    made for as many heads as another layer has."""
    if _forget not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_forget, with_kwargs=True)


def move_table(owner: nn.Module, heir: nn.Module) -> None:
    """Give the table of an attention that is going to the one that will be the first."""
    table: Any = owner.relative_attention_bias
    kept = getattr(heir, KEPT, None)
    if kept is not None:
        table = Columns.of(table, kept)
    elif isinstance(table, Columns):
        plain = nn.Embedding(table.weight.shape[0], table.weight.shape[1], device="meta")
        plain.weight = table.weight
        table = plain
    del owner.relative_attention_bias
    heir.relative_attention_bias = table
    owner.has_relative_attention_bias = False  # type: ignore[assignment]
    heir.has_relative_attention_bias = True  # type: ignore[assignment]


def _forget(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "position_bias": None}


def _take(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    whole = kwargs.get("position_bias")
    if whole is None:
        return None
    kept: tuple[int, ...] = getattr(module, KEPT)
    mine = whole[:, list(kept)]
    mine.whole = whole  # where `_give` finds it
    return args, {**kwargs, "position_bias": mine}


def _give(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    whole = getattr(kwargs.get("position_bias"), "whole", None)
    table = getattr(module, "relative_attention_bias", None)
    if whole is None and isinstance(table, Columns):
        whole, table.whole = table.whole, None
    return output if whole is None else (output[0], whole, *output[2:])
