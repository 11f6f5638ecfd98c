"""Mixtures of experts, ours and transformers': their weights, and who is sent where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.models.errors import UnsupportedModelError
from headwise.parts.feed.base import Feed
from headwise.parts.feed.experts import Experts
from headwise.parts.feed.gated import Gated
from headwise.parts.feed.mlp import Mlp


@dataclass(frozen=True, eq=False)
class Mixture:
    """One mixture. up, gate `(experts, hidden, dim)`, gate None without one; down `(experts, dim,
    hidden)`: the model's own tensors, in that layout."""

    module: nn.Module
    up: Tensor
    gate: Tensor | None
    down: Tensor
    activation: Callable[[Tensor], Tensor]

    @property
    def experts(self) -> int:
        return len(self.up)

    @property
    def hidden(self) -> int:
        return self.up.shape[1]

    def dense(self, hidden: int) -> Feed:
        """An empty feed-forward layer of this width that computes as one expert does."""
        dim = self.up.shape[2]
        kind = Mlp if self.gate is None else Gated
        with torch.device(self.up.device):
            made = kind(dim, hidden, self.activation, bias=False)
        return made.to(self.up.dtype)


def mixture_of(module: nn.Module) -> Mixture | None:
    """The mixture that this module is; None for one that has no experts.

    Known are `headwise.parts.feed.experts.Experts` and the blocks of transformers that hold a
    router and `experts` with three-dimensional weights (Mixtral, Qwen3-MoE, OLMoE ...). Raises
    UnsupportedModelError for mixtures with more to them: shared experts, biases, norms inside.
    """
    if isinstance(module, Experts):
        return Mixture(module, module.up, module.gate, module.down, module.activation)
    inside: Any = getattr(module, "experts", None)
    if not isinstance(inside, nn.Module):
        return None
    name = type(module).__name__
    down = getattr(inside, "down_proj", None)
    plain = (
        isinstance(down, nn.Parameter)
        and down.dim() == 3
        and getattr(inside, "is_concatenated", False)
        and not any(
            getattr(inside, word, True)
            for word in ("has_bias", "is_transposed", "has_post_expert_norm")
        )
    )
    routers = [m for n, m in module.named_children() if n in ("gate", "router")]
    known = {id(p) for part in (inside, *routers) for p in part.parameters()}
    rest = [n for n, p in module.named_parameters() if id(p) not in known]
    if not plain or len(routers) != 1 or rest:
        more = f"; beside router and experts it has {', '.join(rest[:3])}" if rest else ""
        raise UnsupportedModelError(
            f"{name}: only mixtures of one router and plain experts (one tensor each for all, no "
            f"biases, no norms) can be made dense{more}"
        )
    weights: Any = inside
    if weights.has_gate:
        gate, up = weights.gate_up_proj.chunk(2, 1)
        return Mixture(module, up, gate, weights.down_proj, weights.act_fn)
    return Mixture(module, weights.up_proj, None, weights.down_proj, weights.act_fn)


@contextmanager
def routing(mixture: Mixture, see: Callable[[Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """While this lasts, `see` is handed what each call of the mixture reads `(tokens, dim)`, and
    the experts' weights `(tokens, experts)`, 0 where a token does not go, and what the mixture
    gives `(tokens, dim)`."""
    module, experts = mixture.module, mixture.experts
    held: list[tuple[Tensor, Tensor]] = []

    def before(inside: nn.Module, args: Any, kwargs: Any) -> None:
        given = [*args, *kwargs.values()]
        held.append((given[1], given[2]))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        if not isinstance(output, Tensor):
            raise UnsupportedModelError(
                f"{type(module).__name__} gives {type(output).__name__}, no tensor"
            )
        flat = x.reshape(-1, x.shape[-1])
        if isinstance(module, Experts):
            weights, chosen = module.route(flat)
        else:
            chosen, weights = held.pop()
        whole = flat.new_zeros(len(flat), experts)
        see(flat, whole.scatter_add(1, chosen, weights.to(whole)), output.reshape_as(flat))

    handles = [module.register_forward_hook(after, with_kwargs=True)]
    if not isinstance(module, Experts):
        inside: Any = module.experts
        handles.append(inside.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
