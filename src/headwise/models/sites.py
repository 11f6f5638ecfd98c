"""Sites: the named places where what a model computes can be read, and written.

    residual   (batch, n, width)             what layer l reads; layer L, one past the last, is what
                                             the last layer leaves
    attention  (batch, n, width)             what an attention adds to the residual
    mlp        (batch, n, width)             what the feed-forward part adds
    heads      (batch, n, heads, value_dim)  the heads' outputs, before the output projection
    queries    (batch, n, heads, head_dim)   as projected: before norms of their own and rotation
    keys       (batch, n, kv_heads, head_dim)
    values     (batch, n, kv_heads, value_dim)
    neurons    (batch, n, hidden)            what the last projection of the feed-forward part reads

The map itself (scores, patterns, what a query may see) is written by `headwise.swap`, and read by
`observe`. Whatever is written passes gradients; so does what is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from headwise.models.errors import UnsupportedModelError
from headwise.models.spots import Spot, spot_of
from headwise.models.structure import ModelView

KINDS = ("residual", "attention", "mlp", "heads", "queries", "keys", "values", "neurons")
BY_ATTENTION = ("attention", "heads", "queries", "keys", "values")
"""Kinds of which a layer with self- and cross-attention has two."""

Write = Callable[[Tensor], Tensor | None]
"""Handed what is there; returns what shall be there instead, of the same shape, or None."""


@dataclass(frozen=True, order=True)
class Site:
    """One place of a model: a kind from the table above, in one layer.

    `layer`: 0-based in its stack. `stack`: needed where the model has several. `attention`: "self"
    or "cross". Raises ValueError for a kind that is not in the table.
    """

    kind: str
    layer: int
    stack: str | None = None
    attention: str = "self"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is no kind of site; there are {', '.join(KINDS)}")
        if self.attention not in ("self", "cross"):
            raise ValueError(f"attention={self.attention!r}: expected 'self' or 'cross'")

    def __str__(self) -> str:
        where = "" if self.stack is None else f"{self.stack} "
        kind = self.kind if self.attention == "self" else f"cross {self.kind}"
        return f"{where}L{self.layer} {kind}"


def sites_of(view: ModelView, kind: str) -> list[Site]:
    """All sites of a kind, in order of execution; `stack` is told where there are several.

    Layers without such a part (an attention of the other sort, no MLP) are left out.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of site; there are {', '.join(KINDS)}")
    several = len(view.stacks) > 1
    found: list[Site] = []
    for layer in view.layers:
        stack = layer.stack if several else None
        if kind in BY_ATTENTION:
            found += [Site(kind, layer.index, stack, a.kind) for a in layer.attentions]
        elif kind == "residual" or layer.mlp_ends:
            found.append(Site(kind, layer.index, stack))
        last = [one for one in view.layers if one.stack == layer.stack][-1]
        if kind == "residual" and layer is last:
            found.append(Site(kind, layer.index + 1, stack))
    return found


@contextmanager
def touching(view: ModelView, writes: Mapping[Site, Write]) -> Iterator[None]:
    """While this lasts, each site's function is handed what is there, in every forward pass, and
    may put something else in its place.

        def silence(out):                      # (batch, n, heads, value_dim)
            return torch.cat([torch.zeros_like(out[:, :, :1]), out[:, :, 1:]], dim=2)

        with touching(view(model), {Site("heads", 3): silence}):
            model(**inputs)

    Nested uses see what outer ones wrote. A layer that runs several times in a pass (ALBERT) is
    touched at the one place that the site names. Nothing is left behind, also after an exception.

    Raises ValueError for a layer or stack that is not there, and for a written tensor of another
    shape; UnsupportedModelError where the place was not found in this model, before anything runs.
    """
    handles: list[Any] = []
    counts: Counter[int] = Counter()
    spots = [(site, spot_of(view, site), write) for site, write in writes.items()]
    # only where a module runs several times in a pass are its runs counted
    by_module = {id(spot.module): spot.module for _, spot, _ in spots if spot.run is not None}
    try:
        owners = {id(m): m for m in [*view.owners.values(), view.model]} if by_module else {}
        for owner in owners.values():
            inside = {id(m) for m in owner.modules()} & set(by_module)
            handles.append(owner.register_forward_pre_hook(_restart(counts, inside)))
        for module in by_module.values():
            handles.append(module.register_forward_pre_hook(_count(counts)))
        for site, spot, write in spots:
            handles.append(_attach(site, spot, write, counts))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recording(
    view: ModelView, wanted: Iterable[Site], detach: bool = True
) -> Iterator[dict[Site, Tensor]]:
    """A dictionary that holds what was at each site in the last forward pass.

    `detach`: False keeps the graph, for gradients with respect to what was there.
    """
    kept: dict[Site, Tensor] = {}

    def keep(site: Site) -> Write:
        def write(value: Tensor) -> Tensor | None:
            kept[site] = value.detach() if detach else value
            if site.kind in ("attention", "mlp"):
                return value.clone()  # some models add the other one to it in place (Falcon)
            # a part of a tensor (one head's features) is on the way to the answer once it is put
            # back: gradients with respect to the part alone would be none
            return None if detach else value

        return write

    with touching(view, {site: keep(site) for site in wanted}):
        yield kept


def _restart(counts: Counter[int], inside: set[int]) -> Callable[[nn.Module, Any], None]:
    def restart(module: nn.Module, args: Any) -> None:
        for key in inside:
            del counts[key]

    return restart


def _count(counts: Counter[int]) -> Callable[[nn.Module, Any], None]:
    def count(module: nn.Module, args: Any) -> None:
        counts[id(module)] += 1

    return count


def _attach(site: Site, spot: Spot, write: Write, counts: Counter[int]) -> Any:
    def changed(whole: Tensor) -> Tensor | None:
        if spot.run is not None and counts[id(spot.module)] != spot.run + 1:
            return None
        there = spot.take(whole)
        made = write(there)
        if made is None:
            return None
        if made.shape != there.shape:
            raise ValueError(
                f"{site}: {tuple(made.shape)} was written in place of {tuple(there.shape)}; "
                "the shape must stay"
            )
        return spot.put(whole, made)

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        stream = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(stream, Tensor):
            raise UnsupportedModelError(
                f"{site}: {type(module).__name__} is handed {type(stream).__name__}, no tensor"
            )
        made = changed(stream)
        if made is None:
            return None
        return ((made, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": made})

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(first, Tensor):
            raise UnsupportedModelError(
                f"{site}: {type(module).__name__} gives {type(first).__name__}, no tensor"
            )
        made = changed(first)
        if made is None:
            return None
        return type(output)([made, *output[1:]]) if isinstance(output, tuple | list) else made

    if spot.before:
        return spot.module.register_forward_pre_hook(before, with_kwargs=True)
    return spot.module.register_forward_hook(after)
