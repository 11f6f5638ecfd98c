"""`ablate_together`: what a model loses without several heads at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from headwise.instruments.ablated_parts import Part, part_of_heads
from headwise.instruments.examples import model_view, read_examples
from headwise.instruments.metrics import metric_of
from headwise.instruments.part_effects import Measurement
from headwise.instruments.references import replacement_of
from headwise.instruments.replacements import HOW
from headwise.instruments.run import evaluating
from headwise.models import ModelView

__all__ = ["JointEffects", "ablate_together"]


@dataclass(frozen=True, eq=False)
class JointEffects:
    """Effects of sets of heads.

    names: the heads of each set. effects: `(sets, examples)`, metric of the changed model minus
    that of the unchanged one. unchanged: `(examples,)`.
    """

    names: tuple[str, ...]
    metric: str
    how: str
    effects: np.ndarray
    unchanged: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """`(sets,)`"""
        return np.asarray(self.effects.mean(1))

    @property
    def error(self) -> np.ndarray:
        """`(sets,)`: standard error over examples, NaN for a single one."""
        count = self.effects.shape[1]
        if count < 2:
            return np.full(len(self.effects), np.nan)
        return np.asarray(self.effects.std(1, ddof=1) / count**0.5)

    def __repr__(self) -> str:
        rows = zip(self.names, self.mean, self.error, strict=True)
        first = f"{self.metric} without them ({self.how}), unchanged {self.unchanged.mean():.4g}"
        return "\n".join([first, *(f"{m:+.4g} ± {e:.2g}  {name}" for name, m, e in rows)])


def ablate_together(
    model: nn.Module | ModelView,
    inputs: Any,
    sets: Iterable[Any],
    metric: Any = "loss",
    how: str = "zero",
    *,
    reference: Any | None = None,
    by_position: bool = False,
    frozen: bool = False,
    draws: int = 4,
    batch_size: int = 16,
    copies: int | None = None,
    tokens: int | None = None,
    windows: int | None = 1,
    seed: int = 0,
    tokenizer: Any | None = None,
    processor: Any | None = None,
) -> JointEffects:
    """The effect of taking out each set of heads, all heads of a set at once.

        ablate_together(model, prompts, [[(0, 1), (1, 3)], "L1", atlas.where(kind="induction")])

    sets: selectors of heads (see `headwise.edits.selectors`); an empty list takes out nothing. The
    rest is as in `ablation`. With how="uniform" the heads of a set are in one attention: what an
    even map would give above another one's is another question (`headwise.swap` with `Uniform`).

    Raises ValueError for selectors that name nothing that is there, before anything runs.
    """
    view = model_view(model)
    measure = metric_of(metric)
    if how not in HOW:
        raise ValueError(f"how={how!r}: expected one of {', '.join(HOW)}")
    nobody = Part("nothing", {})
    every = [nobody if _empty(one) else part_of_heads(view, one) for one in sets]
    if not every:
        raise ValueError("sets=[]: give one or several sets of heads, such as [[(0, 1), (1, 3)]]")
    if how == "uniform" and any(len(part.takes) > 1 for part in every):
        raise ValueError(
            "how='uniform' with heads of several attentions in one set: even maps change what "
            "later ones average; use headwise.swap(model, {heads: Uniform()}) and the metric itself"
        )
    batches = read_examples(view.model, inputs, tokenizer, processor, tokens, windows, batch_size)
    pool = batches
    if reference is not None:
        pool = read_examples(
            view.model, reference, tokenizer, processor, tokens, windows, batch_size
        )
    with evaluating(view.model):
        other = reference is not None
        instead = replacement_of(view, every, how, pool, by_position, draws, seed, other)
        present = [number for number, part in enumerate(every) if part.takes]
        run = Measurement(view, [every[n] for n in present], measure, instead, frozen, copies)
        effects, unchanged = [], []
        for batch in batches:
            clean = run.clean(batch)
            unchanged.append(run.base(batch, clean).cpu().numpy())
            effects.append(np.zeros((len(every), len(batch))))
            effects[-1][present] = run.effects(batch, clean)
    return JointEffects(
        tuple(part.name for part in every),
        measure.name,
        how,
        np.concatenate(effects, 1),
        np.concatenate(unchanged),
    )


def _empty(selector: Any) -> bool:
    return isinstance(selector, list | tuple | set | frozenset) and not selector
