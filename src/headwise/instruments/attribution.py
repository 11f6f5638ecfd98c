"""`attribute`: what an answer goes back to among the positions of the input, by several methods.

A method is a function `(view, inputs, metric, **options) -> (batch, n)` in a file of its own, and
a line in METHODS.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.instruments.examples import Examples, model_view, read_examples
from headwise.instruments.run import evaluating
from headwise.instruments.targets import read_target
from headwise.instruments.tokens import Tokens
from headwise.models import ModelView

if TYPE_CHECKING:
    import pandas

__all__ = ["METHODS", "Attribution", "attribute", "method_of"]

Method = Callable[..., Tensor]

# name -> where the function is
METHODS = {
    "gradient_x_input": "headwise.instruments.input_gradients:gradient_x_input",
    "integrated_gradients": "headwise.instruments.input_gradients:integrated_gradients",
    "lrp": "headwise.instruments.relevance_propagation:lrp",
    "pa_lrp": "headwise.instruments.relevance_propagation:pa_lrp",
    "globenc": "headwise.instruments.encoder_norms:globenc",
    "rollout": "headwise.instruments.rollout:rollout",
    "flow": "headwise.instruments.flow:flow",
    "generic": "headwise.instruments.generic_relevance:generic",
    "raw_attention": "headwise.instruments.rollout:raw_attention",
    "random": "headwise.instruments.rollout:random_scores",
}


@dataclass(frozen=True, eq=False)
class Attribution:
    """What each input position contributes to an answer.

    scores: `(examples, n)`, or a list with one `(n,)` an example where lengths differ; signs and
    units are the method's, larger is more relevant. Padding has 0. labels: the token of each
    position where a tokenizer was given, its id or place otherwise. real: False at padding.
    """

    method: str
    target: str
    scores: np.ndarray | list[np.ndarray]
    labels: list[list[str]]
    real: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.scores)

    def top(self, n: int = 5) -> list[list[tuple[str, int, float]]]:
        """(label, position, score) of the n highest scores of each example, padding left out."""
        found = []
        for scores, labels, real in zip(self.scores, self.labels, self.real, strict=True):
            order = np.argsort(-np.where(real, scores, -np.inf), kind="stable")[: int(real.sum())]
            found.append([(labels[i], int(i), float(scores[i])) for i in order[:n]])
        return found

    def frame(self) -> pandas.DataFrame:
        """A pandas data frame, one row a position: example, position, label, score.

        Raises ImportError if pandas is not installed (extra: frame).
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "Attribution.frame() needs pandas, which is not installed: pip install "
                "'headwise[frame]'"
            ) from error
        rows = [
            (example, place, labels[place], float(scores[place]))
            for example, (scores, labels, real) in enumerate(
                zip(self.scores, self.labels, self.real, strict=True)
            )
            for place in np.flatnonzero(real).tolist()
        ]
        return pandas.DataFrame(rows, columns=["example", "position", "label", "score"])


def attribute(
    model: nn.Module | ModelView,
    inputs: Any,
    target: Any = None,
    method: str | Method = "gradient_x_input",
    *,
    tokenizer: Any | None = None,
    processor: Any | None = None,
    tokens: int | None = None,
    batch_size: int = 16,
    **options: Any,
) -> Attribution:
    """Attribute an answer of a model to the positions of its input.

    inputs: all that `headwise.see` takes, and token ids; a text is one example. target: None (what
    the model predicts, at the last position of a text), class or token ids (one, or one an
    example), a Metric such as LogitDifference, or a function of (logits, inputs) that gives
    `(batch,)`. method: a name of METHODS, or such a function; options: the method's own.

    Nothing of the model is changed, and no gradient is left in its parameters. Raises ValueError
    for a method, an option or a target that does not exist, before anything runs, and
    UnsupportedModelError where a model does not have what the method reads.
    """
    name, function = method_of(method, options)
    view = model_view(model)
    batches = read_examples(view.model, inputs, tokenizer, processor, tokens, None, batch_size)
    asked = read_target(target, batches[-1].rows.stop)
    words = Tokens(tokenizer, getattr(view.model, "config", None))
    scores: list[np.ndarray] = []
    labels: list[list[str]] = []
    real: list[np.ndarray] = []
    with evaluating(view.model):
        for batch in batches:
            metric = asked.of(view, batch.inputs, batch.rows)
            found = function(view, dict(batch.inputs), metric, **options)
            if found.dim() != 2 or len(found) != len(batch):
                raise ValueError(
                    f"the method {name} gave {tuple(found.shape)} for {len(batch)} examples; "
                    "expected (batch, n)"
                )
            mask = _real(batch, found, options.get("of"))
            scores += list((found.detach().cpu().float() * mask).numpy())
            labels += _labels(batch, found.shape[1], words, options.get("of"))
            real += list(mask.numpy())
    whole = len({len(row) for row in scores}) == 1
    return Attribution(name, asked.words, np.stack(scores) if whole else scores, labels, real)


def method_of(method: str | Method, options: dict[str, Any]) -> tuple[str, Method]:
    """Name and function of a method.

    Raises ValueError for a name that is not in METHODS and for options it does not have.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"no method {method!r}; there are {', '.join(METHODS)}")
        name, (module, named) = method, METHODS[method].split(":")
        function: Method = getattr(import_module(module), named)
    else:
        name, function = getattr(method, "__name__", "method"), method
    parameters = list(inspect.signature(function).parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return name, function
    known = [p.name for p in parameters[3:]]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(
            f"the method {name} has no option {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(known) or 'none'}"
        )
    return name, function


def _ids(batch: Examples, n: int, of: str | None) -> Tensor | None:
    ids = batch.inputs.get("decoder_input_ids" if of == "decoder" else "input_ids")
    return ids if ids is not None and ids.dim() == 2 and ids.shape[1] == n else None


def _real(batch: Examples, scores: Tensor, of: str | None) -> Tensor:
    mask = batch.inputs.get("decoder_attention_mask" if of == "decoder" else "attention_mask")
    if mask is None or mask.shape != scores.shape:
        return torch.ones(scores.shape, dtype=torch.bool)
    return mask.cpu().bool()


def _labels(batch: Examples, n: int, words: Tokens, of: str | None) -> list[list[str]]:
    ids = _ids(batch, n, of)
    if ids is not None:
        return [words.texts(row) for row in ids.tolist()]
    return [_places(batch, n)] * len(batch)


def _places(batch: Examples, n: int) -> list[str]:
    """Numbers; for images whose patches are a grid behind one class token, row and column."""
    pixels = batch.inputs.get("pixel_values")
    side = round((n - 1) ** 0.5)
    if pixels is None or pixels.dim() != 4 or side * side != n - 1:
        return [str(place) for place in range(n)]
    if pixels.shape[2] != pixels.shape[3]:
        return [str(place) for place in range(n)]
    return ["class"] + [f"{place // side},{place % side}" for place in range(n - 1)]
