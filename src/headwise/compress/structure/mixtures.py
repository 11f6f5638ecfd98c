"""Mixtures of experts become dense feed-forward parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.compress.step import Step, take
from headwise.compress.structure.experts import Mixture, mixture_of, routing
from headwise.compress.structure.least_squares import Problem
from headwise.compress.structure.matrices import put_in_place
from headwise.compress.structure.moments import body_of, run, stopping, tokens_of
from headwise.instruments.examples import Examples, model_view, read_examples
from headwise.instruments.run import evaluating
from headwise.models import ModelView
from headwise.models.errors import UnsupportedModelError
from headwise.parts.feed.base import Feed

HOW = ("keep", "merge")


@dataclass(frozen=True)
class MixtureToDense(Step):
    """Empty dense feed-forward layers in the places of mixtures. feeds: (name, hidden width)."""

    feeds: tuple[tuple[str, int], ...]

    def apply(self, model: nn.Module) -> None:
        found = []
        modules = dict(model.named_modules())
        for name, hidden in self.feeds:
            mixture = mixture_of(modules[name]) if name in modules else None
            if mixture is None:
                raise ValueError(f"{name} is no mixture of experts of {type(model).__name__}")
            if not 1 <= hidden <= mixture.experts * mixture.hidden:
                raise ValueError(
                    f"{name}: hidden={hidden}, its experts have {mixture.experts} x "
                    f"{mixture.hidden} in all"
                )
            found.append((mixture, hidden))
        for mixture, hidden in found:
            new = mixture.dense(hidden).train(mixture.module.training)
            put_in_place(model, mixture.module, new)


@dataclass(frozen=True, eq=False)
class Densified:
    """What became of one mixture. used `(experts,)`: share of tokens sent to each; mass
    `(experts,)`: mean weight, 0 where a token was not sent; kept: the experts that are left (all,
    where they were merged). before, after: |y - dense(x)|^2 over |y|^2 on the inputs, with weights
    as they were put together, and with the last matrix fitted."""

    name: str
    used: Tensor
    mass: Tensor
    kept: tuple[int, ...]
    before: float
    after: float


def mixture_to_dense(
    model: nn.Module | ModelView,
    inputs: Any,
    keep: int = 1,
    how: str = "keep",
    layers: Iterable[int] | None = None,
    fitted: bool = True,
    ridge: float | None = None,
    **reading: Any,
) -> list[Densified]:
    """Make one dense layer of each mixture of experts, for good; no router, no other experts stay.

        mixture_to_dense(model, texts, keep=2, tokenizer=tok)

    how: "keep", the `keep` experts that carry most routing weight, side by side in one layer of
    keep times their width, each with its mean weight; "merge", one expert whose weights are the
    mean of all, weighted by how much each carries (M-SMoE, Li et al. 2023, arXiv 2310.01334, eq.
    2, without its alignment of neurons). fitted: then fit the last matrix by least squares to
    what the mixture gave on the inputs (see `least_squares`; ridge as there). layers: numbers of
    those meant, by default all that have a mixture. Layers are done in order, each on what the
    layers before it, already dense, hand over.

    Raises ValueError where there is no mixture or `keep` does not fit, UnsupportedModelError for
    mixtures that are not known (see `experts.mixture_of`); the model is then as it was.
    """
    if how not in HOW:
        raise ValueError(f"how={how!r}: expected one of {', '.join(HOW)}")
    look = model_view(model)
    places = _places(look, layers)
    for name, mixture in places:
        if not 1 <= keep < mixture.experts and how == "keep":
            raise ValueError(
                f"{name} has {mixture.experts} experts: keep={keep} should be 1 to "
                f"{mixture.experts - 1}"
            )
    batches = read_examples(look.model, inputs, **reading)
    done = []
    with evaluating(look.model), torch.no_grad():
        for name, _ in places:
            done.append(_densified(look, name, batches, keep, how, fitted, ridge))
    return done


def _places(look: ModelView, layers: Iterable[int] | None) -> list[tuple[str, Mixture]]:
    names = {id(module): name for name, module in look.model.named_modules()}
    wanted = None if layers is None else set(layers)
    found: dict[str, Mixture] = {}
    for layer in look.layers:
        if wanted is not None and layer.index not in wanted:
            continue
        roots = [layer.module] if layer.mlp is None else [layer.module, layer.mlp]
        for module in (m for root in roots for m in root.modules()):
            mixture = mixture_of(module)
            if mixture is not None:
                found[names[id(module)]] = mixture
    if not found:
        raise ValueError(f"{type(look.model).__name__} has no mixture of experts in these layers")
    return list(found.items())


def _densified(
    look: ModelView,
    name: str,
    batches: list[Examples],
    keep: int,
    how: str,
    fitted: bool,
    ridge: float | None,
) -> Densified:
    mixture = mixture_of(look.model.get_submodule(name))
    assert mixture is not None
    used, mass, count = _routed(look, mixture, batches)
    used, mass = used / count, mass / count
    if how == "merge":
        kept: Sequence[int] = range(mixture.experts)
        dense = mixture.dense(mixture.hidden)
        _merge(dense, mixture, mass)
    else:
        kept = sorted(mass.argsort(descending=True)[:keep].tolist())
        dense = mixture.dense(keep * mixture.hidden)
        _side_by_side(dense, mixture, kept, mass)
    down: Any = dense.down
    problem = _problem(look, mixture, dense, batches)
    fit = problem.solve(down, ridge) if fitted else None
    before = fit.before if fit is not None else problem.error(down)
    take(look.model, MixtureToDense(((name, down.in_features),)))
    look.model.get_submodule(name).load_state_dict(dense.state_dict())
    after = fit.after if fit is not None else before
    return Densified(name, used, mass, tuple(kept), before, after)


def _routed(
    look: ModelView, mixture: Mixture, batches: list[Examples]
) -> tuple[Tensor, Tensor, int]:
    used, mass = torch.zeros(2, mixture.experts, dtype=torch.float64)
    count = 0
    body = body_of(look.model, [mixture.module])
    for batch in batches:

        def see(x: Tensor, weights: Tensor, out: Tensor, batch: Examples = batch) -> None:
            nonlocal used, mass, count
            real = tokens_of(weights, batch).double().cpu()
            used, mass = used + (real > 0).sum(0), mass + real.sum(0)
            count += len(real)

        with routing(mixture, see), stopping(mixture.module):
            run(body, batch)
    if not count:
        raise UnsupportedModelError("no token of the inputs reached this mixture")
    return used, mass, count


def _problem(look: ModelView, mixture: Mixture, dense: Feed, batches: list[Examples]) -> Problem:
    """What the dense layer's last matrix reads, and what the mixture gives."""
    problem = Problem()
    body = body_of(look.model, [mixture.module])
    down: Any = dense.down
    read: list[Tensor] = []
    handle = down.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    try:
        for batch in batches:

            def see(x: Tensor, weights: Tensor, out: Tensor, batch: Examples = batch) -> None:
                dense(tokens_of(x, batch))
                problem.add(read.pop(), tokens_of(out, batch))

            with routing(mixture, see), stopping(mixture.module):
                run(body, batch)
    finally:
        handle.remove()
    return problem


def _merge(dense: Any, mixture: Mixture, mass: Tensor) -> None:
    share = (mass / mass.sum()).to(mixture.up)[:, None, None]
    dense.up.weight.copy_((share * mixture.up).sum(0))
    if mixture.gate is not None:
        dense.gate.weight.copy_((share * mixture.gate).sum(0))
    dense.down.weight.copy_((share * mixture.down).sum(0) * float(mass.sum()))


def _side_by_side(dense: Any, mixture: Mixture, kept: Sequence[int], mass: Tensor) -> None:
    weights = mass[list(kept)]
    weights = (weights / weights.sum() * mass.sum()).to(mixture.down)
    dense.up.weight.copy_(mixture.up[list(kept)].flatten(0, 1))
    if mixture.gate is not None:
        dense.gate.weight.copy_(mixture.gate[list(kept)].flatten(0, 1))
    down = weights[:, None, None] * mixture.down[list(kept)]  # (kept, dim, hidden)
    dense.down.weight.copy_(down.transpose(0, 1).flatten(1))
