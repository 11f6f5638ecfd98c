"""Attentions behind a router: what runs, for which sequences of a batch, and what is cached."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from headwise.models.errors import UnsupportedModelError
from headwise.parts import Mixer, State

BY_ROW = ("attention_mask", "position_ids", "position_embeddings")
"""Arguments of an attention that have, or may have, the batch in front."""


class Router(nn.Module):
    """Mean of the real tokens x `(batch, n, width)` -> whether to run `(batch,)`.

    Starts open for all: weights of zero and a bias of 2. `soft`: the sigmoids of the last call,
    with their graph.
    """

    def __init__(self, width: int, threshold: float = 0.5) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        self.threshold = threshold
        self.soft: Tensor | None = None
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, 2.0)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        """The sigmoid `(batch,)`; real `(batch, n)` or None for all."""
        if real is None:
            mean = x.mean(1)
        else:
            weight = real.to(x.dtype)[..., None]
            mean = (x * weight).sum(1) / weight.sum(1).clamp_min(1)
        self.soft = self.linear(mean).sigmoid()[:, 0]
        return self.soft

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "soft": None}  # its graph cannot be copied


class RoutedState(State):
    """`inner`: the attention's state for the sequences that run it; `open` `(batch,)`."""

    def __init__(self, inner: State) -> None:
        super().__init__()
        self.inner = inner
        self.open: Tensor | None = None

    def nbytes(self) -> int:
        return self.inner.nbytes()

    def allocated(self) -> int:
        return self.inner.allocated()

    def select(self, index: Tensor) -> None:
        if self.open is not None:
            place = self.open.long().cumsum(0) - 1
            self.inner.select(place[index[self.open[index]]])
            self.open = self.open[index]


class RoutedMixer(Mixer):
    """A mixer of one of our stacks behind a router. A sequence's prompt decides for all of it."""

    def __init__(self, inner: Mixer, router: Router) -> None:
        super().__init__()
        self.inner, self.router = inner, router
        self.dim, self.causal = inner.dim, inner.causal

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        state: State | None = None,
    ) -> Tensor:
        if state is not None and not isinstance(state, RoutedState):
            raise ValueError(f"state is a {type(state).__name__}: take one from empty_state()")

        def run(rows: Tensor | None) -> Tensor:
            def of(value: Tensor | None) -> Tensor | None:
                if rows is None or value is None or value.dim() == 1:
                    return value
                return value[rows]

            chosen = of(x)
            assert chosen is not None
            inner = None if state is None else state.inner
            return self.inner(chosen, mask=of(mask), positions=of(positions), state=inner)

        if context is not None:
            raise ValueError("a routed mixer is a self-mixer and takes no context")
        if state is None:
            return _gated(self.router, self.training, x, mask, None, run)
        if state.open is None:
            state.open = self.router(x, mask) > self.router.threshold
        state.seen += x.shape[1]
        return _gated(self.router, False, x, mask, state.open, run)

    def empty_state(self) -> State:
        return RoutedState(self.inner.empty_state())

    def state_bytes(self, n: int, itemsize: int = 4) -> int:
        """Of a sequence that runs it."""
        return self.inner.state_bytes(n, itemsize)

    def flops(self, n: int) -> int:
        return self.inner.flops(n) + 2 * self.dim


class RoutedAttention(nn.Module):
    """An attention of a transformers model behind a router; called as it is called."""

    def __init__(self, attention: nn.Module, router: Router) -> None:
        super().__init__()
        self.attention, self.router = attention, router

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        if args:  # by name, so that it is known which belong to a sequence
            named = list(inspect.signature(type(self.attention).forward).parameters)[2:]
            kwargs = {**dict(zip(named, args, strict=False)), **kwargs}
        rest: list[Any] = []

        def run(rows: Tensor | None) -> Tensor:
            given = kwargs
            if rows is not None:
                given = {k: _rows(v, rows) if k in BY_ROW else v for k, v in kwargs.items()}
            chosen = hidden_states if rows is None else hidden_states[rows]
            out = self.attention(chosen, **given)
            rest[:] = out[1:]
            return cast(Tensor, out[0])

        n = hidden_states.shape[1]
        real = _real(kwargs.get("attention_mask"), n)
        cache, opened = kwargs.get("past_key_values"), None
        if cache is not None:
            from headwise.compress.structure.rows_layer import rows_layer

            held = rows_layer(
                cache,
                cast(int, self.attention.layer_idx),
                lambda: self.router(hidden_states, real) > self.router.threshold,
            )
            opened = held.open
        made = _gated(self.router, self.training, hidden_states, real, opened, run)
        if cache is not None:
            held.seen += n
        return (made, *(rest or [None]))


def _gated(
    router: Router,
    training: bool,
    x: Tensor,
    real: Tensor | None,
    opened: Tensor | None,
    run: Callable[[Tensor | None], Tensor],
) -> Tensor:
    """What is added to the residual `(batch, n, width)`. `opened`: decided before, or None."""
    if opened is None:
        soft = router(x, real)
        opened = soft > router.threshold
        if training:
            gate = opened.to(soft.dtype) + soft - soft.detach()
            return run(None) * gate[:, None, None]
    if bool(opened.all()):
        return run(None)
    out = torch.zeros_like(x)
    if bool(opened.any()):
        rows = opened.nonzero()[:, 0]
        out = out.index_copy(0, rows, run(rows).to(out.dtype))
    return out


def _rows(value: Any, rows: Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(_rows(one, rows) for one in value)
    whole = not isinstance(value, Tensor) or value.shape[0] == 1
    return value if whole else value[rows]


def _real(mask: Any, n: int) -> Tensor | None:
    """Which of the n newest tokens are real, from a mask `(batch, keys)` or `(batch, 1, queries,
    keys)`: those that see themselves."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise UnsupportedModelError(
            f"a mask of {type(mask).__name__} does not say which tokens are padding: call the "
            "model outside of observe(...), or without padding"
        )
    if mask.dim() == 2:
        return mask[:, -n:].bool()
    own = mask[:, 0].diagonal(mask.shape[-1] - mask.shape[-2], 1, 2)
    return own if own.dtype == torch.bool else own == 0
