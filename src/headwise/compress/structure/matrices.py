"""The matrices of a model's layers by name, and how one is put in another's place."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from headwise.compress.structure.recalled import lend_instead
from headwise.models import ModelView
from headwise.models.projections import features_first

KINDS = ("all", "attention", "mlp")


def is_matrix(module: nn.Module) -> bool:
    """A Linear of torch, or transformers' Conv1D (which keeps its weight transposed)."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        return False
    return isinstance(module, nn.Linear) or hasattr(module, "nf")


def matrices_of(view: ModelView, which: str | Iterable[str] = "all") -> dict[str, nn.Module]:
    """Name -> matrix, in order of execution, each once.

    which: "all" in the layers, those of the "attention" or the "mlp" (whatever is in a layer and
    not in an attention; routers of mixtures are no part of it), or names as in `named_modules()`.
    Embeddings and the output layer are taken only by name.

    Raises ValueError for names that the model does not have, or that are no matrix.
    """
    if not isinstance(which, str):
        return {name: named_matrix(view.model, name) for name in which}
    if which not in KINDS:
        raise ValueError(f"which={which!r}: expected one of {', '.join(KINDS)}, or names")
    names = {id(module): name for name, module in view.model.named_modules()}
    found: dict[str, nn.Module] = {}
    for layer in view.layers:
        attending = [module for a in layer.attentions for module in a.module.modules()]
        for attention in layer.attentions:
            output = getattr(attention.projections, "output", None)
            attending += [output] if output is not None else []  # BERT keeps it beside
        inside = {id(module) for module in attending}
        rest = [*layer.module.modules(), *(() if layer.mlp is None else layer.mlp.modules())]
        if which != "mlp":
            found |= {
                names[id(m)]: m
                for m in attending
                if is_matrix(m) and "router" not in names[id(m)].split(".")
            }
        if which != "attention":
            found |= {
                names[id(m)]: m
                for m in rest
                if is_matrix(m) and id(m) not in inside and "router" not in names[id(m)].split(".")
            }
    return found


def named_matrix(model: nn.Module, name: str) -> nn.Module:
    """The Linear or Conv1D of this name. Raises ValueError where there is none."""
    try:
        found = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no module {name!r}") from None
    if not is_matrix(found):
        raise ValueError(f"{name} is a {type(found).__name__}, expected a Linear or a Conv1D")
    return found


def shape_of(matrix: nn.Module) -> tuple[int, int]:
    """(out, in) of a matrix."""
    out, wide = features_first(matrix).shape
    return int(out), int(wide)


def bias_of(matrix: nn.Module) -> Tensor | None:
    bias = getattr(matrix, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def put_in_place(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """`new` wherever `old` stands, which may be several places, for those who recall it too."""
    lend_instead(model, old, new)
    for owner in list(model.modules()):
        for name, held in list(owner._modules.items()):
            if held is old:
                owner._modules[name] = new


def tied_elsewhere(model: nn.Module, matrix: nn.Module) -> str | None:
    """The name of another module that uses this matrix's weight, None where there is none."""
    weight = matrix.weight
    for name, module in model.named_modules():
        if module is not matrix and any(p is weight for p in module._parameters.values()):
            return name
    return None
