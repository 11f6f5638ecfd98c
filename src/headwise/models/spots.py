"""Where in a model a site is: the module, before or after it, and which of its features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from headwise.models import naming
from headwise.models.errors import UnsupportedModelError
from headwise.models.projections import Part, child, features_first, is_projection
from headwise.models.structure import AttentionView, LayerView, ModelView

if TYPE_CHECKING:
    from headwise.models.sites import Site


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _instead(tensor: Tensor, made: Tensor) -> Tensor:
    return made


@dataclass(frozen=True, eq=False)
class Spot:
    """`module` is handed the tensor (`before`), or gives it; `take` reads the site's part of it,
    `put` makes a new tensor with that part exchanged. `run`: which of several runs of the module
    in one pass is meant, None where there is one."""

    module: nn.Module
    before: bool
    run: int | None = None
    take: Callable[[Tensor], Tensor] = _whole
    put: Callable[[Tensor, Tensor], Tensor] = _instead


def spot_of(view: ModelView, site: Site) -> Spot:
    """Raises ValueError for a layer or stack that the model does not have, UnsupportedModelError
    where this layer's part is not known."""
    stack = _stack(view, site)
    layers = [layer for layer in view.layers if layer.stack == stack]
    past = layers[-1].index + 1
    if site.kind == "residual" and site.layer == past:
        last = layers[-1]
        return Spot(last.module, before=False, run=_run(view, last, last.module))
    layer = next((one for one in layers if one.index == site.layer), None)
    if layer is None:
        raise ValueError(f"{site}: the {stack} has layers {layers[0].index} to {layers[-1].index}")
    if site.kind == "residual":
        return Spot(layer.module, before=True, run=_run(view, layer, layer.module))
    if site.kind in ("mlp", "neurons"):
        return _feed(view, site, layer)
    found = [a for a in layer.attentions if a.kind == site.attention]
    if not found:
        raise ValueError(f"{site}: this layer has no {site.attention}-attention")
    return _attention(view, site, layer, found[0])


def _stack(view: ModelView, site: Site) -> str:
    if site.stack is None and len(view.stacks) > 1:
        raise ValueError(
            f"{site}: the model has the stacks {', '.join(view.stacks)}; say stack= which"
        )
    if site.stack is not None and site.stack not in view.stacks:
        raise ValueError(f"{site}: the model has the stacks {', '.join(view.stacks)}")
    return site.stack or view.stacks[0]


def _run(view: ModelView, layer: LayerView, module: nn.Module) -> int | None:
    same = [one for one in view.layers if one.module is layer.module]
    if len(same) > 1:
        return same.index(layer)
    # a mixer or a feed-forward layer that stands in several blocks of our own stacks
    uses = [one for one in view.layers if module in (*one.attention_ends, *one.mlp_ends)]
    return uses.index(layer) if len(uses) > 1 else None


def _feed(view: ModelView, site: Site, layer: LayerView) -> Spot:
    if not layer.mlp_ends:
        raise UnsupportedModelError(
            f"{site}: the feed-forward part of {type(layer.module).__name__} was not found"
        )
    end = layer.mlp_ends[0]
    run = _run(view, layer, end)
    if site.kind == "mlp":
        return Spot(end, before=False, run=run)
    return Spot(down_projection(layer), before=True, run=run)


def down_projection(layer: LayerView) -> nn.Module:
    """The last projection of a layer's feed-forward part, from its neurons to the residual.

    A Linear, or transformers' Conv1D (its weight transposed). Raises UnsupportedModelError where
    there is not exactly one (mixtures of experts) or it was not found.
    """
    owner = layer.mlp if layer.mlp is not None else layer.module
    for name in naming.DOWN:
        found = child(owner, name)
        if found is not None and is_projection(found):
            return found
    ends = [end for end in layer.mlp_ends if is_projection(end)]
    if ends:
        return ends[0]
    name = type(layer.mlp or layer.module).__name__
    raise UnsupportedModelError(
        f"layer {layer.index}: the last projection of {name} was not found among its children "
        f"({', '.join(n for n, _ in owner.named_children())})"
    )


def _attention(view: ModelView, site: Site, layer: LayerView, attention: AttentionView) -> Spot:
    same = [a for a in view.attentions if a.module is attention.module]
    run = same.index(attention) if len(same) > 1 else None
    if site.kind == "attention":
        ends = layer.attention_ends
        if not ends or (len(ends) > 1 and len(ends) != len(layer.attentions)):
            raise UnsupportedModelError(
                f"{site}: what {type(attention.module).__name__} adds to the residual is not known"
            )
        end = ends[layer.attentions.index(attention)] if len(ends) > 1 else ends[0]
        return Spot(end, before=False, run=run)
    found = attention.projections
    if isinstance(found, str):
        raise UnsupportedModelError(f"{site}: {found}")
    if site.kind == "heads":
        if found.output is None:
            raise UnsupportedModelError(f"{site}: {attention.name} has no known output projection")
        heads = found.query.heads
        size = features_first(found.output).shape[1]

        def by_head(whole: Tensor) -> Tensor:
            if whole.dim() != 3 or whole.shape[-1] != size:
                raise UnsupportedModelError(
                    f"{site}: the output projection of {attention.name} is handed "
                    f"{tuple(whole.shape)}, expected (batch, n, {size})"
                )
            return whole.unflatten(-1, (heads, -1))

        return Spot(found.output, True, run, by_head, lambda whole, made: made.flatten(-2))
    part = {"queries": found.query, "keys": found.key, "values": found.value}[site.kind]
    return Spot(part.module, False, run, *_features(part))


def _features(
    part: Part,
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """The features of one projection out of a fused one, by head, and how to exchange them."""
    heads, size, start = part.heads, part.head_dim, part.start
    stop = start + heads * size
    if part.by_head is None:

        def take(whole: Tensor) -> Tensor:
            return whole[..., start:stop].unflatten(-1, (heads, size))

        def put(whole: Tensor, made: Tensor) -> Tensor:
            return torch.cat([whole[..., :start], made.flatten(-2), whole[..., stop:]], -1)

        return take, put
    which = part.by_head

    def take_one(whole: Tensor) -> Tensor:
        return whole.unflatten(-1, (heads, 3, size))[..., which, :]

    def put_one(whole: Tensor, made: Tensor) -> Tensor:
        three = list(whole.unflatten(-1, (heads, 3, size)).unbind(-2))
        three[which] = made
        return torch.stack(three, -2).flatten(-3)

    return take_one, put_one
