"""What the search is measured on: text cut into windows, half of it to fit to, half to judge by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from headwise.instruments.examples import Examples, digests, read_examples, together

WINDOWS = 8
TOKENS = 256


@dataclass(frozen=True)
class Text:
    """calibration: what prices are measured on and weights are fitted to. held_out: what quality is
    measured on. Both in batches of one length."""

    calibration: list[Examples]
    held_out: list[Examples]

    @property
    def tokens(self) -> int:
        """Of one example."""
        first = next(iter(self.held_out[0].inputs.values()))
        return int(first.shape[1]) if first.dim() == 2 else 1

    @property
    def given(self) -> list[dict[str, Tensor]]:
        """The calibration text as inputs of a model."""
        return [batch.inputs for batch in self.calibration]

    @property
    def digests(self) -> list[str]:
        return digests(self.calibration) + digests(self.held_out)


def read_text(
    model: nn.Module,
    inputs: Any,
    tokenizer: Any | None = None,
    processor: Any | None = None,
    tokens: int | None = None,
    windows: int | None = None,
    batch_size: int = 8,
) -> Text:
    """Every other example for either purpose, in turns, so that both come from all of the text.

    inputs: as in `headwise.see`; None: the documentation of the installed Python, which needs a
    tokenizer. Raises ValueError for fewer than two examples.
    """
    if inputs is None:
        if tokenizer is None:
            raise ValueError(
                "inputs=None stands for a default text, which needs tokenizer=; or give token ids, "
                "a dict of the model's inputs, or texts with tokenizer="
            )
        from headwise.models.default import default_text

        inputs = default_text((tokens or TOKENS) * (windows or WINDOWS) * 8)[0]
    text = isinstance(inputs, str) or (
        isinstance(inputs, list | tuple) and any(isinstance(one, str) for one in inputs)
    )
    if text:
        tokens, windows = tokens or TOKENS, windows or WINDOWS
    singles = read_examples(model, inputs, tokenizer, processor, tokens, windows, batch_size=1)
    if len(singles) < 2:
        raise ValueError(
            f"{len(singles)} example was given; expected 2 or more: half of them to measure prices "
            "on, the others to judge by (longer texts, smaller tokens=)"
        )
    return Text(together(singles[::2], batch_size), together(singles[1::2], batch_size))
