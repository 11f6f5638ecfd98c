"""Heads that look at what is near become a recurrence with a state of fixed size.

    ratios = recency_ratio(model, inputs, window=4)          # (layers, heads)
    replace_heads(model, most_recent(ratios, share=0.5))     # then train on

RecurFormer (arXiv 2410.12850): a head whose attention stays with the newest tokens needs no cache
of all of them. Its place is taken by a selective state space (Mamba) of the same width, fed by the
same tokens and read out by the same columns of W_O; heads that look far keep keys and values. For
models of our own backbones: the caches of transformers hold one kind of state a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from headwise.compress.step import Step, take
from headwise.compress.structure.heads import PruneHeads
from headwise.instruments.examples import model_view, read_examples
from headwise.instruments.run import evaluating
from headwise.models import AttentionReading, ModelView, observe
from headwise.models.errors import UnsupportedModelError
from headwise.models.structure import AttentionView
from headwise.parts import Attention, Mixer, SelectiveSSM, State


class Pair(State):
    """The states of an attention and of the recurrence beside it."""

    def __init__(self, near: State, far: State | None) -> None:
        super().__init__()
        self.near, self.far = near, far

    def nbytes(self) -> int:
        return self.near.nbytes() + (0 if self.far is None else self.far.nbytes())

    def allocated(self) -> int:
        return self.near.allocated() + (0 if self.far is None else self.far.allocated())

    def select(self, index: Tensor) -> None:
        self.near.select(index)
        if self.far is not None:
            self.far.select(index)


class RecurrentHeads(Mixer):
    """A mixer of which some heads are attention and `heads` others, together `width` wide, are a
    selective state space; what both write is added, as the heads of one W_O are.

    `far`: the attention, None where no head of it is left. `near`: the recurrence.
    """

    def __init__(self, far: Attention | None, near: SelectiveSSM) -> None:
        super().__init__()
        self.far, self.near = far, near
        self.dim, self.causal = near.dim, True

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        state: State | None = None,
    ) -> Tensor:
        """As `Mixer.forward`; `state` from `empty_state`."""
        pair = state if isinstance(state, Pair) else None
        if state is not None and pair is None:
            raise ValueError(f"state is a {type(state).__name__}: take one from empty_state()")
        out: Tensor = self.near(x, context, mask, positions, None if pair is None else pair.near)
        if self.far is not None:
            far = None if pair is None else pair.far
            out = out + self.far(x, mask=mask, positions=positions, state=far)
        if pair is not None:
            pair.seen += x.shape[1]
        return out

    def empty_state(self) -> State:
        far = None if self.far is None else self.far.empty_state()
        return Pair(self.near.empty_state(), far)

    def state_bytes(self, n: int, itemsize: int = 4) -> int:
        far = 0 if self.far is None else self.far.state_bytes(n, itemsize)
        return self.near.state_bytes(n, itemsize) + far

    def flops(self, n: int) -> int:
        return self.near.flops(n) + (0 if self.far is None else self.far.flops(n))

    @classmethod
    def examples(cls, dim: int, heads: int, causal: bool) -> tuple[Self, ...]:
        if not causal:
            return ()
        near = SelectiveSSM(dim, channels=dim, states=4)
        return (cls(Attention(dim, heads, causal=True), near),)


@dataclass(frozen=True)
class ReplaceHeads(Step):
    """`heads`: (layer, head) that become a state space with `states` numbers a channel and a short
    convolution of `conv` tokens."""

    heads: tuple[tuple[int, int], ...]
    states: int = 16
    conv: int = 4

    def apply(self, model: nn.Module) -> None:
        chosen = _checked(model_view(model), self.heads)
        near = {a: self._recurrence(a, gone) for a, gone in chosen.items()}
        part = {a: gone for a, gone in chosen.items() if len(gone) < a.heads}
        if part:
            PruneHeads(tuple((a.layer, h) for a, gone in part.items() for h in gone)).apply(model)
        for attention, recurrence in near.items():
            far = attention.module if attention in part else None
            assert far is None or isinstance(far, Attention)
            model.set_submodule(attention.name, RecurrentHeads(far, recurrence))

    def _recurrence(self, attention: AttentionView, heads: Sequence[int]) -> SelectiveSSM:
        columns = attention.output_weight()[list(heads)].detach()  # (heads, width, value_dim)
        out = columns.permute(1, 0, 2).flatten(1)
        with torch.device(out.device):
            near = SelectiveSSM(
                attention.width, states=self.states, conv=self.conv, channels=out.shape[1]
            )
        near.to(out.dtype)
        with torch.no_grad():
            near.out_proj.weight.copy_(out)
        return near


def replace_heads(
    model: nn.Module, heads: Iterable[Sequence[int]], states: int = 16, conv: int = 4
) -> None:
    """Put a selective state space in the place of some heads (layer, head), in place of the model.

    Their queries, keys and values are gone, and so is what they cached: decoding holds `states`
    numbers for each of their channels and the last `conv - 1` inputs, however long the text. They
    start with their columns of W_O and otherwise new (with torch's random numbers), so the model
    has to be trained on. `headwise.save` keeps the change.

    Raises ValueError for heads that are not there, UnsupportedModelError for attentions that are
    not causal ones of `headwise.parts` with one matrix each for queries, keys and values. Nothing
    is changed then.
    """
    chosen = tuple(sorted({(int(layer), int(head)) for layer, head in heads}))
    take(model, ReplaceHeads(chosen, states, conv))


@torch.no_grad()
def recency_ratio(
    model: nn.Module | ModelView, inputs: Any, window: int = 8, batch_size: int = 8
) -> Tensor:
    """How near each head looks `(layers, heads)`: of the attention that is not on the first token
    (a sink says nothing about distance), the share on the `window` newest tokens, the query's own
    included. Over queries that see more than `window` tokens. NaN where a layer has fewer heads.

    `inputs` as `headwise.see` takes them. Raises ValueError where no input is long enough.
    """
    look = model_view(model)
    rows = {id(a.module): number for number, a in enumerate(look.attentions)}
    near = torch.full((len(rows), max(a.heads for a in look.attentions)), torch.nan).double()
    whole = near.clone()

    def read(seen: AttentionReading) -> None:
        n, here = seen.query.shape[2], rows[id(seen.attention.module)]
        late = slice(window, None)  # these queries do not have the first token in their window
        sums = (
            seen.map.mass_within(window)[:, :, late].double().sum((0, 2)),
            1 - seen.map.mass_at(torch.zeros(n, dtype=torch.long))[:, :, late].double(),
        )
        for table, new in ((near, sums[0]), (whole, sums[1].sum((0, 2)))):
            table[here, : len(new)] = table[here, : len(new)].nan_to_num(0) + new.cpu()

    batches = read_examples(look.model, inputs, batch_size=batch_size)
    with evaluating(look.model), observe(look, read):
        for batch in batches:
            look.model(**batch.given)
    if not bool((whole > 0).any()):
        raise ValueError(f"no input is longer than the window of {window} tokens")
    return (near / whole).float()


def most_recent(ratios: Tensor, share: float, by_layer: bool = False) -> list[tuple[int, int]]:
    """The share of heads with the highest ratios, of all heads, or of each layer by itself."""
    if not 0 < share < 1:
        raise ValueError(f"share={share}: expected a share of the heads between 0 and 1")
    blocks = [[row] for row in range(len(ratios))] if by_layer else [list(range(len(ratios)))]
    found: list[tuple[int, int]] = []
    for block in blocks:
        heads = [
            (row, head)
            for row in block
            for head in range(ratios.shape[1])
            if not bool(ratios[row, head].isnan())
        ]
        heads.sort(key=lambda at: -float(ratios[at]))
        found += heads[: round(share * len(heads))]
    return sorted(found)


def _checked(look: ModelView, heads: tuple[tuple[int, int], ...]) -> dict[AttentionView, list[int]]:
    by_layer = {a.layer: a for a in look.attentions}
    if not heads:
        raise ValueError("heads= is empty: say which, as (layer, head)")
    found: dict[AttentionView, list[int]] = {}
    for layer, head in heads:
        attention = by_layer.get(layer)
        if attention is None or not 0 <= head < attention.heads:
            raise ValueError(f"there is no head ({layer}, {head}) in {sorted(by_layer)}")
        found.setdefault(attention, []).append(head)
    for attention in found:
        module = attention.module
        if not isinstance(module, Attention) or not module.causal:
            raise UnsupportedModelError(
                f"{attention.name} ({type(module).__name__}): heads become a recurrence in causal "
                "attentions of headwise.parts; caches of transformers hold one kind of state"
            )
        attention.output_weight()
        if attention.heads != attention.kv_heads and len(found[attention]) < attention.heads:
            group = attention.heads // attention.kv_heads
            groups = {head // group for head in found[attention]}
            if len(found[attention]) != group * len(groups):
                raise ValueError(
                    f"layer {attention.layer}: heads {found[attention]} are only a part of those "
                    f"that share a key-value head (groups of {group}): its cache would stay"
                )
    return found
