"""What a model would answer if its last layer had left something else in the residual stream.

The layers stand still and the model runs its own code behind them: final norm, unembedding, biases,
logit scales and soft caps, poolers and classifiers are the model's, so nothing has to be known of
them, and what is read from the last layer is the model's own answer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headwise.models import ModelView, UnsupportedModelError
from headwise.models.prefix import logits_of
from headwise.models.sites import Site, recording, sites_of

__all__ = ["Readout", "output_stack"]

_BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
_TOLERANCE = 1e-4  # of the largest logit: what reading a few rows alone may differ


def output_stack(view: ModelView) -> str:
    """The stack whose last residual the answer is read from."""
    return next((s for s in ("decoder", "text") if s in view.stacks), view.stacks[-1])


class Readout:
    """The head of a model as a function of the residual, on some inputs.

        read = Readout(view(model), inputs)
        logits = read(read.residuals[3])              # what the model would say after layer 2
        logits = read(read.residuals[3][:, 5:9])      # of four positions, where `by_row`

    inputs: what the model is called with, tensors with samples in front (labels are left out).
    `residuals`: what each layer of the output's stack read, then what the last one left, each
    `(batch, n, width)`. `output`: the model's answer, `(batch, n, vocabulary)` or
    `(batch, classes)`. `by_row`: whether positions are read one by one, so that any number of them
    can be handed over; found by a trial. Gradients pass.

    Raises UnsupportedModelError for a model without a head.
    """

    def __init__(self, view: ModelView, inputs: Mapping[str, Any]) -> None:
        self.view = view
        self.inputs = {key: value for key, value in inputs.items() if key != "labels"}
        if "use_cache" in inspect.signature(view.model.forward).parameters:
            self.inputs.setdefault("use_cache", False)
        self.stack = output_stack(view)
        named = self.stack if len(view.stacks) > 1 else None
        self.sites: list[Site] = [s for s in sites_of(view, "residual") if s.stack == named]
        self._given: dict[int, Any] = {}
        with torch.no_grad(), recording(view, self.sites) as kept, self._keeping():
            answer = view.model(**self.inputs)
        self.output = logits_of(answer)
        self.residuals = [kept[site] for site in self.sites]
        _require_head(view, answer, self.output)
        self.by_row = False
        self.by_row = self._tried()

    @property
    def last(self) -> Tensor:
        """What the last layer left `(batch, n, width)`."""
        return self.residuals[-1]

    @property
    def positions(self) -> bool:
        """Whether there is an answer at each position, rather than one for an example."""
        return self.output.dim() == 3 and self.output.shape[1] == self.last.shape[1]

    def __call__(self, residual: Tensor) -> Tensor:
        """Logits of a residual `(batch, m, width)`: `(batch, m, vocabulary)`, or `(batch, classes)`
        where positions are pooled. m is n unless `by_row`."""
        n, m = self.last.shape[1], residual.shape[1]
        if m != n and not self.by_row:
            raise ValueError(
                f"{type(self.view.model).__name__} reads all {n} positions together; {m} were given"
            )
        inputs = self.inputs if m == n else self._cut(m)
        with self._standing(residual):
            return logits_of(self.view.model(**inputs))

    def _cut(self, m: int) -> dict[str, Any]:
        n = self.last.shape[1]
        prefix = "decoder_" if "decoder_input_ids" in self.inputs else ""
        names = {prefix + name for name in _BY_TOKEN}

        def some(key: str, value: Any) -> Any:
            fits = isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == n
            return value[:, :m] if fits and key in names else value

        return {key: some(key, value) for key, value in self.inputs.items()}

    def _tried(self) -> bool:
        n = self.last.shape[1]
        if not self.positions or n == 1:
            return False
        self.by_row = True
        rows = slice(n - 1, n)
        try:
            with torch.no_grad():
                alone = self(self.last[:, rows])
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False  # it counts its positions in another way: all are read together
        expected = self.output[:, rows]
        if alone.shape != expected.shape:
            return False
        most = expected.abs().amax().clamp_min(1e-12)
        return bool((alone - expected).abs().amax() <= _TOLERANCE * most)

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """What each layer gave, in its form; of stacks beside the output's, the numbers too."""
        handles: list[Any] = []

        def keeps(number: int) -> Callable[[nn.Module, Any, Any], None]:
            def keep(module: nn.Module, args: Any, output: Any) -> None:
                self._given[number] = output

            return keep

        for number, layer in enumerate(self.view.layers):
            handles.append(layer.module.register_forward_hook(keeps(number)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _standing(self, residual: Tensor) -> Iterator[None]:
        """Every layer gives at once what it gave; those of the output's stack, `residual`."""
        before: dict[nn.Module, Any] = {}

        def gives(number: int, speaks: bool) -> Callable[..., Any]:
            known = self._given[number]
            made = _instead(known, residual) if speaks else known
            return lambda *args, **kwargs: made

        try:
            for number, layer in enumerate(self.view.layers):
                before.setdefault(layer.module, vars(layer.module).get("forward"))
                layer.module.forward = gives(number, layer.stack == self.stack)
            yield
        finally:
            for module, was in before.items():
                if was is None:
                    del module.forward
                else:
                    module.forward = was


def _instead(output: Any, residual: Tensor) -> Any:
    if isinstance(output, tuple | list):
        return type(output)([residual, *output[1:]])
    return residual


def _require_head(view: ModelView, answer: Any, logits: Tensor) -> None:
    named = isinstance(getattr(answer, "logits", None), Tensor)
    if named or view.unembedding is not None or logits.shape[-1] != view.width:
        return
    raise UnsupportedModelError(
        f"{type(view.model).__name__} answers with hidden states of width {view.width}: there is "
        "nothing to read them out with; give the model with its head (…ForCausalLM, "
        "…ForImageClassification)"
    )
