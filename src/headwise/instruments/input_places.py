"""Where a model's inputs are numbers: the place at which gradients and relevance are read.

"tokens"    what the token embedding gives `(batch, n, width)`, before positions are added
"residual"  what the first layer reads: patches and positions of an image, embeddings with
            everything that is added to them of a text
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headwise.instruments.metrics import Metric
from headwise.instruments.run import evaluating
from headwise.models import ModelView, UnsupportedModelError
from headwise.models.prefix import logits_of
from headwise.models.sites import Site, Write, touching

__all__ = ["InputPlace", "clean_logits", "frozen", "scored"]

PLACES = ("tokens", "residual")


class InputPlace:
    """One place of one model on some inputs.

    `at`: "tokens" or "residual"; None takes the tokens where there are some. `of`: whose input
    it is, by default that of the first stack (the encoder of an encoder-decoder).

    Raises ValueError for an `at` or a stack that is not there, and for "tokens" without token ids;
    UnsupportedModelError where no token embedding was found.
    """

    def __init__(
        self,
        view: ModelView,
        inputs: Mapping[str, Any],
        at: str | None = None,
        of: str | None = None,
    ) -> None:
        if at is not None and at not in PLACES:
            raise ValueError(f"at={at!r}: expected one of {', '.join(PLACES)}")
        if of is not None and of not in view.stacks:
            raise ValueError(f"of={of!r}: the model has {', '.join(view.stacks)}")
        self.view = view
        self.stack = view.stacks[0] if of is None else of
        self.key = "decoder_input_ids" if self._second() else "input_ids"
        self.at = at or ("tokens" if self.key in inputs else "residual")
        self.inputs = dict(inputs)
        if "use_cache" in inspect.signature(view.model.forward).parameters:
            self.inputs.setdefault("use_cache", False)
        if self.at == "tokens" and self.key not in inputs:
            raise ValueError(
                f"at='tokens' needs {self.key} among the inputs ({', '.join(inputs)}); "
                "at='residual' reads what the first layer is handed"
            )
        self._module: nn.Module | None = None
        self._call = 0
        if self.at == "tokens":
            self._module, self._call = self._embedding()

    def _second(self) -> bool:
        return len(self.view.stacks) > 1 and self.stack != self.view.stacks[0]

    def _embedding(self) -> tuple[nn.Module, int]:
        """The token embedding of the stack, and which of its calls in a pass is meant."""
        found = [(stack, _embedding_of(self.view, stack)) for stack in self.view.stacks]
        module = dict(found)[self.stack]
        if module is None:
            raise UnsupportedModelError(
                f"no token embedding of {type(self.view.model).__name__} was found; "
                "at='residual' reads what its first layer is handed"
            )
        return module, [s for s, m in found if m is module].index(self.stack)

    @contextmanager
    def touching(self, write: Write) -> Iterator[None]:
        """While this lasts, `write` is handed what stands here, as in `models.sites`."""
        if self._module is None:
            first = next(layer.index for layer in self.view.layers if layer.stack == self.stack)
            with touching(self.view, {Site("residual", first, self.stack): write}):
                yield
            return
        calls = 0

        def restart(module: nn.Module, args: Any) -> None:
            nonlocal calls
            calls = 0

        def after(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            nonlocal calls
            calls += 1
            return write(output) if calls == self._call + 1 else None

        handles: list[Any] = [self.view.model.register_forward_pre_hook(restart)]
        handles.append(self._module.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def read(self, token: int | None = None) -> Tensor:
        """What stands here `(batch, n, width)`; `token`: if every token were this one."""
        inputs = self.inputs
        if token is not None:
            if self.key not in inputs:
                raise ValueError(f"a baseline of token {token} needs {self.key} among the inputs")
            inputs = {**inputs, self.key: torch.full_like(inputs[self.key], token)}
        kept: list[Tensor] = []
        with torch.no_grad(), evaluating(self.view.model), self.touching(kept.append):
            self.view.model(**inputs)
        if not kept:
            raise UnsupportedModelError(
                f"{type(self.view.model).__name__} ran without the {self.at} of its {self.stack}"
            )
        return kept[-1].detach().clone()


def _embedding_of(view: ModelView, stack: str) -> nn.Module | None:
    owner = view.owners.get(stack)
    for place in (owner, view.model):
        getter = getattr(place, "get_input_embeddings", None)
        try:
            found = getter() if getter is not None else None
        except NotImplementedError:
            found = None
        if isinstance(found, nn.Module) and isinstance(getattr(found, "weight", None), Tensor):
            return found
    inside = [owner] if owner is not None else []
    for place in (*inside, view.model):
        tables = [m for m in place.modules() if isinstance(m, nn.Embedding)]
        if tables:
            return tables[0]
    return None


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient while this lasts: what has one comes from the inputs."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def scored(
    place: InputPlace, metric: Metric, points: Tensor, clean: Tensor | None = None
) -> Tensor:
    """The metric `(copies * batch,)` with `points` `(copies * batch, n, width)` at the place; the
    inputs stand behind each other, copy after copy. `clean`: logits of the unchanged model, for
    metrics that compare with them."""
    batch = next(v.shape[0] for v in place.inputs.values() if isinstance(v, Tensor) and v.dim())
    copies = len(points) // batch

    def repeated(value: Any) -> Any:
        if copies == 1 or not isinstance(value, Tensor) or not value.dim() or len(value) != batch:
            return value
        return value.repeat(copies, *[1] * (value.dim() - 1))

    inputs = {key: repeated(value) for key, value in place.inputs.items()}
    with ExitStack() as stack:
        stack.enter_context(evaluating(place.view.model))
        stack.enter_context(frozen(place.view.model))
        stack.enter_context(torch.enable_grad() if points.requires_grad else torch.no_grad())
        stack.enter_context(place.touching(lambda there: points.to(there.dtype)))
        logits = logits_of(place.view.model(**inputs))
        found = metric.score(logits, inputs, None if clean is None else repeated(clean))
    if points.requires_grad and not found.requires_grad:
        raise ValueError(
            f"the metric {metric.name!r} has no gradient with respect to the {place.at} of the "
            f"{place.stack}: take one that has, such as 'loss' or LogitDifference(right, wrong)"
        )
    return found


def clean_logits(place: InputPlace, metric: Metric) -> Tensor | None:
    """Logits of the unchanged model where the metric compares with them, else None."""
    if not metric.needs_clean:
        return None
    with torch.no_grad(), evaluating(place.view.model):
        return logits_of(place.view.model(**place.inputs)).detach()
