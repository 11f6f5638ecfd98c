"""How much of an answer a circuit gives when everything outside of it is taken away.

Wang et al., arXiv 2211.00593, section 4: faithful, the circuit alone does as well as the model;
complete, whatever is taken out of both, they still do as well as each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.instruments.circuit import Circuit
from headwise.instruments.examples import model_view
from headwise.instruments.exchange import Exchange, Scored, exchanged
from headwise.instruments.metrics import metric_of
from headwise.instruments.nodes import Node, group, heads_of, senders_of
from headwise.instruments.pairs import Pair, read_pairs
from headwise.instruments.run import evaluating
from headwise.models import ModelView
from headwise.models.sites import Site

__all__ = ["Completeness", "Faithfulness", "completeness", "faithfulness"]

HOW = ("mean", "resample")


@dataclass(frozen=True)
class Faithfulness:
    """Means of the metric over the examples: `whole` model, `circuit` alone, `complement`, the
    model without the circuit, and `empty`, with every component taken away."""

    whole: float
    circuit: float
    complement: float
    empty: float

    @property
    def share(self) -> float:
        """What the circuit alone gives, of the whole model's metric."""
        return self.circuit / self.whole if self.whole else float("nan")

    @property
    def recovered(self) -> float:
        """The same, both counted from what is left with nothing: 1 is a faithful circuit, 0 one
        that does no better than none (Marks et al., arXiv 2403.19647)."""
        gap = self.whole - self.empty
        return (self.circuit - self.empty) / gap if gap else float("nan")

    @property
    def left(self) -> float:
        """What the model does without the circuit, counted alike: 0 where the circuit was all
        there is, above it where others can do the work."""
        gap = self.whole - self.empty
        return (self.complement - self.empty) / gap if gap else float("nan")


@dataclass(frozen=True)
class Completeness:
    """A subset K of a circuit C taken out of both: what is left of the circuit, F(C \\ K), and of
    the model, F(M \\ K)."""

    without: tuple[Node, ...]
    circuit: float
    model: float

    @property
    def incompleteness(self) -> float:
        """|F(C \\ K) - F(M \\ K)|: near 0 for a complete circuit, whatever K."""
        return abs(self.circuit - self.model)


def faithfulness(
    model: nn.Module | ModelView,
    circuit: Circuit | Sequence[str | Node],
    clean: Any,
    corrupted: Any,
    metric: Any,
    how: str = "mean",
    *,
    mlps: str | None = None,
    tokenizer: Any | None = None,
    batch_size: int = 16,
) -> Faithfulness:
    """Run the circuit alone, and the model without it, on the clean inputs.

    circuit: as `find_circuit` gives it, or names of components. What is taken away gets, at every
    position, its mean over the corrupted examples ("mean": of equal length, and better many), or
    the value of its own corrupted example ("resample"). mlps: "run" leaves them in the model, and
    the embedding too, so that only heads are components; "hold" makes both components; by default
    as the circuit was found.

    Raises ValueError for a component that is not there, and for how="mean" with examples of
    several lengths.
    """
    run = _Runs(model, circuit, clean, corrupted, metric, how, mlps, tokenizer, batch_size)
    inside = set(run.inside)
    everything = set(run.all)
    whole, alone, without, empty = run.without([set(), everything - inside, inside, everything])
    return Faithfulness(whole, alone, without, empty)


def completeness(
    model: nn.Module | ModelView,
    circuit: Circuit | Sequence[str | Node],
    clean: Any,
    corrupted: Any,
    metric: Any,
    how: str = "mean",
    *,
    subsets: int | Iterable[Sequence[str | Node]] = 10,
    seed: int = 0,
    mlps: str | None = None,
    tokenizer: Any | None = None,
    batch_size: int = 16,
) -> list[Completeness]:
    """Take subsets of the circuit out of it and out of the model, and compare what is left.

    subsets: these, or a number of random ones, each with half of the components, after every
    component alone. The rest as in `faithfulness`.
    """
    run = _Runs(model, circuit, clean, corrupted, metric, how, mlps, tokenizer, batch_size)
    inside, everything = run.inside, set(run.all)
    chosen: list[tuple[Node, ...]]
    if isinstance(subsets, int):
        random = torch.Generator().manual_seed(seed)
        drawn = [torch.rand(len(inside), generator=random) < 0.5 for _ in range(subsets)]
        chosen = [(n,) for n in inside]
        for half in drawn:
            chosen.append(tuple(n for n, one in zip(inside, half.tolist(), strict=True) if one))
    else:
        chosen = [group(list(one)) for one in subsets]
    outside = everything - set(inside)
    values = run.without([*(outside | set(k) for k in chosen), *map(set, chosen)])
    halves = values[: len(chosen)], values[len(chosen) :]
    return [Completeness(k, c, m) for k, c, m in zip(chosen, *halves, strict=True)]


class _Runs:
    """Runs with some components taken away."""

    def __init__(
        self,
        model: nn.Module | ModelView,
        circuit: Circuit | Sequence[str | Node],
        clean: Any,
        corrupted: Any,
        metric: Any,
        how: str,
        mlps: str | None,
        tokenizer: Any,
        batch_size: int,
    ) -> None:
        if how not in HOW:
            raise ValueError(f"how={how!r}: expected one of {', '.join(HOW)}")
        self.view = model_view(model)
        found = isinstance(circuit, Circuit)
        nodes = circuit.nodes if isinstance(circuit, Circuit) else group(list(circuit))
        known = mlps or (circuit.mlps if found else "run")  # type: ignore[union-attr]
        if known not in ("run", "hold"):
            raise ValueError(f"mlps={known!r}: expected 'run' or 'hold'")
        self.all = senders_of(self.view, True) if known == "hold" else heads_of(self.view)
        self.inside = [n for n in nodes if n in set(self.all)]
        lost = [n for n in nodes if n not in set(self.all) and n.kind not in ("embed", "mlp")]
        if lost:
            raise ValueError(f"{lost[0]} is no component of this model that can be taken away")
        self.metric, self.how = metric_of(metric), how
        self.pairs = list(read_pairs(self.view.model, clean, corrupted, tokenizer, batch_size))

    def without(self, sets: Sequence[set[Node]]) -> list[float]:
        """The mean metric with each set taken away."""
        with evaluating(self.view.model):
            instead = [self._values(pair) for pair in self.pairs]
            if self.how == "mean":
                instead = self._means(instead)
            scores = [
                self._scores(pair, given, sets)
                for pair, given in zip(self.pairs, instead, strict=True)
            ]
        return [float(one) for one in np.concatenate(scores, 1).mean(1)]

    def _values(self, pair: Pair) -> dict[Site, Tensor]:
        wanted = list(dict.fromkeys(n.site for n in self.all))
        return Scored(self.view, pair.corrupted, self.metric.of(pair.rows)).recorded(wanted)[0]

    def _means(self, values: list[dict[Site, Tensor]]) -> list[dict[Site, Tensor]]:
        lengths = sorted({one.shape[1] for given in values for one in given.values()})
        if len(lengths) > 1:
            raise ValueError(
                f"examples have {', '.join(map(str, lengths))} positions, and a mean at a position "
                "needs equal lengths: choose how='resample'"
            )
        mean = {
            site: torch.cat([given[site] for given in values]).mean(0, keepdim=True)
            for site in values[0]
        }
        return [{s: mean[s].expand_as(given[s]) for s in given} for given in values]

    def _scores(
        self, pair: Pair, instead: dict[Site, Tensor], sets: Sequence[set[Node]]
    ) -> np.ndarray:
        base = Scored(self.view, pair.clean, self.metric.of(pair.rows))
        prefix = base.prefix()
        base.clean = prefix.output
        length = next(iter(instead.values())).shape[1]
        changes = [[Exchange(n.site, instead[n.site], n.head) for n in gone] for gone in sets]
        found: np.ndarray = exchanged(prefix, changes, base.of, length).cpu().numpy()
        return found
