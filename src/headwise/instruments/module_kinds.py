"""What two models of one make differ in, by kind of module: q, k, v, o, those of the MLP.

One table of labels says which number of which parameter belongs to which kind, parts of fused
projections too; what belongs to none (embeddings, norms, heads) is "rest", so that the kinds share
out the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import Tensor, nn

from headwise.models import view


@torch.no_grad()
def modules_of(model: nn.Module) -> tuple[list[str], dict[str, Tensor]]:
    """The kinds of modules, "rest" first, and for each parameter the kind of each of its numbers
    (an index into the list, in the parameter's shape)."""
    labels = deepcopy(model)
    for parameter in labels.parameters():
        parameter.zero_()
    kinds, look = ["rest"], view(labels)

    def mark(kind: str, *tables: Tensor | None) -> None:
        if kind not in kinds:
            kinds.append(kind)
        for table in tables:
            if table is not None:
                table.fill_(kinds.index(kind))  # a view of the parameter

    for a in look.attentions:
        mark("q", a.query_weight(), a.query_bias())
        mark("k", a.key_weight(), a.key_bias())
        mark("v", a.value_weight(), a.value_bias())
        mark("o", a.output_weight(), a.output_bias())
    for layer in look.layers:
        for name, module in layer.mlp.named_modules() if layer.mlp is not None else ():
            own = list(module.parameters(recurse=False))
            if own:
                mark(name.rpartition(".")[2] or "mlp", *own)
    return kinds, {name: p.to(torch.uint8) for name, p in labels.named_parameters()}


def chosen(kinds: list[str], label: Tensor, wanted: Iterable[str]) -> Tensor:
    """Which numbers of a parameter belong to the kinds that are wanted."""
    missing = set(wanted) - set(kinds)
    if missing:
        raise ValueError(f"no module is called {sorted(missing)}; there are {kinds}")
    return torch.isin(label, torch.tensor([kinds.index(w) for w in wanted], dtype=label.dtype))


@torch.no_grad()
def delta(base: nn.Module, tuned: nn.Module) -> dict[str, float]:
    """Squared l2 norm of what tuning changed, by kind: they sum to that of the whole model."""
    was, now = dict(base.named_parameters()), dict(tuned.named_parameters())
    moved: dict[str, float] = {}
    kinds, labels = modules_of(base)
    for name, label in labels.items():
        squares = (now[name] - was[name]).double().square()
        for i, kind in enumerate(kinds):
            moved[kind] = moved.get(kind, 0.0) + float(squares[label == i].sum())
    return moved


@torch.no_grad()
def merge(base: nn.Module, tuned: nn.Module, wanted: Iterable[str]) -> nn.Module:
    """A copy of `base` with the wanted kinds of `tuned`. Raises ValueError for kinds that are not
    there."""
    merged, now = deepcopy(base), dict(tuned.named_parameters())
    parameters = dict(merged.named_parameters())
    kinds, labels = modules_of(base)
    for name, label in labels.items():
        mine = chosen(kinds, label, wanted)
        parameters[name].copy_(torch.where(mine, now[name], parameters[name]))
    return merged


@torch.no_grad()
def destroy(model: nn.Module, wanted: Iterable[str]) -> nn.Module:
    """A copy with the wanted kinds set to zero."""
    blank = deepcopy(model)
    for parameter in blank.parameters():
        parameter.zero_()
    return merge(model, blank, wanted)
