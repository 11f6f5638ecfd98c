"""What the search is measured on: text cut into windows, half of it to fit to, half to judge by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from headwise.instruments.examples import Examples, digests, read_examples, together
from headwise.instruments.positions import position_limit

WINDOWS = 8
TOKENS = 256
FEW = 4
"""One window in so many is enough for a rough price."""
NUMBERS = 2**26
"""Of the logits of one batch: 256 MiB in float32."""


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
    def few(self) -> list[Examples]:
        """Some of the calibration text, from all of it."""
        found, before = [], 0
        for batch in self.calibration:
            rows = [row for row in range(len(batch)) if (before + row) % FEW == 0]
            if rows:
                inputs = {k: v[rows] if v.dim() else v for k, v in batch.inputs.items()}
                found.append(Examples(inputs, slice(before, before + len(rows))))
            before += len(batch)
        return found

    @property
    def short(self) -> bool:
        """Whether `few` is no fewer."""
        return sum(map(len, self.few)) == sum(map(len, self.calibration))

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
    numbers: int = NUMBERS,
    usual: int = TOKENS,
) -> Text:
    """Every other example for either purpose, in turns, so that both come from all of the text.

    inputs: as in `headwise.see`; None: the documentation of the installed Python, which needs a
    tokenizer. batch_size: at most so many together, of texts also no more than have `numbers`
    logits. usual: tokens of a window where they are not told and the model can read as many.
    Raises ValueError for fewer than two examples.
    """
    usual = tokens or min(usual, position_limit(model) or usual)
    if inputs is None:
        if tokenizer is None:
            raise ValueError(
                "inputs=None stands for a default text, which needs tokenizer=; or give token ids, "
                "a dict of the model's inputs, or texts with tokenizer="
            )
        from headwise.models.default import default_text

        inputs = default_text(usual * (windows or WINDOWS) * 8)[0]
    text = isinstance(inputs, str) or (
        isinstance(inputs, list | tuple) and any(isinstance(one, str) for one in inputs)
    )
    if text:
        tokens, windows = usual, windows or WINDOWS
    singles = read_examples(model, inputs, tokenizer, processor, tokens, windows, batch_size=1)
    if len(singles) < 2:
        raise ValueError(
            f"{len(singles)} example was given; expected 2 or more: half of them to measure prices "
            "on, the others to judge by (longer texts, smaller tokens=)"
        )
    longest = max(next(iter(one.inputs.values())).numel() for one in singles) if text else 1
    fit = max(1, numbers // (longest * _vocabulary(model)))
    most = min(batch_size, fit) if text else batch_size
    return Text(together(singles[::2], most), together(singles[1::2], most))


def _vocabulary(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    return int(getattr(config, "vocab_size", 0) or 1)
