"""`threshold_activations`: neurons that hardly speak are skipped, token by token.

By channel (CHESS, arXiv 2409.01366, section 3.1): what a neuron adds is act(gate)_i * up_i, so a
small gate matters little where up_i is small. The importance of a gate is |g_i| E|up_i|, with the
mean over calibration tokens; its quantile T gives neuron i the threshold t_i = T / E|up_i|.
By tensor (CATS, arXiv 2404.08763): one quantile of |g| for all neurons of a layer.

A layer without a gate has no up; there the norm of the row of down that a neuron writes stands in
its place (our choice; CHESS is stated for gated layers).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.compress.bits.thresholded import Thresholded, parts_of
from headwise.compress.step import Step, take
from headwise.compress.structure.matrices import put_in_place
from headwise.instruments.examples import model_view, read_examples
from headwise.instruments.run import evaluating
from headwise.models import ModelView
from headwise.models.projections import features_first

__all__ = ["ThresholdActivations", "threshold_activations"]

BY = ("channel", "tensor")

SAMPLE = 1 << 20
"""Numbers of a layer, at most, that its quantile is taken of."""


@dataclass(frozen=True)
class ThresholdActivations(Step):
    """Thresholded modules, their thresholds zero, in the places of feed-forward layers."""

    modules: tuple[str, ...]

    def apply(self, model: nn.Module) -> None:
        found = []
        for name in self.modules:
            try:
                mlp = model.get_submodule(name)
            except AttributeError:
                raise ValueError(f"{type(model).__name__} has no module {name!r}") from None
            found.append((mlp, parts_of(mlp, name)))
        for mlp, (gate, up, down, activation) in found:
            made = Thresholded(gate, up, down, activation).train(mlp.training)
            put_in_place(model, mlp, made)


def threshold_activations(
    model: nn.Module | ModelView,
    inputs: Any,
    sparsity: float = 0.5,
    by: str = "channel",
    layers: Iterable[int] | None = None,
    *,
    tokenizer: Any | None = None,
    tokens: int | None = None,
    windows: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> ThresholdActivations:
    """Give every neuron of the feed-forward layers a threshold below which it is zero, so that a
    share `sparsity` of them is skipped on average; in place. Returns the step that was taken.

    Decoding one token then reads only the kept rows of up and down (all of gate). inputs, tokens,
    windows, tokenizer: calibration, as in `see`. by: "channel" or "tensor". layers: numbers of
    layers, None: all. seed: of the sample that the quantile is taken of, where there are more than
    2 ** 20 numbers.

    Raises ValueError for what cannot be, UnsupportedModelError for feed-forward layers that are
    built in another way (mixtures of experts), before anything is changed.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity}: expected at least 0 and below 1")
    if by not in BY:
        raise ValueError(f"by={by!r}: expected one of {', '.join(BY)}")
    view = model_view(model)
    wanted = None if layers is None else set(layers)
    numbers = {layer.index for layer in view.layers}
    if wanted is not None and not (wanted and wanted <= numbers):
        raise ValueError(f"layers={sorted(wanted)}: the model has {min(numbers)} to {max(numbers)}")
    names = {id(module): name for name, module in view.model.named_modules()}
    mlps: dict[str, nn.Module] = {}
    for layer in view.layers:
        if wanted is None or layer.index in wanted:
            parts_of(layer.mlp, f"layer {layer.index}")
            assert layer.mlp is not None
            mlps[names[id(layer.mlp)]] = layer.mlp
    batches = read_examples(view.model, inputs, tokenizer, None, tokens, windows, batch_size)
    if not batches:
        raise ValueError("inputs hold no examples to calibrate on")
    watched = {name: _Watched(mlp, name, by, seed) for name, mlp in mlps.items()}
    with evaluating(view.model), torch.no_grad():
        for sweep in ("scale", "sample"):
            handles = [handle for one in watched.values() for handle in one.watch(sweep)]
            try:
                for batch in batches:
                    view.model(**batch.given)
            finally:
                for handle in handles:
                    handle.remove()
    thresholds = {name: one.thresholds(sparsity) for name, one in watched.items()}
    step = ThresholdActivations(tuple(mlps))
    take(view.model, step)
    for name, threshold in thresholds.items():
        made = view.model.get_submodule(name)
        assert isinstance(made, Thresholded)
        made.thresholds.copy_(threshold)
    return step


class _Watched:
    """One feed-forward layer during calibration: first what an activation of each neuron weighs
    (E|up|), then a sample of what its gates weigh."""

    def __init__(self, mlp: nn.Module, name: str, by: str, seed: int) -> None:
        self.gate, self.up, self.down, self.activation = parts_of(mlp, name)
        self.by = by
        self.count = 0
        self.total: Tensor | float = 0.0
        self.sample: list[Tensor] = []
        self.random = torch.Generator().manual_seed(seed)

    def watch(self, sweep: str) -> list[Any]:
        if sweep == "sample":
            return [self.gate.register_forward_hook(self._gate)]
        if self.by == "tensor" or self.up is None:
            return [self.gate.register_forward_hook(self._counted)]
        return [
            self.gate.register_forward_hook(self._counted),
            self.up.register_forward_hook(self._up),
        ]

    def weight(self) -> Tensor | float:
        """What |g_i| is multiplied with, `(hidden,)`."""
        if self.by == "tensor":
            return 1.0
        if self.up is None:
            return features_first(self.down).float().norm(dim=0)
        assert isinstance(self.total, Tensor)
        return self.total / self.count

    @torch.no_grad()
    def thresholds(self, sparsity: float) -> Tensor:
        values = torch.cat(self.sample).sort().values
        place = round(sparsity * len(values))
        hidden = features_first(self.down).shape[1]
        if place == 0:  # nothing is skipped, not even zeros
            return torch.full((hidden,), -1.0)
        quantile = values[place - 1].to(features_first(self.down).device)
        weight = self.weight()
        if not isinstance(weight, Tensor):
            return quantile.expand(hidden).clone()
        # a neuron whose up is always zero adds nothing at any gate
        return torch.where(weight > 0, quantile / weight, torch.inf)

    def _counted(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.count += output.shape[:-1].numel()

    def _up(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.total = self.total + output.float().abs().flatten(0, -2).sum(0)

    def _gate(self, module: nn.Module, args: Any, output: Tensor) -> None:
        weighed = (self.activation(output).float().abs() * self.weight()).flatten().cpu()
        hidden = output.shape[-1]
        share = min(1.0, SAMPLE / (self.count * hidden))
        if share < 1:
            drawn = torch.rand(len(weighed), generator=self.random) < share
            weighed = weighed[drawn]
        self.sample.append(weighed)
