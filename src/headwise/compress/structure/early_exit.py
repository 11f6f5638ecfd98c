"""Tokens that leave a decoder early.

    model = EarlyExit(decoder)                       # train on every exit: model(input_ids)
    tokens, exits = model.generate(prompt, 20, Confidence(0.9))

Depth-Adaptive Transformer (arXiv 1910.10073): a classifier after every block, and a rule that says
after which one a token is ready. Its state is then copied upwards: blocks above compute keys and
values from it, for the tokens to come, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from headwise.models.backbones import Decoder
from headwise.parts import Attention, PreNorm, State
from headwise.parts.slots import Given, Turn

Policy = Callable[[int, Tensor, Tensor], Tensor]
"""(number of the exit, what its block left `(batch, n, dim)`, its logits `(batch, n, vocabulary)`)
-> which tokens leave here `(batch, n)`."""


@dataclass(frozen=True)
class Confidence:
    """Leave where the likeliest token has at least this probability."""

    threshold: float

    def __call__(self, number: int, x: Tensor, logits: Tensor) -> Tensor:
        return logits.softmax(-1).amax(-1) >= self.threshold


class EarlyExit(nn.Module):
    """A decoder with an exit after every block: a norm of its own, read by the decoder's head.

    The last exit is the decoder's own norm: who never leaves early gets the decoder's logits.
    Raises ValueError for mixers that are no `Attention` and for another wiring than PreNorm.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        stack = decoder.stack
        if type(stack.wiring) is not PreNorm:
            raise ValueError(
                f"exits need a residual stream without links beside it: PreNorm, not "
                f"{type(stack.wiring).__name__}"
            )
        for layer, mixer in enumerate(stack.mixers):
            if not isinstance(mixer, Attention) or not mixer.project.keeps_keys:
                raise ValueError(
                    f"layer {layer}: {type(mixer).__name__} has no keys and values that could be "
                    "computed from a copied state"
                )
        self.decoder, self.depth = decoder, stack.depth
        kind = cast("Callable[[int], nn.Module]", type(stack.wiring.last))
        self.norms = nn.ModuleList(kind(decoder.dim) for _ in range(self.depth - 1))

    def answer(self, number: int, x: Tensor) -> Tensor:
        """Logits of exit `number`."""
        x = self.decoder.stack.wiring.end(x) if number == self.depth - 1 else self.norms[number](x)
        logits: Tensor = self.decoder.answer(x)
        return logits

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of all exits `(batch, exits, n, vocabulary)`, every block run for every token:
        the aligned training of section 3.1, where the losses of all exits are averaged."""
        x, found = self.decoder.embed(input_ids), []
        for layer in range(self.depth):
            x = self._block(layer, x, None)
            found.append(self.answer(layer, x))
        return torch.stack(found, 1)

    def run(
        self, input_ids: Tensor, policy: Policy, states: list[State] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits `(batch, n, vocabulary)` and exits `(batch, n)` from 0 on. `states`: of
        `empty_states`, for tokens that follow others.

        A block is run while there is a token that has not left; then the blocks above take up
        keys and values (with `states`), or nothing at all.
        """
        x = self.decoder.embed(input_ids)
        exits = torch.full(input_ids.shape, self.depth - 1, device=x.device)
        inside = torch.ones_like(input_ids, dtype=torch.bool)
        logits: Tensor | None = None
        for layer in range(self.depth):
            state = None if states is None else states[layer]
            if not bool(inside.any()):
                if state is not None:
                    self.remember(layer, x, state)
                continue
            x = torch.where(inside[..., None], self._block(layer, x, state), x)
            here = self.answer(layer, x)
            logits = here if logits is None else torch.where(inside[..., None], here, logits)
            if layer < self.depth - 1:
                leaving = inside & policy(layer, x, here)
                exits = exits.masked_fill(leaving, layer)
                inside = inside & ~leaving
        assert logits is not None
        return logits, exits

    @torch.no_grad()
    def generate(self, input_ids: Tensor, new: int, policy: Policy) -> tuple[Tensor, Tensor]:
        """The likeliest `new` tokens `(batch, new)`, and the exit of each. The sequences of a
        batch wait for each other; one alone runs no block more than it needs."""
        states, chosen, left = self.empty_states(), [], []
        for _ in range(new):
            logits, exits = self.run(input_ids, policy, states)
            input_ids = logits[:, -1:].argmax(-1)
            chosen.append(input_ids)
            left.append(exits[:, -1:])
        return torch.cat(chosen, 1), torch.cat(left, 1)

    def empty_states(self) -> list[State]:
        return self.decoder.empty_states()

    def remember(self, layer: int, x: Tensor, state: State) -> None:
        """Keys and values of a layer from a copied state x `(batch, n, dim)`, and no more."""
        stack: Any = self.decoder.stack
        mixer = cast(Attention, stack.mixers[layer])
        x = stack.wiring.norms(layer, "mix", x)
        at = torch.arange(state.seen, state.seen + x.shape[1], device=x.device)
        x = mixer.position.embed(x, at)
        given = Given(x, x, at, at, state, mixer.keep)
        mixer.project(given, Turn([*mixer.mix, mixer.position, mixer.score], given))
        state.seen += x.shape[1]

    def _block(self, layer: int, x: Tensor, state: State | None) -> Tensor:
        stack: Any = self.decoder.stack

        def mix(y: Tensor) -> Tensor:
            out: Tensor = stack.mixers[layer](y, state=state)
            return out

        sublayers: dict[str, Any] = {"mix": mix}
        if stack.fed[layer]:
            sublayers["feed"] = stack.feeds[layer]
        out: Tensor = stack.layers[layer](x, stack.wiring, layer, sublayers)
        return out
