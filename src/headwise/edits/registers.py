"""Test-time registers: a place beside the image for what a few neurons write on its patches.

Vision transformers put their outliers, tokens of very large norm, on patches that say little, and
heads then look at them. A handful of neurons write them. `find_register_neurons` finds those, and
`Registers` gives the model tokens of nothing on which they write instead (Jiang et al. 2025, Vision
Transformers Don't Need Trained Registers, arXiv 2506.08010).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from headwise.models.discovery import view as view_of
from headwise.models.errors import UnsupportedModelError
from headwise.models.layers import first_tensor
from headwise.models.sites import Site, Write, recording, sites_of, touching
from headwise.models.structure import ModelView


@dataclass(frozen=True, order=True)
class Neuron:
    """One neuron of a feed-forward part: `layer` and `index`, both from 0. `score`: by what it was
    found, NaN where it was named by hand."""

    layer: int
    index: int
    score: float = float("nan")


@torch.no_grad()
def find_register_neurons(
    model: nn.Module | ModelView,
    inputs: Iterable[Mapping[str, Any]],
    count: int,
    threshold: float,
    layer: int | None = None,
    special: int = 1,
) -> list[Neuron]:
    """The `count` neurons that are most active where outliers are, most active first.

    inputs: batches of what the model is called with. threshold: a patch is an outlier where the
    norm of the residual that `layer` leaves (None: the last) is above it. special: tokens before
    the patches (the class token), which are none. A neuron's score is its mean |activation| over
    the outliers of an image, averaged over the images that have any; neurons of the layers up to
    `layer` are looked at.

    Raises ValueError where no patch is above the threshold, with the largest norm that was seen.
    """
    look = model if isinstance(model, ModelView) else view_of(model)
    neurons = sites_of(look, "neurons")
    last = neurons[-1].layer if layer is None else layer
    neurons = [site for site in neurons if site.layer <= last]
    left = Site("residual", last + 1, neurons[0].stack)
    sums: list[Tensor] = []
    images, largest = 0, 0.0
    for given in inputs:
        with recording(look, [*neurons, left]) as kept:
            look.model(**given)
        norms = kept[left][:, special:].norm(dim=-1)
        largest = max(largest, float(norms.max()))
        outlier = (norms > threshold).to(norms.dtype)
        has = outlier.sum(1) > 0
        weight = outlier[has] / outlier[has].sum(1, keepdim=True)
        each = [
            torch.einsum("bn,bnh->h", weight, kept[site][has][:, special:].abs())
            for site in neurons
        ]
        sums = each if not sums else [a + b for a, b in zip(sums, each, strict=True)]
        images += int(has.sum())
    if not images:
        raise ValueError(
            f"no patch has a norm above {threshold}: the largest of {left} is {largest:.3g}; give "
            "a lower threshold, or more images"
        )
    scores = torch.stack(sums) / images
    top = scores.flatten().topk(min(count, scores.numel()))
    width = scores.shape[1]
    return [
        Neuron(neurons[int(at) // width].layer, int(at) % width, float(score))
        for score, at in zip(top.values, top.indices, strict=True)
    ]


class Registers:
    """A vision transformer with `tokens` more tokens of nothing behind its patches, on which the
    named neurons write instead of on patches. A context manager, again and again.

        with Registers(model, find_register_neurons(model, batches, 3, threshold=30)):
            model(pixel_values=images)

    At each neuron the new tokens get the largest activation that any patch has, the patches 0; the
    `special` tokens before them (the class token) stay. The answer has as many tokens as before:
    the new ones are taken away behind the last layer. Without neurons or tokens nothing changes.

    Raises UnsupportedModelError for a model that is no plain encoder of one stack, during a pass
    for one whose layers are told positions or masks, ValueError for neurons that are not there.
    """

    def __init__(
        self,
        model: nn.Module | ModelView,
        neurons: Iterable[Neuron | tuple[int, int]],
        tokens: int = 1,
        special: int = 1,
    ) -> None:
        self.view = model if isinstance(model, ModelView) else view_of(model)
        self.neurons = [n if isinstance(n, Neuron) else Neuron(*n) for n in neurons]
        self.tokens, self.special = tokens, special
        if tokens < 0 or special < 0:
            raise ValueError(f"tokens={tokens}, special={special}: give 0 or more")
        if self.view.causal or len(self.view.stacks) > 1:
            raise UnsupportedModelError(
                f"{type(self.view.model).__name__} is no encoder of one stack: registers stand "
                "behind the patches of a vision encoder, where every token sees them"
            )
        known = {site.layer for site in sites_of(self.view, "neurons")}
        wrong = [n for n in self.neurons if n.layer not in known or n.index < 0]
        if wrong:
            raise ValueError(f"no layer has the neurons {wrong}; layers are {sorted(known)}")
        self.record = [
            {
                "change": f"{tokens} test-time registers",
                "neurons": [[n.layer, n.index] for n in self.neurons],
            }
        ]
        self._stack: ExitStack | None = None

    def __enter__(self) -> Self:
        if self._stack is not None:
            raise RuntimeError("these registers are in force already")
        stack = ExitStack()
        if self.neurons and self.tokens:
            first, last = self.view.layers[0].module, self.view.layers[-1].module
            stack.callback(first.register_forward_pre_hook(self._append, with_kwargs=True).remove)
            stack.callback(last.register_forward_hook(self._take_away).remove)
            writes: dict[Site, Write] = {
                Site("neurons", layer): self._moved([n for n in self.neurons if n.layer == layer])
                for layer in sorted({n.layer for n in self.neurons})
            }
            stack.enter_context(touching(self.view, writes))
        self._stack = stack
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._stack is not None:
            self._stack.close()
        self._stack = None

    def _append(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        others = [*args[1:], *(v for k, v in kwargs.items() if k != "hidden_states")]
        told = [one for one in others if isinstance(one, Tensor | tuple | list) and len(one)]
        if told or not isinstance(stream, Tensor):
            raise UnsupportedModelError(
                f"the layers of {type(self.view.model).__name__} are told masks or positions of "
                "their tokens, which registers do not have"
            )
        nothing = stream.new_zeros((len(stream), self.tokens, stream.shape[-1]))
        longer = torch.cat([stream, nothing], 1)
        return ((longer, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": longer})

    def _take_away(self, module: nn.Module, args: Any, output: Any) -> Any:
        given = first_tensor(output)
        assert given is not None
        kept = given[:, : -self.tokens]
        return type(output)([kept, *output[1:]]) if isinstance(output, tuple | list) else kept

    def _moved(self, neurons: list[Neuron]) -> Write:
        index = [n.index for n in neurons]

        def write(value: Tensor) -> Tensor:
            if max(index) >= value.shape[-1]:
                raise ValueError(f"neuron {max(index)} of {value.shape[-1]} in a layer")
            made = value.clone()
            patches = slice(self.special, value.shape[1] - self.tokens)
            some = value[..., index]
            made[:, -self.tokens :, index] = (
                some[:, patches].amax(1, keepdim=True).expand(-1, self.tokens, -1)
            )
            made[:, patches, index] = 0.0
            return made

        return write
