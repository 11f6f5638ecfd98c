"""Several layers that compute with one layer's weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from headwise.compress.step import Step, take
from headwise.compress.structure.feeds import layers_of
from headwise.instruments.examples import model_view
from headwise.models import ModelView, UnsupportedModelError, view
from headwise.models.backbones.stack import Stack
from headwise.models.structure import LayerView
from headwise.parts.wiring.pre import PreNorm

PARTS = ("layer", "attention", "mlp")


@dataclass(frozen=True)
class ShareLayers(Step):
    """Layer i computes with the weights of layer roots[i], which is i itself or an earlier layer;
    a chain of such counts as its beginning. One that is its own root, and shared so far, gets
    weights of its own, equal at first. parts: "layer", norms included, "attention" or "mlp".
    `stack`: as `headwise.view` calls it.

    The layers stay modules of their own, with their own place in a cache; what they share are
    the parameters, which count, train and are saved once.
    """

    roots: tuple[int, ...]
    parts: str = "layer"
    stack: str | None = None

    def apply(self, model: nn.Module) -> None:
        modules = modules_of(view(model), self.parts, self.stack)
        if len(self.roots) != len(modules) or any(
            not 0 <= root <= place for place, root in enumerate(self.roots)
        ):
            raise ValueError(
                f"roots={self.roots}: expected {len(modules)} numbers, each the layer's own or "
                "that of an earlier one"
            )
        roots = resolved(self.roots)
        for place, root in enumerate(roots):
            require_alike(modules[place], modules[root], place, root)
        for place, root in enumerate(roots):
            if root == place:
                _own(modules[place], modules[:place])
        for place, root in enumerate(roots):
            if root != place:
                for mine, theirs in zip(modules[place], modules[root], strict=True):
                    tie(mine, theirs)


def share_layers(
    model: nn.Module | ModelView,
    groups: Iterable[Sequence[int]],
    parts: str = "layer",
    stack: str | None = None,
) -> None:
    """Let the layers of each group compute with the weights of its first.

        share_layers(model, [(4, 5), (6, 7)])           # pairs of neighbours, as in MobileLLM
        share_layers(model, [(0, 1, 2, 3)], parts="attention")

    (Universal transformers, arXiv 1807.03819; ALBERT, arXiv 1909.11942; MobileLLM, arXiv
    2402.14905.) The model computes as long as before and holds fewer parameters. parts, stack: see
    `ShareLayers`. Layers outside of the groups are as they were, shared or not. Raises ValueError
    for layers that are not there, stand in two groups or differ in shapes.
    """
    look = model_view(model)
    modules = modules_of(look, parts, stack)
    roots = list(tied_to(look, parts, stack))
    seen: set[int] = set()
    for group in groups:
        places = sorted(group)
        wrong = [p for p in places if not 0 <= p < len(modules)]
        if wrong or len(set(places)) < len(places) or seen & set(places):
            raise ValueError(
                f"group {tuple(group)}: expected layers 0 to {len(modules) - 1}, each in one group"
            )
        seen |= set(places)
        for place in places:
            roots[place] = roots[places[0]]
    take(look.model, ShareLayers(tuple(roots), parts, stack))


def tied_to(
    model: nn.Module | ModelView, parts: str = "layer", stack: str | None = None
) -> tuple[int, ...]:
    """For each layer the first whose weights it computes with, its own number where it has its
    own."""
    modules = modules_of(model_view(model), parts, stack)
    first = [
        next((id(p) for m in ms for p in m.parameters()), -1 - n) for n, ms in enumerate(modules)
    ]
    return tuple(first.index(one) for one in first)


def resolved(roots: Sequence[int]) -> tuple[int, ...]:
    """Chains followed to their beginnings: (0, 0, 1) is (0, 0, 0)."""
    found: list[int] = []
    for place, root in enumerate(roots):
        found.append(place if root == place else found[root])
    return tuple(found)


def tie(module: nn.Module, root: nn.Module) -> None:
    """Let `module` hold the very parameters of `root`, name by name."""
    for path, parameter in root.named_parameters(remove_duplicate=False):
        owner, _, name = path.rpartition(".")
        module.get_submodule(owner)._parameters[name] = parameter


def _own(modules: Sequence[nn.Module], others: Sequence[Sequence[nn.Module]]) -> None:
    """Copies in place of parameters that earlier layers hold as well."""
    taken = {id(p) for ms in others for m in ms for p in m.parameters()}
    copies: dict[int, nn.Parameter] = {}
    for module in modules:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and id(parameter) in taken:
                    copy = copies.setdefault(
                        id(parameter),
                        nn.Parameter(
                            parameter.detach().clone(), requires_grad=parameter.requires_grad
                        ),
                    )
                    part._parameters[name] = copy


def require_alike(
    mine: Sequence[nn.Module], theirs: Sequence[nn.Module], place: int, root: int
) -> None:
    shapes = [
        [
            (type(module).__name__, path, tuple(parameter.shape))
            for module in modules
            for path, parameter in module.named_parameters(remove_duplicate=False)
        ]
        for modules in (mine, theirs)
    ]
    if shapes[0] != shapes[1]:
        different = sorted(set(shapes[0]) ^ set(shapes[1]))[:1]
        raise ValueError(f"layers {place} and {root} differ, so they cannot share: {different}")


def modules_of(look: ModelView, parts: str, stack: str | None) -> list[list[nn.Module]]:
    """For each layer of a stack, the modules that hold what it would share."""
    if parts not in PARTS:
        raise ValueError(f"parts={parts!r}: expected one of {', '.join(PARTS)}")
    layers = layers_of(look, stack)
    owner = look.owners[layers[0].stack]
    built = isinstance(owner, Stack)
    if isinstance(owner, Stack) and (
        type(owner.wiring) is not PreNorm or len(set(owner.weights)) < owner.depth
    ):
        raise UnsupportedModelError(
            f"a stack with {type(owner.wiring).__name__} decides by itself what its layers share"
        )
    if not built and len({id(layer.module) for layer in layers}) < len(layers):
        raise UnsupportedModelError("layers of this model are one module that runs several times")
    return [_of(owner, n, layer, parts) for n, layer in enumerate(layers)]


def _of(owner: nn.Module, number: int, layer: LayerView, parts: str) -> list[nn.Module]:
    if parts == "attention":
        found: list[nn.Module] = [a.module for a in layer.attentions if a.kind == "self"]
    elif parts == "mlp":
        found = [] if layer.mlp is None else [layer.mlp]
    elif isinstance(owner, Stack):
        found = [owner.mixers[number], owner.feeds[number]]
        found += [owner.crosses[number]] if len(owner.crosses) else []
        norms = getattr(owner.wiring, "norms", {})
        found += [norms[place][number] for place in norms]
    else:
        found = [layer.module]
    if not found:
        raise UnsupportedModelError(f"layer {layer.index}: its {parts} was not found")
    return found
