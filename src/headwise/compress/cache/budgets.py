"""How many entries each row of a cache keeps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from headwise.instruments.atlas import Atlas

Amount = int | float
"""How much: an int is a number of tokens, a float the share of the tokens seen."""


@dataclass(frozen=True)
class Shape:
    """Heads of the layers that a cache serves: query heads, and key-value heads that are held, of
    each. `reads`: for each query head of each layer the key-value head that it reads; () where all
    groups are equal."""

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    reads: tuple[tuple[int, ...], ...] = ()

    def readers(self, layer: int) -> list[list[int]]:
        """For each key-value head of a layer the query heads that read it."""
        heads, held = self.heads[layer], self.kv_heads[layer]
        of = self.reads[layer] if self.reads else [h * held // heads for h in range(heads)]
        return [[h for h, k in enumerate(of) if k == kv] for kv in range(held)]

    @property
    def layers(self) -> int:
        return len(self.heads)


class Budget(ABC):
    """A cache asks for one layer of one sequence at a time. It keeps sinks and window whatever
    the answer is, never more than there is, and rounds up to its `step`."""

    needs_scores: bool = False
    """Whether `keep` looks at the scores; they are an empty list otherwise."""

    def fitted(self, shape: Shape) -> Budget:
        """This budget for a model of that shape; called once by a cache that is made with it.
        Raises ValueError where it does not fit."""
        return self

    @abstractmethod
    def keep(self, layer: int, length: int, scores: Sequence[Tensor]) -> list[int]:
        """How many entries each of the layer's key-value heads keeps, `kv_heads` numbers (or one
        for all of them), after `length` tokens of this sequence (padding does not count; of a
        layer with a sliding window: the tokens in it). `scores`: for each key-value head the
        policy's scores `(n,)` of the entries that it has, infinite for sinks and window."""


def tokens(amount: Amount, length: int) -> int:
    """An amount as a number of tokens: no fewer than the share, but for the rounding of floats."""
    return math.ceil(amount * (1 - 1e-6) * length) if isinstance(amount, float) else amount


def checked(amount: Amount, name: str = "budget", least: int = 1) -> Amount:
    """An amount that makes sense: a share in (0, 1], or at least `least` tokens. A number that is
    both (1 or 1.0) is told by its type. Raises ValueError, TypeError."""
    if isinstance(amount, bool) or not isinstance(amount, (int, float)):
        raise TypeError(
            f"{name}={amount!r}: give an int (tokens) or a float (share of the tokens seen)"
        )
    if isinstance(amount, float) and not 0 < amount <= 1:
        raise ValueError(
            f"{name}={amount!r}: a float is the share of the tokens seen, above 0 and at most 1.0 "
            "(all); give an int for a number of tokens"
        )
    if isinstance(amount, int) and amount < least:
        raise ValueError(f"{name}={amount!r}: at least {least} tokens have to be kept")
    return amount


@dataclass(frozen=True)
class Uniform(Budget):
    """The same for every row: a number of tokens (int) or a share of the tokens seen (float)."""

    amount: Amount

    def __post_init__(self) -> None:
        checked(self.amount)

    def keep(self, layer: int, length: int, scores: Sequence[Tensor]) -> list[int]:
        return [tokens(self.amount, length)]


@dataclass(frozen=True)
class Pyramid(Budget):
    """Much in low layers, little in high ones, falling linearly (PyramidKV, Cai et al. 2024,
    arXiv 2406.02069, section 4.1): the last of L layers keeps `amount / beta`, the first
    2 * amount - amount / beta; the mean is `amount`. What the first layers cannot use because it
    is more than there is goes to none."""

    amount: Amount
    beta: float = 20.0
    layers: int | None = None

    def __post_init__(self) -> None:
        checked(self.amount)
        if self.beta < 1:
            raise ValueError(f"Pyramid(beta={self.beta}): the last layer keeps 1 / beta, beta >= 1")

    def fitted(self, shape: Shape) -> Budget:
        if self.layers not in (None, shape.layers):
            raise ValueError(f"this Pyramid is for {self.layers} layers, not for {shape.layers}")
        return Pyramid(self.amount, self.beta, shape.layers)

    def keep(self, layer: int, length: int, scores: Sequence[Tensor]) -> list[int]:
        assert self.layers is not None, "a Pyramid is fitted to a model by the cache"
        mean = tokens(self.amount, length)
        last = mean / self.beta
        down = layer / (self.layers - 1) if self.layers > 1 else 0.5
        return [max(1, round(2 * mean - last + down * 2 * (last - mean)))]


class PerHead(Budget):
    """A table of layers x kv_heads: ints are tokens, floats are shares."""

    def __init__(self, table: Tensor | Iterable[Iterable[Amount]]) -> None:
        rows = table.tolist() if isinstance(table, Tensor) else table
        self.table = tuple(
            tuple(checked(amount, f"budget of head {head} of layer {layer}")
                  for head, amount in enumerate(row))
            for layer, row in enumerate(rows)
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"PerHead({[list(row) for row in self.table]})"

    def fitted(self, shape: Shape) -> Budget:
        # of a layer that has lost its attention nothing is kept, whatever the table says
        pairs = zip(self.table, shape.kv_heads, strict=False)
        given = tuple(len(row) if heads else 0 for row, heads in pairs)
        given += tuple(len(row) for row in self.table[len(shape.kv_heads) :])
        if given != shape.kv_heads:
            raise ValueError(
                "a table of budgets needs one number for each key-value head of each layer: the "
                f"model has {_counted(shape.kv_heads)}, the table {_counted(given)}"
            )
        return self

    def keep(self, layer: int, length: int, scores: Sequence[Tensor]) -> list[int]:
        return [tokens(amount, length) for amount in self.table[layer]]


def _counted(heads: tuple[int, ...]) -> str:
    same = len(set(heads)) == 1
    return f"{len(heads)} layers of {heads[0]}" if same else f"layers of {list(heads)}"


FAR = ("retrieval", "induction", "duplicate")
NEAR = ("sink", "local", "positional", "previous-token")


class ByKind(Budget):
    """By what the heads do, as an Atlas says: a key-value head keeps everything if one of its
    query heads looks far back (`far` kinds), a `window` of tokens if all of them look near or at
    sinks (`near` kinds), and `rest` otherwise. The idea of DuoAttention (Xiao et al. 2024, arXiv
    2410.10819) and RazorAttention (Tang et al. 2024, arXiv 2407.15891), with measured kinds.
    """

    def __init__(
        self,
        atlas: Atlas,
        window: int = 256,
        rest: Amount = 1.0,
        far: Sequence[str] = FAR,
        near: Sequence[str] = NEAR,
    ) -> None:
        if "kind" not in atlas.heads:
            raise ValueError(
                "this Atlas says no kinds of heads: headwise.see(model, inputs) gives them"
            )
        self.window, self.rest = checked(window, "window"), checked(rest, "rest")
        self.far, self.near = frozenset(far), frozenset(near)
        columns = (atlas.heads[name].tolist() for name in ("layer", "head", "kind"))
        self.kinds = {
            (int(layer), int(head)): str(kind) for layer, head, kind in zip(*columns, strict=True)
        }

    def fitted(self, shape: Shape) -> PerHead:
        wanted = {(layer, h) for layer, heads in enumerate(shape.heads) for h in range(heads)}
        missing = sorted(wanted - self.kinds.keys())
        if missing:
            raise ValueError(
                f"the Atlas says nothing of {len(missing)} of the model's {len(wanted)} heads, "
                f"head {missing[0][1]} of layer {missing[0][0]} among them: is it of this model?"
            )
        return PerHead(
            [
                [self._amount(layer, heads) for heads in shape.readers(layer)]
                for layer in range(shape.layers)
            ]
        )

    def _amount(self, layer: int, heads: Iterable[int]) -> Amount:
        kinds = {self.kinds[layer, head] for head in heads}
        if kinds & self.far:
            return 1.0
        return self.window if kinds <= self.near else self.rest

    def keep(self, layer: int, length: int, scores: Sequence[Tensor]) -> list[int]:
        raise RuntimeError("ByKind is fitted to a model first: ByKind.fitted(shape).keep(...)")


@dataclass(frozen=True)
class Adaptive(Budget):
    """One budget for a layer, spent where the scores are (Ada-KV, Feng et al. 2024, arXiv
    2407.11550, algorithm 1): the best entries of all heads together decide how many each head
    keeps; every head is sure of the share `floor` of an even split."""

    base: Amount | Budget
    floor: float = 0.2
    needs_scores = True

    def __post_init__(self) -> None:
        if not isinstance(self.base, Budget):
            checked(self.base)
        if not 0 <= self.floor <= 1:
            raise ValueError(f"Adaptive(floor={self.floor}): a share from 0 to 1 is expected")

    def fitted(self, shape: Shape) -> Budget:
        return Adaptive(as_budget(self.base).fitted(shape), self.floor)

    def keep(self, layer: int, length: int, scores: Sequence[Tensor]) -> list[int]:
        heads = len(scores)
        base = as_budget(self.base).keep(layer, length, scores)
        even = sum(base) / len(base)
        total = min(round(even * heads), sum(len(s) for s in scores))
        owner = torch.cat([torch.full_like(s, h, dtype=torch.long) for h, s in enumerate(scores)])
        best = torch.cat([s.float() for s in scores]).topk(total).indices
        won = owner[best].bincount(minlength=heads).tolist()
        return [round(self.floor * even + (1 - self.floor) * count) for count in won]


def as_budget(given: Amount | Budget | Tensor) -> Budget:
    """What a user gives as a budget. A tensor is a table (layers, kv_heads)."""
    if isinstance(given, Budget):
        return given
    return PerHead(given) if isinstance(given, Tensor) else Uniform(given)
