"""The hooks that take tokens out while an encoder runs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headwise.compress.tokens.encoder import VisionEncoder
from headwise.compress.tokens.proportional import give_log_sizes
from headwise.compress.tokens.record import Record
from headwise.compress.tokens.reduction import Reduction, joined
from headwise.compress.tokens.sight import Sight, with_special
from headwise.models.errors import UnsupportedModelError
from headwise.models.layers import first_tensor
from headwise.models.sites import Site
from headwise.models.spots import spot_of
from headwise.parts import Attention

Count = int | float | None
"""How many patches stay, or which share of those that are there, or as the reduction says."""

PLACES = ("before", "middle", "after")


class Reducer:
    """Takes tokens out of an encoder in every forward pass from `attach` to `detach`.

    Hooks are methods of this one object, so that a deep copy of the model has a reducer of its
    own. Not for gradient checkpointing, which would run layers twice.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        schedule: Mapping[int, Count],
        reduction: Reduction,
        place: str,
    ) -> None:
        self.layers = [layer.module for layer in encoder.layers]
        self.special, self.has_class = encoder.special, encoder.has_class
        self.schedule, self.reduction, self.place = dict(schedule), reduction, place
        self.scales = [_scale(encoder.attention(i).module) for i in range(len(self.layers))]
        self.record = Record()
        self.handles: list[Any] = []
        self.sizes: Tensor | None = None
        self.state: Tensor | None = None
        self.seen: dict[str, Tensor] = {}
        self.small: Tensor | None = None
        self.groups: Tensor | None = None
        self.fed: Tensor | None = None

    # -- hooks on and off ----------------------------------------------------------------------

    def attach(self, encoder: VisionEncoder) -> None:
        add = self.handles.append
        first, last = min(self.schedule), max(self.schedule)
        add(self.layers[0].register_forward_pre_hook(self._begin, with_kwargs=True))
        if self.reduction.watches:
            first = 0
        for i in range(first, len(self.layers)):
            module = encoder.attention(i).module
            # also without weights: the model made its mask for all tokens
            give_log_sizes(module, self._added, self.handles)
            reads = i <= last and (i in self.schedule or self.reduction.watches)
            if not reads:
                continue
            if self.reduction.needs_map and self.place != "before":
                for kind in ("queries", "keys", "values"):
                    spot = spot_of(encoder.view, Site(kind, i, _stack_name(encoder)))
                    hook = partial(self._read, kind, encoder.attention(i).projections)
                    add(spot.module.register_forward_hook(hook))
            if self.place == "before":
                hook = partial(self._before, i, encoder.attention(i))
                add(self.layers[i].register_forward_pre_hook(hook, with_kwargs=True))
                continue
            if self.place == "middle" and i in self.schedule:
                norm = encoder.norm_before_mlp(i)
                assert norm is not None
                add(norm.register_forward_pre_hook(partial(self._middle, i)))
                end = encoder.layers[i].mlp_ends[0]
                add(end.register_forward_hook(self._mlp))
            add(self.layers[i].register_forward_hook(partial(self._leave, i)))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self._forget()

    def _forget(self) -> None:
        self.sizes = self.state = self.small = self.groups = self.fed = None
        self.seen.clear()

    # -- while the model runs ------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        stream = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(stream, Tensor) or stream.dim() != 3:
            raise UnsupportedModelError(
                f"{type(module).__name__} is not handed tokens (batch, n, width)"
            )
        for name in ("position_embeddings", "cu_seqlens", "rotary_pos_emb"):
            if kwargs.get(name) is not None:
                raise UnsupportedModelError(f"{type(module).__name__} is handed {name}")
        patches = stream.shape[1] - self.special
        if patches < 1:
            raise ValueError(f"{stream.shape[1]} tokens, of which {self.special} stand in front")
        self._forget()
        self.sizes = torch.ones(len(stream), patches, device=stream.device)
        self.record.begin(len(stream), patches)

    def _added(self) -> Tensor | None:
        """What keys' scores get more `(batch, 1, 1, n)`; None before anything was joined."""
        if not self.reduction.proportional or self.sizes is None or not self.record.counts:
            return None
        return with_special(self.sizes, self.special).log()[:, None, None]

    def _read(self, kind: str, found: Any, module: nn.Module, args: Any, whole: Tensor) -> None:
        part = {"queries": found.query, "keys": found.key, "values": found.value}[kind]
        size = part.heads * part.head_dim
        if part.by_head is None:
            mine = whole[..., part.start : part.start + size].unflatten(-1, (part.heads, -1))
        else:
            mine = whole.unflatten(-1, (part.heads, 3, part.head_dim))[..., part.by_head, :]
        self.seen[kind] = mine.transpose(1, 2)

    def _before(self, i: int, attention: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        if self.reduction.needs_map:
            normed = stream if attention.norm is None else attention.norm(stream)
            for kind, part in (
                ("queries", attention.projections.query),
                ("keys", attention.projections.key),
                ("values", attention.projections.value),
            ):
                made = torch.einsum("bnw,hdw->bhnd", normed, part.weight)
                bias = part.bias
                self.seen[kind] = made if bias is None else made + bias[:, None]
        small = self._reduce(i, stream)[0]
        return ((small, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": small})

    def _middle(self, i: int, module: nn.Module, args: Any) -> Any:
        small, groups = self._reduce(i, args[0])
        if groups is None:
            return None
        self.small, self.groups = small, groups
        return (small, *args[1:])

    def _mlp(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The layer is about to add this to as many tokens as it had: each gets what the token
        that it is in got. `_leave` then takes the small residual instead."""
        if self.groups is None:
            return None
        self.fed = first_tensor(output)
        assert self.fed is not None
        groups, s = self.groups, self.special
        index = torch.where(groups < 0, 0, groups)[..., None] + s
        spread = self.fed.gather(1, index.expand(-1, -1, self.fed.shape[-1]))
        spread = spread.masked_fill((groups < 0)[..., None], 0.0)
        return torch.cat([self.fed[:, :s], spread], 1)

    def _leave(self, i: int, module: nn.Module, args: Any, output: Any) -> Any:
        if self.place == "after":
            tokens = first_tensor(output)
            assert tokens is not None
            made = self._reduce(i, tokens)[0]
        elif self.small is not None and self.fed is not None:
            made = self.small + self.fed
            self.small = self.fed = self.groups = None
        else:  # nothing went; what was seen here is noted all the same
            if i not in self.schedule:
                self._note(i)
            self.seen.clear()
            return None
        return type(output)([made, *output[1:]]) if isinstance(output, tuple | list) else made

    # -- fewer tokens ---------------------------------------------------------------------------

    def _sight(self, i: int) -> Sight:
        assert self.sizes is not None
        empty = self.sizes.new_empty(len(self.sizes), 1, self.special + self.sizes.shape[1], 0)
        kinds = (self.seen.get(kind, empty) for kind in ("queries", "keys", "values"))
        q, k, v = kinds
        scale = self.scales[i]
        if scale is None:
            scale = max(q.shape[-1], 1) ** -0.5
        return Sight(
            q, k, v, scale, self.special, self.has_class, self.sizes, self.state,
            self.reduction.proportional, i, len(self.layers),
        )  # fmt: skip

    def _note(self, i: int) -> Sight:
        sight = self._sight(i)
        noted = self.reduction.observe(sight)
        if noted is not None:
            self.state = noted
            sight = self._sight(i)
        return sight

    def _reduce(self, i: int, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        sight = self._note(i)
        self.seen.clear()
        if i not in self.schedule:
            return tokens, None
        n, s = sight.patches, self.special
        wanted = self.schedule[i]
        k = self.reduction.count(sight) if wanted is None else how_many(wanted, n)
        if k >= n:
            return tokens, None
        small, groups = self.reduction(tokens[:, s:], sight, k)
        m = small.shape[1]
        self.sizes = joined(sight.sizes, groups, m)
        if self.state is not None:
            self.state = joined(self.state, groups, m, "amax")
        self.record.note(i, groups, m)
        return torch.cat([tokens[:, :s], small], 1), groups


def how_many(wanted: int | float, n: int) -> int:
    """Of n patches: a count, or a share, rounded up as EViT does."""
    if isinstance(wanted, int):
        return wanted
    return max(1, -int(-wanted * n // 1))


def _scale(module: nn.Module) -> float | None:
    if isinstance(module, Attention):
        return module.score.scale()
    for name in ("scaling", "scale"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _stack_name(encoder: VisionEncoder) -> str | None:
    return encoder.layers[0].stack if len(encoder.view.stacks) > 1 else None
