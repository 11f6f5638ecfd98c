"""The four projections of an attention, and the slice of each that belongs to a head.

    q_h = x W_Q[h]^T + b_Q[h]        W_Q (heads, head_dim, width), k and v alike by key-value head
    y   = sum over h of o_h W_O[h]^T W_O (heads, width, head_dim)

Every slice is a view of the model's own parameter: nothing is copied, gradients and edits pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from headwise.models import naming

READ = "headwise_key_value_of"
"""Attribute of an attention whose groups of query heads are unequal (some were removed): for each
query head the key-value head that it reads. Its attention function is handed keys and values
repeated so, as many as query heads."""


@dataclass(frozen=True, eq=False)
class Part:
    """Some output features of one projection: all of them, a range, or one of three by head.

    `heads`: as stored. `read`: None, or for each query head the stored head that it reads, where
    that follows no rule; the slices are then those of `read`, copies instead of views.
    """

    module: nn.Module
    heads: int
    head_dim: int
    start: int = 0
    by_head: int | None = None  # which of (query, key, value) in a (heads, 3, head_dim) layout
    read: tuple[int, ...] | None = None

    @property
    def seen(self) -> int:
        """Heads that the attention function is handed."""
        return self.heads if self.read is None else len(self.read)

    def _slice(self, table: Tensor) -> Tensor:
        """`(heads, head_dim, ...)` out of a table whose first axis is the output features."""
        if self.by_head is not None:
            return table.unflatten(0, (self.heads, 3, self.head_dim))[:, self.by_head]
        stop = self.start + self.heads * self.head_dim
        stored = table[self.start : stop].unflatten(0, (self.heads, self.head_dim))
        return stored if self.read is None else stored[list(self.read)]

    @property
    def weight(self) -> Tensor:
        """`(heads, head_dim, in_width)`, a view."""
        return self._slice(features_first(self.module))

    @property
    def bias(self) -> Tensor | None:
        """`(heads, head_dim)`, a view."""
        bias = getattr(self.module, "bias", None)
        return self._slice(bias) if isinstance(bias, Tensor) else None


@dataclass(frozen=True, eq=False)
class Projections:
    """What was found of one attention. `output` is a Linear-like module or None."""

    query: Part
    key: Part
    value: Part
    output: nn.Module | None

    @property
    def output_weight(self) -> Tensor:
        """`(heads, width, head_dim)`, a view."""
        assert self.output is not None
        table = features_first(self.output)
        return table.unflatten(1, (self.query.heads, -1)).permute(1, 0, 2)


def features_first(module: nn.Module) -> Tensor:
    """The weight as `(out, in)`: Linear keeps it so, transformers' Conv1D transposed."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if hasattr(module, "nf") else weight


def out_features(module: nn.Module) -> int:
    return features_first(module).shape[0]


def is_projection(module: Any) -> bool:
    """Whether this maps features to features by one floating-point matrix."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point()


def child(module: nn.Module, path: str) -> nn.Module | None:
    """The descendant at a dotted path, or None."""
    found: Any = module
    for name in path.split("."):
        modules = found._modules if isinstance(found, nn.Module) else {}
        if modules.get(name) is None:
            return None
        found = modules[name]
    return found


def count(names: tuple[str, ...], *sources: Any) -> int | None:
    """The first of the named attributes that is a positive whole number."""
    for source in sources:
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def has_projections(module: nn.Module) -> bool:
    """Whether the children carry the names of an attention's projections."""
    return any(
        all(is_projection(child(module, name)) for name in names)
        for names in [*naming.SEPARATE, *((name,) for name in naming.FUSED)]
    )


def find(
    module: nn.Module, parent: nn.Module | None, config: Any, family: str
) -> Projections | str:
    """The projections of an attention module, or the reason why they are not known.

    Counts come from the shapes of the weights where they can, so that a model whose heads were
    pruned is described as it is and not as its config remembers it.
    """
    head_dim = count(naming.HEAD_DIM, module)
    named_heads = count(naming.HEADS, module) or count(naming.HEADS, config)
    output = _output(module, parent)
    for names in naming.SEPARATE:
        parts = [child(module, name) for name in names]
        if all(is_projection(part) for part in parts):
            three = [part for part in parts if part is not None]
            if head_dim is None and named_heads is not None:
                head_dim = out_features(three[0]) // named_heads
            return _separate(module, three, head_dim, output)
    if named_heads is None:
        return f"{type(module).__name__} does not say how many heads it has"
    for alone, fused in naming.QUERY_AND_FUSED_KEY_VALUE:
        query, pair = child(module, alone), child(module, fused)
        if query is not None and pair is not None and is_projection(query) and is_projection(pair):
            size = head_dim or out_features(query) // named_heads
            heads = out_features(query) // size
            kv_heads = out_features(pair) // (2 * size)
            found = Projections(
                Part(query, heads, size),
                Part(pair, kv_heads, size),
                Part(pair, kv_heads, size, start=kv_heads * size),
                output,
            )
            return _checked(module, found)
    for name in naming.FUSED:
        whole = child(module, name)
        if whole is not None and is_projection(whole):
            known = family in naming.FUSED_BY_HEAD or name not in naming.FUSED_WITHOUT_RULE
            if not known or family in naming.FUSED_OTHERWISE:
                return f"the layout of {name} in {type(module).__name__} is not known"
            return _fused(module, whole, named_heads, head_dim, config, family, output)
    children = ", ".join(name for name, _ in module.named_children()) or "none"
    return f"the projections of {type(module).__name__} are not known by its children: {children}"


def _output(module: nn.Module, parent: nn.Module | None) -> nn.Module | None:
    places = [(module, name) for name in naming.OUTPUT]
    places += [(parent, name) for name in naming.OUTPUT_BESIDE if parent is not None]
    for place, name in places:
        found = child(place, name)
        if isinstance(found, nn.Sequential):  # a projection with its dropout
            found = found[0]
        if found is not None and is_projection(found):
            return found
    return None


def _separate(
    module: nn.Module,
    parts: list[nn.Module],
    head_dim: int | None,
    output: nn.Module | None,
) -> Projections | str:
    if head_dim is None:
        return f"{type(module).__name__} does not say how many heads it has"
    wide = [out_features(part) for part in parts]
    if wide[0] % head_dim or wide[1] % head_dim:
        return f"{type(module).__name__}: widths {wide[:2]} are no multiples of head_dim {head_dim}"
    heads, kv_heads = wide[0] // head_dim, wide[1] // head_dim
    return _checked(
        module,
        Projections(
            Part(parts[0], heads, head_dim),
            Part(parts[1], kv_heads, head_dim),
            Part(parts[2], kv_heads, wide[2] // kv_heads),
            output,
        ),
    )


def _fused(
    module: nn.Module,
    whole: nn.Module,
    heads: int,
    head_dim: int | None,
    config: Any,
    family: str,
    output: nn.Module | None,
) -> Projections | str:
    rows = out_features(whole)
    groups = getattr(module, "num_key_value_groups", None)
    kv_heads = count(naming.KEY_VALUE_HEADS, module)
    if kv_heads is None:
        kv_heads = heads // groups if groups else count(naming.KEY_VALUE_HEADS, config) or heads
    size = head_dim or rows // (heads + 2 * kv_heads)
    if rows != (heads + 2 * kv_heads) * size:
        return (
            f"{type(module).__name__}: a fused projection to {rows} features is not "
            f"({heads} + 2 x {kv_heads}) heads of {size}"
        )
    by_head = family in naming.FUSED_BY_HEAD or getattr(module, "multi_query", None) is False
    if by_head:
        query, key, value = (Part(whole, heads, size, by_head=which) for which in range(3))
    else:
        query = Part(whole, heads, size)
        key = Part(whole, kv_heads, size, start=heads * size)
        value = Part(whole, kv_heads, size, start=(heads + kv_heads) * size)
    return _checked(module, Projections(query, key, value, output))


def _checked(module: nn.Module, found: Projections) -> Projections | str:
    """Refuse what does not fit together (gated queries, latent attention ...)."""
    query, key, value = found.query, found.key, found.value
    read: tuple[int, ...] | None = getattr(module, READ, None)
    if read is not None:
        key, value = replace(key, read=read), replace(value, read=read)
        found = replace(found, key=key, value=value)
    elif key.heads == 0 or query.heads % key.heads:
        return (
            f"{type(module).__name__}: {query.heads} query heads do not share {key.heads} "
            f"key-value heads"
        )
    if found.output is not None:
        have, want = features_first(found.output).shape[1], query.heads * value.head_dim
        if have != want:
            return (
                f"{type(module).__name__}: the output projection takes {have} features, "
                f"{query.heads} heads of {value.head_dim} give {want}"
            )
    return found
