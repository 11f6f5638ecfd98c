"""`Attention`: one mechanism out of interchangeable parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from headwise.maps import Bias, Causal, Full, KeyMask, Pattern, Scores, Window
from headwise.parts import kernels, planner
from headwise.parts.bias import total
from headwise.parts.merge import Merge
from headwise.parts.mixer import Mixer
from headwise.parts.mixers.arguments import check_mask
from headwise.parts.normalize.softmax import Softmax
from headwise.parts.plan import Plan
from headwise.parts.project.heads import MultiHead
from headwise.parts.score.dot import Dot
from headwise.parts.slots import (
    Choice,
    Given,
    Mix,
    Normalize,
    Output,
    Position,
    Project,
    Score,
    Turn,
)
from headwise.parts.state import State


@dataclass(frozen=True, eq=False)
class Seen:
    """One call of an attention, as a watcher sees it.

    `scores`: queries, keys and what shapes the map; `out` `(batch, maps * heads, n_q, value_dim)`;
    `keys`: which keys are real `(batch, n_k)`, None for all. `exact`: None where the map is
    softmax(scores), otherwise why the scores do not tell it.
    """

    scores: Scores
    values: Tensor
    out: Tensor
    keys: Tensor | None
    exact: str | None


Edit = Callable[
    ["Attention", Scores, Tensor, Tensor | None, tuple[int, int]],
    tuple[Tensor, Scores, Tensor] | None,
]
"""(attention, scores, values, which keys are real, token numbers of the first query and the first
key) -> the outputs instead, and the scores and values that they come from; None to leave it."""


class Attention(Mixer):
    """Attention put together from parts, each exchangeable, each with a default.

        Attention(512, 8, project=GroupedQuery(2), position=Rotary(), pattern=Window(256),
                  causal=True)

    `project`: tokens to queries, keys, values, and what is cached (MultiHead). `position`: how a
    token knows where it is (Position: not at all). `score`: how well query and key fit (Dot).
    `pattern`: who may look at whom, a `headwise.maps` pattern or a `Choice` by content (Full);
    `causal=True` adds Causal. `normalize`: scores to weights (Softmax). `mix`: heads that look at
    each other. `output`: what happens to the heads' outputs before they are merged; mix and
    output take one part or several, in order. `context_dim`: width of what cross-attention reads.
    `dropout`: of weights, in training. `backend`: None lets the planner choose (`explain` says
    what and why), or one of sdpa, rows, dense, or a backend of `headwise.maps.attend`.

    Raises ValueError for combinations that cannot work, when it is built.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        project: Project | None = None,
        position: Position | None = None,
        score: Score | None = None,
        pattern: Pattern | Choice | None = None,
        normalize: Normalize | None = None,
        mix: Mix | Sequence[Mix] = (),
        output: Output | Sequence[Output] = (),
        causal: bool = False,
        context_dim: int | None = None,
        dropout: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.causal, self.dropout, self.backend = dim, causal, dropout, backend
        self.project = MultiHead() if project is None else project
        self.position = Position() if position is None else position
        self.score = Dot() if score is None else score
        self.choice = pattern if isinstance(pattern, Choice) else None
        self.normalize = Softmax() if normalize is None else normalize
        self.mix = nn.ModuleList([mix] if isinstance(mix, Mix) else mix)
        self.output = nn.ModuleList([output] if isinstance(output, Output) else output)
        self.merge = Merge()
        kinds = {
            "project": Project,
            "position": Position,
            "score": Score,
            "normalize": Normalize,
        }
        for name, kind in kinds.items():
            _expect(name, getattr(self, name), kind)
        for name, several in (("mix", Mix), ("output", Output)):
            for part in getattr(self, name):
                _expect(name, part, several)
        if pattern is not None and self.choice is None:
            _expect("pattern", pattern, Pattern)
        static = pattern if isinstance(pattern, Pattern) else Full()
        self.pattern: Pattern = static & Causal() if causal else static
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), not {dropout}")
        if causal and context_dim is not None:
            raise ValueError(
                f"context_dim={context_dim} makes a cross-attention, whose keys have no order "
                "relative to the queries: causal=True has no meaning there, leave it out"
            )
        self.size = self.project.sizes(dim, heads, context_dim or dim, causal, self.score.maps)
        self.cross = context_dim is not None
        for part in self.parts():
            part.bind(self.size)
        for part in self.parts():
            part.check(self)
        planner.check(self)
        self.watchers: list[Callable[[Seen], None]] = []
        self.editor: Edit | None = None

    def parts(self) -> list[Project | Position | Score | Choice | Normalize | Mix | Output | Merge]:
        """All parts in the order of their work."""
        found = [self.project, *self.mix, self.position, self.score, self.choice, self.normalize]
        return [part for part in [*found, *self.output, self.merge] if part is not None]

    # -- computing -----------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        state: State | None = None,
    ) -> Tensor:
        """As `Mixer.forward`. Raises ValueError for shapes that do not fit, naming them."""
        given = self._given(x, context, mask, positions, state)
        turn = Turn([*self.mix, self.position, self.score], given)
        q, k, v = self.project(given, turn)
        keys = self._real(given, k.shape[2])
        if state is not None:
            state.seen += x.shape[1]
        scores, v = self._scores(q, k, v, keys, given)
        edited = None
        if self.editor is not None:
            edited = self.editor(self, scores, v, keys, self._numbers(x, k, state))
        if edited is None:
            out = kernels.attend(self, scores, v)
        else:
            out, scores, v = edited
        if self.watchers:
            seen = Seen(scores, v, out, keys, planner.hidden_map(self))
            for watcher in self.watchers:
                watcher(seen)
        size = self.size
        if size.maps > 1:
            shape = (size.kv_heads, size.maps, size.heads // size.kv_heads)
            out = self.score.combine(out.unflatten(1, shape)).flatten(1, 2)
        out = self.project.finish(out, given)
        for part in self.output:
            out = part(out, given)
        merged: Tensor = self.merge(out)
        return merged

    def _numbers(self, x: Tensor, k: Tensor, state: State | None) -> tuple[int, int]:
        """Token numbers of the first query and the first key of a call, padding counted."""
        seen = x.shape[1] if state is None else state.seen
        return seen - x.shape[1], 0 if self.cross else seen - k.shape[2]

    def _given(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        positions: Tensor | None,
        state: State | None,
    ) -> Given:
        size = self.size
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (batch, n, {self.dim}), not {tuple(x.shape)}")
        held = state is not None and "key" in state if self.cross else False
        if self.cross and context is None and not held:
            raise ValueError(
                f"this is a cross-attention (context_dim={size.context_dim}): give context="
            )
        if context is not None:
            if self.causal:
                raise ValueError("a causal attention takes no context: build it without causal")
            if context.dim() != 3 or context.shape[-1] != size.context_dim:
                raise ValueError(
                    f"context must be (batch, m, {size.context_dim}), not {tuple(context.shape)}"
                )
            if context.shape[0] != x.shape[0]:
                raise ValueError(
                    f"x has {x.shape[0]} sequences and context {context.shape[0]}: give as many"
                )
            if held:
                raise ValueError(
                    "this state holds the keys of a context already: leave context out to go on "
                    "with it, or take a new state for another context"
                )
        if state is not None and not (self.causal or self.cross):
            raise ValueError(
                "a state is for decoding, and without causal=True earlier tokens would have to "
                "see later ones: build the attention with causal=True"
            )
        seen = 0 if state is None else state.seen
        at_q = positions
        if at_q is None:
            at_q = torch.arange(seen, seen + x.shape[1], device=x.device)
        elif self.position.indexed:
            raise ValueError(
                f"{type(self.position).__name__} goes by places in the sequence, not by positions "
                "that are given: leave positions out"
            )
        embedded = self.position.embed(x, at_q)
        source: Tensor | None
        if context is not None:
            at_k = torch.arange(context.shape[1], device=x.device)
            source = self.position.embed(context, at_k) if self.position.embeds_context else context
        elif self.cross:
            source, at_k = None, at_q[..., :0]
        else:
            source, at_k = embedded, at_q
        wanted = embedded if source is None else source
        check_mask(mask, (wanted.shape[0], wanted.shape[1]))
        return Given(embedded, source, at_q, at_k, state, self.keep, mask)

    @property
    def keep(self) -> int | None:
        """Keys that a state must hold, where a window says that older ones are never seen again;
        None for all."""
        p = self.pattern
        if not (isinstance(p, Window) and p.right == 0 and p.left is not None):
            return None
        return max(p.left - 1, 0) if self.choice is None else None

    def _real(self, given: Given, n_k: int) -> Tensor | None:
        """Which keys are real `(batch, n_k)`, those in the state included; None if all are."""
        mask, state = given.mask, given.state
        if not self.project.keeps_keys:
            return None
        new = 0 if given.source is None else given.source.shape[1]
        if state is None:
            return mask
        if "mask" not in state:
            if mask is None:
                return None
            before = mask.new_ones((mask.shape[0], n_k - new, 1))
            state.append("mask", before, self.keep)
        if given.source is None:
            return state["mask"][..., 0]
        batch = given.x.shape[0]
        if mask is None:
            mask = torch.ones((batch, new), dtype=torch.bool, device=given.x.device)
        return state.append("mask", mask[..., None], self.keep)[..., 0]

    def _scores(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, given: Given
    ) -> tuple[Scores, Tensor]:
        pattern = self.pattern
        if keys is not None:
            pattern = pattern & KeyMask(keys)
        k, v, pattern = self.score.expand(k, v, pattern)
        if self.size.maps > 1:
            v = v.repeat_interleave(self.size.maps, 1)
        scale = self.score.scale()
        if self.choice is not None:
            with torch.no_grad():
                pattern = self.choice(q.detach(), k.detach(), pattern, scale)
        bias: Tensor | Bias | None = total(
            self.score.bias(given), self.position.bias(), q.shape[2], k.shape[2]
        )
        sinks = self.normalize.sinks()
        return Scores.of(q, k, pattern, scale, bias, sinks, self.score.softcap), v

    # -- decoding ------------------------------------------------------------------------------

    def step(self, x: Tensor, state: State, mask: Tensor | None = None) -> Tensor:
        """One more token `(batch, 1, dim)`; a cross-attention steps over the context it read."""
        if self.cross:
            return self.forward(x, mask=mask, state=state)
        return super().step(x, state, mask)

    def state_bytes(self, n: int, itemsize: int = 4) -> int:
        """Bytes of cache of one sequence after n tokens."""
        held = n if self.keep is None else min(n, self.keep)
        parts = [*self.mix, self.position, self.score]
        width = self.project.width() + sum(part.cache_width() for part in parts)
        fixed = self.project.fixed_width(n) + sum(part.cache_fixed(n) for part in parts)
        return itemsize * (held * width + fixed)

    def wider(self) -> int:
        """Coordinates that the parts add to queries and keys."""
        return sum(part.wider for part in [*self.mix, self.position, self.score])

    # -- costs ---------------------------------------------------------------------------------

    def explain(self, n: int, n_k: int | None = None, batch: int = 1) -> Plan:
        """What a call with n queries (and n_k keys) would do: the kernel, why, and the costs."""
        return planner.plan(self, n, n if n_k is None else n_k, batch)

    def flops(self, n: int) -> int:
        return self.explain(n).flops

    @classmethod
    def examples(cls, dim: int, heads: int, causal: bool) -> tuple[Self, ...]:
        return (cls(dim, heads, causal=causal),)


def _expect(name: str, part: object, kind: type) -> None:
    if not isinstance(part, kind):
        what = part.__name__ if isinstance(part, type) else type(part).__name__
        made = f" (call it: {what}())" if isinstance(part, type) else ""
        raise ValueError(f"{name}= takes a {kind.__name__}, not {what}{made}")
