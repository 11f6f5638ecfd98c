"""Attention-aware relevance propagation (AttnLRP) through a model as it comes.

One forward pass under the `Rules`, one backward pass: what arrives at an input is its relevance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headwise.instruments.input_gradients import over_features
from headwise.instruments.input_places import InputPlace, clean_logits, frozen
from headwise.instruments.metrics import Metric
from headwise.instruments.relevance_functions import carries, identity
from headwise.instruments.relevance_positions import Positions
from headwise.instruments.relevance_rules import Rules
from headwise.instruments.run import evaluating
from headwise.models import ModelView, UnsupportedModelError
from headwise.models.implementation import config_of, implementation
from headwise.models.prefix import logits_of
from headwise.parts import Attention

__all__ = ["Relevance", "lrp", "pa_lrp", "propagate"]

MAPS = ("taylor", "constant")


@dataclass(frozen=True, eq=False)
class Relevance:
    """Where a score goes back to.

    `tokens` `(batch, n)`: relevance of the inputs. `positions` `(batch, n)`: of what the model is
    told about places, None where it was not asked for. `parts` `(batch, n, width)`: of the
    features at the place where the inputs are read. `score` `(batch,)`: what was shared out.
    """

    tokens: Tensor
    positions: Tensor | None
    parts: Tensor
    score: Tensor

    @property
    def total(self) -> Tensor:
        """`(batch, n)`: tokens and positions together."""
        return self.tokens if self.positions is None else self.tokens + self.positions

    @property
    def lost(self) -> Tensor:
        """`(batch,)`: what of the score arrived nowhere, because biases, the softmax or an epsilon
        took it."""
        return self.score - self.total.sum(1)


def propagate(
    view: ModelView,
    inputs: Mapping[str, Any],
    metric: Metric,
    *,
    at: str | None = None,
    of: str | None = None,
    maps: str = "taylor",
    epsilon: float = 0.0,
    gamma: float = 0.0,
    positions: bool = False,
) -> Relevance:
    """Relevance of every input, and with `positions` of their places too.

    `at`, `of`: where inputs are read, see `input_places`. `maps`: "taylor" lets relevance through
    the softmax to queries and keys (AttnLRP); "constant" takes attention weights for constants
    (Ali et al. 2022, arXiv 2202.07304), which loses nothing. `epsilon`, `gamma`: of linear maps;
    AttnLRP takes a gamma of 0.05 in vision transformers.

    Raises ValueError for other words, negative numbers and a metric without a gradient;
    UnsupportedModelError for an attention that neither "sdpa" nor "eager" computes, for functions
    without a rule, and where positions were asked for and none were found.
    """
    if maps not in MAPS:
        raise ValueError(f"maps={maps!r}: expected one of {', '.join(MAPS)}")
    _check(view)
    place = InputPlace(view, inputs, at, of)
    clean = clean_logits(place, metric)
    batch = next(v.shape[0] for v in place.inputs.values() if isinstance(v, Tensor) and v.dim())
    told = Positions(view, place.stack, batch) if positions else None
    rules = Rules(epsilon, gamma, maps == "constant", told.added if told else None)
    read: list[Tensor] = []
    upstream = 0  # leaves of positions that stand before what was read

    def write(there: Tensor) -> Tensor:
        nonlocal upstream
        kept = there if carries(there) else there.detach().requires_grad_(True)
        upstream = len(told.leaves) if told else 0
        read.append(kept)
        return kept

    with ExitStack() as stack:
        stack.enter_context(evaluating(view.model))
        stack.enter_context(frozen(view.model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_units(view.model))
        if told:
            stack.enter_context(told.telling())
        stack.enter_context(place.touching(write))
        with rules:
            logits = logits_of(view.model(**place.inputs))
        score = metric.score(logits, place.inputs, clean)
    if not score.requires_grad:
        raise ValueError(
            f"the metric {metric.name!r} has no gradient: take one that has, such as "
            "LogitDifference(right, wrong)"
        )
    x = read[-1]
    leaves = [x, *(told.leaves if told else [])]
    grads = torch.autograd.grad(score.sum(), leaves, allow_unused=True)
    parts = (x * (torch.zeros_like(x) if grads[0] is None else grads[0])).detach()
    tokens, places = parts.sum(-1), None
    if told:
        by_leaf = [told.by_position(x, g) for x, g in zip(leaves[1:], grads[1:], strict=True)]
        places = torch.stack(by_leaf).sum(0)
        if upstream and place.at == "residual":  # what is read holds what was added before
            tokens = tokens - torch.stack(by_leaf[:upstream]).sum(0)
    return Relevance(tokens, places, parts, score.detach())


def lrp(
    view: ModelView,
    inputs: Mapping[str, Any],
    metric: Metric,
    *,
    at: str | None = None,
    of: str | None = None,
    maps: str = "taylor",
    epsilon: float = 0.0,
    gamma: float = 0.0,
    features: str = "sum",
) -> Tensor:
    """`(batch, n)`: relevance of the inputs (AttnLRP, arXiv 2402.05602), summed over features, or
    with features="norm" its length over them. Options and errors as of `propagate`."""
    over_features(torch.zeros(1, 1, 1), features)
    found = propagate(view, inputs, metric, at=at, of=of, maps=maps, epsilon=epsilon, gamma=gamma)
    return over_features(found.parts, features)


def pa_lrp(
    view: ModelView,
    inputs: Mapping[str, Any],
    metric: Metric,
    *,
    at: str | None = None,
    of: str | None = None,
    maps: str = "taylor",
    epsilon: float = 0.0,
    gamma: float = 0.0,
    part: str = "both",
) -> Tensor:
    """`(batch, n)`: relevance of tokens and of their positions together (PA-LRP, arXiv 2506.02138),
    or of one `part`: "tokens", "positions". Options and errors as of `propagate`."""
    if part not in ("both", "tokens", "positions"):
        raise ValueError(f"part={part!r}: expected both, tokens or positions")
    found = propagate(
        view,
        inputs,
        metric,
        at=at,
        of=of,
        maps=maps,
        epsilon=epsilon,
        gamma=gamma,
        positions=True,
    )
    places = found.total - found.tokens
    return {"both": found.total, "tokens": found.tokens, "positions": places}[part]


def _check(view: ModelView) -> None:
    for attention in view.attentions:
        if config_of(attention.module) is None:
            continue
        how = implementation(attention.module)
        if how not in ("sdpa", "eager"):
            raise UnsupportedModelError(
                f"{attention.name} attends by {how!r}, into which no rule reaches: call "
                "model.set_attn_implementation('sdpa') first"
            )


@contextmanager
def _units(model: nn.Module) -> Iterator[None]:
    """transformers' activations are one function each, whatever they are made of; attentions of our
    own compute their map with functions that have rules."""
    changed: list[nn.Module] = []
    backends: list[tuple[Attention, str | None]] = []

    def unit(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return identity(forward, x) if carries(x) and torch.is_grad_enabled() else forward(x)

    try:
        for module in model.modules():
            if isinstance(module, Attention):
                backends.append((module, module.backend))
                module.backend = "dense"
            known = type(module).__module__ == "transformers.activations"
            if known and "forward" not in vars(module):
                changed.append(module)
                module.forward = partial(unit, module.forward)
        yield
    finally:
        for module in changed:
            del module.forward
        for attention, backend in backends:
            attention.backend = backend
