"""Causal tracing: where a model keeps what it knows of a subject.

The embeddings of the subject's tokens are drowned in noise, and the answer is gone. Then what a
layer computed at one position in the clean run is put back: where the answer returns, the fact
passes (Meng et al., arXiv 2202.05262, section 2.1 and appendix B).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.edits import active
from headwise.instruments.examples import Examples, model_view, read_examples
from headwise.instruments.exchange import PASS_TOKENS, Exchange, Scored, exchanged
from headwise.instruments.metrics import Inputs, Metric
from headwise.instruments.metrics import last_positions as last_of
from headwise.instruments.pairs import Positions, spots
from headwise.instruments.patch_table import PatchTable
from headwise.instruments.provenance import model_name, versions
from headwise.instruments.run import evaluating
from headwise.models import ModelView, UnsupportedModelError
from headwise.models.sites import Site, Write, recording, sites_of, touching

__all__ = ["Probability", "trace"]

KINDS = ("residual", "attention", "mlp")
WINDOW = 10
"""Layers that are restored together, for attention and MLPs (Meng et al., figure 1)."""


class Probability(Metric):
    """Probability of a token at the last position; `answer` `(examples,)`, or one for all."""

    name, unit, better = "probability of the answer", "probability", "higher"
    at = -1

    def __init__(self, answer: Tensor | int) -> None:
        self.answer = answer

    def score(self, logits: Tensor, inputs: Inputs, clean: Tensor | None = None) -> Tensor:
        batch, n = logits.shape[:2]
        last = last_of(inputs, n, batch).to(logits.device)
        rows = logits[torch.arange(batch, device=logits.device), last].float().softmax(-1)
        ids = torch.as_tensor(self.answer, device=logits.device).expand(batch)
        return rows.gather(1, ids[:, None])[:, 0]

    def of(self, rows: slice) -> Probability:
        given = self.answer
        return Probability(given[rows] if isinstance(given, Tensor) and given.dim() else given)


def trace(
    model: nn.Module | ModelView,
    inputs: Any,
    subject: Sequence[int] | Sequence[Sequence[int]],
    answer: Tensor | int,
    site: str = "residual",
    positions: Positions = "all",
    *,
    window: int | None = None,
    noise: float = 3.0,
    spread: float | None = None,
    samples: int = 10,
    seed: int = 0,
    tokenizer: Any | None = None,
    pass_tokens: int = PASS_TOKENS,
) -> PatchTable:
    """Restore every layer and position in turn: a table layer x position of the probability of
    the answer, mean over the noise; `clean` and `corrupted` are without noise, and without repair.

    inputs: as `headwise.see` takes them. subject: positions of the subject's tokens, one list for
    all examples or one for each. answer: token ids `(examples,)`, or one for all. site:
    "residual", or "attention" and "mlp", of which `window` layers around each are restored
    together (10 by default, 1 for the residual). noise: in standard deviations of what the first
    layer reads at the subjects' tokens, which `spread` gives where it is known better (Meng et al.
    take that of many subjects). samples: noises that are drawn, from `seed`.

    Noise is added where the first layer reads: token and position embeddings together. Raises
    ValueError for a subject outside of an example, and UnsupportedModelError for sites not found.
    """
    if site not in KINDS:
        raise ValueError(f"site={site!r}: expected one of {', '.join(KINDS)}")
    if samples < 1 or noise <= 0:
        raise ValueError(f"samples={samples}, noise={noise}: expected 1 or more, and above 0")
    view = model_view(model)
    if len(view.stacks) > 1:
        raise UnsupportedModelError(
            f"{type(view.model).__name__} has the stacks {', '.join(view.stacks)}; tracing goes "
            "through models of one stack"
        )
    examples = read_examples(view.model, inputs, tokenizer, windows=1, batch_size=1)
    subjects = _subjects(subject, examples)
    wide = window if window is not None else (1 if site == "residual" else WINDOW)
    if wide < 1:
        raise ValueError(f"window={window}: expected 1 layer or more")
    began = time.perf_counter()
    metric = Probability(answer)
    sites = sites_of(view, site)
    found = []
    with evaluating(view.model):
        size = spread if spread is not None else _spread(view, examples, subjects)
        for one, tokens in zip(examples, subjects, strict=True):
            run = _Trace(view, one, metric.of(one.rows), tokens, noise * size, samples, seed)
            here = spots(positions, one.inputs, run.length, one.rows)
            asked = [replace(s, at=None if s.at is None else s.at.expand(samples)) for s in here]
            found.append((*run.restored(sites, asked, wide, pass_tokens), [s.label for s in asked]))
    labels = found[0][-1]
    if any(one[-1] != labels for one in found):
        raise ValueError(
            "examples have several lengths: name positions ({'end': -1}), or trace one at a time"
        )
    rows = tuple(str(s.layer) for s in sites)
    return PatchTable(
        np.stack([one[0] for one in found]),
        np.array([one[1] for one in found]),
        np.array([one[2] for one in found]),
        {"layer": rows, "position": tuple(labels)},
        site=site,
        metric=metric.name,
        unit=metric.unit,
        provenance={
            "model": model_name(view.model),
            "noise": noise,
            "spread": size,
            "samples": samples,
            "seed": seed,
            "window": wide,
            "versions": versions(),
            "seconds": time.perf_counter() - began,
            "edits": active(view.model),
        },
    )


class _Trace:
    """One example with its noise, `samples` times."""

    def __init__(
        self,
        view: ModelView,
        example: Examples,
        metric: Metric,
        subject: Tensor,
        size: float,
        samples: int,
        seed: int,
    ) -> None:
        self.view, self.samples = view, samples
        first = Site("residual", 0)
        self.clean = Scored(view, example.inputs, metric)
        kept, logits = self.clean.recorded([first])
        self.before = self.clean.of(logits)[0]
        there = kept[first]
        self.length = there.shape[1]
        random = torch.Generator().manual_seed(1_000_003 * seed + example.rows.start)
        drawn = torch.randn(samples, len(subject), there.shape[-1], generator=random)
        self.noise = there.new_zeros(samples, *there.shape[1:])
        self.noise[:, subject] = (size * drawn).to(there)
        many = {k: v.repeat(samples, *[1] * (v.dim() - 1)) if v.dim() else v
                for k, v in example.inputs.items()}  # fmt: skip
        self.noisy = Scored(view, many, metric)

    def restored(
        self, sites: list[Site], asked: list[Any], window: int, pass_tokens: int
    ) -> tuple[np.ndarray, float, float]:
        """Probabilities `(layers, positions)`, that of the clean run, and that of the noisy one;
        means over the noise."""
        clean, _ = self.clean.recorded(sites)
        source = {s: value.expand(self.samples, *value.shape[1:]) for s, value in clean.items()}
        changes = []
        for at in range(len(sites)):
            near = sites[max(0, at - window // 2) : at + (window + 1) // 2]
            changes += [[Exchange(s, source[s], None, spot.at) for s in near] for spot in asked]
        with touching(self.view, {Site("residual", 0): self._drown}):
            prefix = self.noisy.prefix()
            corrupted = self.noisy.of(prefix.output)[0]
            after = exchanged(prefix, changes, self.noisy.of, self.length, pass_tokens)
        table: np.ndarray = after.mean(1).view(len(sites), len(asked)).cpu().numpy()
        return table, float(self.before.mean()), float(corrupted.mean())

    @property
    def _drown(self) -> Write:
        def write(there: Tensor) -> Tensor:
            return there + self.noise.repeat(len(there) // self.samples, 1, 1)

        return write


def _spread(view: ModelView, examples: Sequence[Examples], subjects: Sequence[Tensor]) -> float:
    """Standard deviation of what the first layer reads at the subjects' tokens."""
    first = Site("residual", 0)
    found = []
    for one, tokens in zip(examples, subjects, strict=True):
        with torch.no_grad(), recording(view, [first]) as kept:
            view.model(**one.inputs)
        found.append(kept[first][0, tokens].flatten())
    return float(torch.cat(found).float().std())


def _subjects(
    subject: Sequence[int] | Sequence[Sequence[int]], examples: Sequence[Examples]
) -> list[Tensor]:
    given: list[Any] = list(subject)
    lists = given if given and not isinstance(given[0], int) else [given] * len(examples)
    if len(lists) != len(examples):
        raise ValueError(f"{len(lists)} subjects for {len(examples)} examples")
    found = []
    for number, (places, one) in enumerate(zip(lists, examples, strict=True)):
        n = _length(one.inputs)
        tokens = torch.as_tensor(list(places), dtype=torch.long)
        if not len(tokens) or bool(((tokens < -n) | (tokens >= n)).any()):
            raise ValueError(
                f"example {number + 1}: subject at {list(places)}; expected positions among its "
                f"{n} tokens"
            )
        found.append(tokens % n)
    return found


def _length(inputs: Mapping[str, Tensor]) -> int:
    ids = inputs.get("input_ids", next(iter(inputs.values())))
    return ids.shape[1]
