"""One of our own attentions (`headwise.parts.Attention`) with fewer heads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from headwise.compress.structure.nothing import NoMixer
from headwise.compress.structure.slicing import (
    add_bias,
    check_sliceable,
    keep_along,
    keep_columns,
    keep_rows,
)
from headwise.compress.structure.surgery import put
from headwise.maps import Alibi as Slopes
from headwise.models.errors import UnsupportedModelError
from headwise.models.projections import Projections
from headwise.models.structure import AttentionView
from headwise.parts import Attention
from headwise.parts.merge import Merge
from headwise.parts.normalize.softmax import LearnedSink, Softmax, SoftmaxOffByOne
from headwise.parts.output.gate import HeadGate
from headwise.parts.part import Part
from headwise.parts.position.absolute import Learned, Sinusoidal
from headwise.parts.position.alibi import Alibi
from headwise.parts.position.buckets import RelativeBuckets
from headwise.parts.position.rotary import Rotary
from headwise.parts.position.shaw import Shaw
from headwise.parts.project.heads import GroupedQuery, MultiHead, MultiQuery, SparseQuery
from headwise.parts.score.dot import Dot, SoftCap
from headwise.parts.slots import Given, Position, Project, Turn

_WITHOUT_HEADS = frozenset(
    {
        *(MultiHead, GroupedQuery, MultiQuery, SparseQuery),
        *(Position, Rotary, Sinusoidal, Learned, Shaw),
        *(Dot, SoftCap, Softmax, Merge),
    }
)
"""Parts that treat every head alike and hold nothing for a single one beside what is sliced."""

_BY_HEAD: dict[type[Part], tuple[tuple[str, int], ...]] = {
    LearnedSink: (("logit", 0),),
    SoftmaxOffByOne: (("zero", 0),),
    HeadGate: (("logit", 0),),
    RelativeBuckets: (("table", 1),),
    Alibi: (),
}
"""Parts that have something for every query head: (parameter or buffer, axis)."""


class Reread(Project):
    """A projection whose key-value heads are read by unequal groups of query heads: the state
    holds each once, the kernel gets one for each query head."""

    def __init__(self, inner: Project, of: tuple[int, ...]) -> None:
        super().__init__()
        self.inner = inner
        self.headwise_key_value_of = of

    def forward(self, given: Given, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.inner(given, turn)
        index = torch.tensor(self.headwise_key_value_of, device=k.device)
        return q, k.index_select(1, index), v.index_select(1, index)

    def width(self) -> int:
        return self.inner.width()

    def flops(self, n_q: int, n_k: int) -> int:
        return self.inner.flops(n_q, n_k)


@dataclass(frozen=True, eq=False)
class BuiltCut:
    """What one attention is to keep; see `surgery.Cut`."""

    view: AttentionView
    module: Attention
    found: Projections
    queries: list[int]
    keys: list[int]
    of: tuple[int, ...]


def plan_built(view: AttentionView, module: Attention, removed: set[int]) -> BuiltCut:
    """As `surgery.plan`, for an attention of parts."""
    wrong = sorted(h for h in removed if not 0 <= h < view.heads)
    if wrong:
        raise ValueError(
            f"{view.name} has heads 0 to {view.heads - 1}; it has no head "
            f"{', '.join(map(str, wrong))}"
        )
    found = view.projections
    if isinstance(found, str):
        raise UnsupportedModelError(f"{view.name}: {found}")
    for one in (found.query.module, found.key.module, found.value.module, module.merge.linear):
        check_sliceable(one, view.name)
    inner = module.project.inner if isinstance(module.project, Reread) else module.project
    parts = [inner, *(part for part in module.parts() if part is not module.project)]
    for part in parts:
        if type(part) not in _WITHOUT_HEADS and type(part) not in _BY_HEAD:
            raise UnsupportedModelError(
                f"{view.name}: which part of {type(part).__name__} belongs to a head is not known, "
                "so heads cannot be removed beside it"
            )
    group = view.heads // found.key.heads
    of = found.key.read or tuple(h // group for h in range(view.heads))
    queries = [h for h in range(view.heads) if h not in removed]
    keys = sorted({of[h] for h in queries})
    return BuiltCut(view, module, found, queries, keys, tuple(keys.index(of[h]) for h in queries))


def carry_out_built(cut: BuiltCut, bias: bool, model: nn.Module) -> None:
    """As `surgery.carry_out`."""
    module, found = cut.module, cut.found
    linear = module.merge.linear
    if bias:
        add_bias(linear, module.dim)
    if not cut.queries:
        put(model, module, NoMixer(module.dim, module.causal, linear.bias))
        return
    size, kept = module.size, cut.queries
    values = size.value_dim
    keep_rows(found.query.module, _features(kept, size.head_dim))
    keep_rows(found.key.module, _features(cut.keys, size.head_dim))
    keep_rows(found.value.module, _features(cut.keys, values))
    keep_columns(linear, _features(kept, values))
    inner = module.project.inner if isinstance(module.project, Reread) else module.project
    group = len(kept) // len(cut.keys)
    equal = cut.of == tuple(h // group for h in range(len(kept)))
    stored = replace(size, heads=len(kept), kv_heads=len(cut.keys))
    seen = stored if equal else replace(stored, kv_heads=len(kept))
    module.project = inner if equal else Reread(inner, cut.of)
    module.size = seen
    for part in module.parts():
        part.size = seen
        _by_head(part, kept)
    inner.size = stored


def _features(heads: list[int], size: int) -> list[int]:
    return [h * size + i for h in heads for i in range(size)]


def _by_head(part: Part, kept: list[int]) -> None:
    for name, axis in _BY_HEAD.get(type(part), ()):
        keep_along(part, name, kept, axis)
    if isinstance(part, Alibi):
        part._bias = Slopes(tuple(part._bias.slopes[h] for h in kept))
    if isinstance(part, RelativeBuckets):
        assert isinstance(part.head, Tensor)
        part.head = torch.arange(len(kept), device=part.head.device)
