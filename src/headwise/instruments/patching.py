"""Activation patching: what a model computed on one input, put into its run on another.

Two prompts that differ in what matters give two answers. Where putting one run's value into the
other moves the answer, the information stands at that place (Vig et al., arXiv 2004.12265; Meng et
al., arXiv 2202.05262; practice: Zhang and Nanda, arXiv 2309.16042). Denoising puts clean values
into the corrupted run and finds what suffices; noising puts corrupted values into the clean run and
finds what is needed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.edits import active
from headwise.instruments.estimates import estimated
from headwise.instruments.examples import model_view
from headwise.instruments.exchange import PASS_TOKENS, Exchange, Scored, exchanged
from headwise.instruments.metrics import Metric, metric_of
from headwise.instruments.pairs import Pair, Positions, read_pairs, spots
from headwise.instruments.patch_table import PatchTable
from headwise.instruments.provenance import model_name, versions
from headwise.instruments.run import evaluating
from headwise.models import ModelView
from headwise.models.sites import KINDS, Site, sites_of

__all__ = ["METHODS", "PatchTable", "patch"]

METHODS = ("exact", "gradient", "integrated")
BY_HEAD = ("heads", "queries", "keys", "values")


def patch(
    model: nn.Module | ModelView,
    clean: Any,
    corrupted: Any,
    metric: Any,
    site: str = "residual",
    positions: Positions = None,
    *,
    direction: str = "denoise",
    method: str = "exact",
    layers: Sequence[int] | None = None,
    stack: str | None = None,
    attention: str = "self",
    tokenizer: Any | None = None,
    batch_size: int = 16,
    pass_tokens: int = PASS_TOKENS,
    steps: int = 5,
) -> PatchTable:
    """Patch every place of a kind, one at a time, and measure the answer.

        table = patch(model, ids, other_ids, LogitDifference(right, wrong), site="heads")
        table.top(5)

    clean, corrupted: what `headwise.see` takes, example by example of equal length. metric: as
    `metric_of` takes it, on the run that is patched. site: a kind of `models.sites`; "residual"
    has a row more than the model has layers, for what the last one leaves.
    positions: see `Positions`; by default "all" (a table layer x position), and for heads,
    queries, keys and values "together" (layer x head); with "all" those give layer x head x
    position. direction: "denoise" puts clean values into the corrupted run, "noise" corrupted
    values into the clean one.

    method: "exact" runs the model for every place, several to a pass, each pass from the patched
    layer on. "gradient" is the first-order estimate (attribution patching: Nanda 2023; Syed et
    al., arXiv 2310.10348), (other - own value) . gradient of the metric, from one backward pass;
    "integrated" averages that gradient over `steps` inputs between the two runs, mixed where the
    first layer reads them (Hanna et al., arXiv 2403.17806). Their `values` are the metric plus
    the estimate.

    layers: only these. stack, attention: which, where a model has several. batch_size: examples,
    and pass_tokens: tokens of patched copies, that run at once.

    Raises ValueError for what is not known, for examples that do not fit each other, and for
    examples of several lengths with positions="all"; UnsupportedModelError where a site was not
    found in this model.
    """
    _check(site, direction, method, steps)
    view, measure = model_view(model), metric_of(metric)
    chosen = _sites(view, site, layers, stack, attention)
    wanted = positions if positions is not None else ("together" if site in BY_HEAD else "all")
    pairs = list(read_pairs(view.model, clean, corrupted, tokenizer, batch_size))
    began = time.perf_counter()
    parts: list[_Part] = []
    with evaluating(view.model):
        for pair in pairs:
            parts.append(_patched(view, pair, measure, chosen, wanted, direction, method, steps,
                                  pass_tokens))  # fmt: skip
    axes = _axes(view, chosen, parts, site, stack)
    return PatchTable(
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.clean for part in parts]),
        np.concatenate([part.corrupted for part in parts]),
        axes,
        site=site,
        metric=measure.name,
        unit=measure.unit,
        direction=direction,
        method=method,
        provenance={
            "model": model_name(view.model),
            "model_class": type(view.model).__name__,
            "versions": versions(),
            "seconds": time.perf_counter() - began,
            "edits": active(view.model),
        },
    )


class _Part:
    """What one batch gave: `values` (batch, *places), and what its labels need."""

    def __init__(self, values: Tensor, clean: Tensor, corrupted: Tensor, labels: list[str]) -> None:
        self.values = values.cpu().numpy()
        self.clean, self.corrupted = clean.cpu().numpy(), corrupted.cpu().numpy()
        self.labels = labels


def _patched(
    view: ModelView,
    pair: Pair,
    metric: Metric,
    sites: list[Site],
    positions: Positions,
    direction: str,
    method: str,
    steps: int,
    pass_tokens: int,
) -> _Part:
    denoise = direction == "denoise"
    mine = metric.of(pair.rows)
    inputs, others = (pair.corrupted, pair.clean) if denoise else (pair.clean, pair.corrupted)
    base, other = Scored(view, inputs, mine), Scored(view, others, mine)
    first = [s for s in sites_of(view, "residual") if s.layer == 0] if method != "exact" else []
    kept = list(dict.fromkeys([*sites, *first]))
    there, logits = other.recorded(kept)
    n = {there[site].shape[1] for site in sites}
    if len(n) > 1:
        raise ValueError(
            f"sites have {', '.join(map(str, sorted(n)))} positions: say stack= which, there are "
            f"{', '.join(view.stacks)}"
        )
    (length,) = n
    asked = spots(positions, inputs, length, pair.rows)
    heads = [there[s].shape[2] if s.kind in BY_HEAD else None for s in sites]
    places = [
        (i, head, j)
        for i, count in enumerate(heads)
        for head in (range(count) if count is not None else [None])
        for j in range(len(asked))
    ]
    if method == "exact":
        prefix = base.prefix()
        before = prefix.output
    else:
        own, before = base.recorded(kept)
    base.clean = other.clean = logits if denoise else before
    scores, theirs = base.of(before)[0], other.of(logits)[0]
    if method == "exact":
        changes = [
            [Exchange(sites[i], there[sites[i]], head, asked[j].at)] for i, head, j in places
        ]
        found = exchanged(prefix, changes, base.of, length, pass_tokens).T
    else:
        effect = estimated(base, own, there, steps if method == "integrated" else None)
        found = torch.stack(
            [scores + _at(effect[sites[i]], head, asked[j].at) for i, head, j in places], 1
        )
    table = torch.full(
        (len(pair), len(sites), max(c or 1 for c in heads), len(asked)), torch.nan
    ).double()
    for number, (i, head, j) in enumerate(places):
        table[:, i, head or 0, j] = found[:, number].detach().cpu()
    if sites[0].kind not in BY_HEAD:
        table = table[:, :, 0]
    if positions == "together":
        table = table[..., 0]
    both = (theirs, scores) if denoise else (scores, theirs)
    return _Part(table, *both, [spot.label for spot in asked])


def _at(effect: Tensor, head: int | None, at: Tensor | None) -> Tensor:
    """Of `(batch, n)` or `(batch, n, heads)`, one head's at one position or summed over all."""
    mine = effect if head is None else effect[..., head]
    return mine.sum(1) if at is None else mine[torch.arange(len(mine)), at.to(mine.device)]


def _sites(
    view: ModelView, kind: str, layers: Sequence[int] | None, stack: str | None, attention: str
) -> list[Site]:
    found = [s for s in sites_of(view, kind) if stack is None or s.stack in (stack, None)]
    found = [s for s in found if s.attention == attention]
    if stack is not None and stack not in view.stacks:
        raise ValueError(f"no stack {stack!r}; the model has {', '.join(view.stacks)}")
    if layers is not None:
        known = sorted({site.layer for site in found})
        missing = [layer for layer in layers if layer not in known]
        if missing:
            raise ValueError(
                f"no {kind} in layer {missing[0]}; there are {known[0]} to {known[-1]}"
            )
        found = [site for site in found if site.layer in layers]
    if not found:
        raise ValueError(f"the model has no site {kind!r} ({attention}-attention)")
    return found


def _axes(
    view: ModelView, sites: list[Site], parts: list[_Part], site: str, stack: str | None
) -> dict[str, tuple[str, ...]]:
    several = len({s.stack for s in sites}) > 1
    axes = {"layer": tuple(f"{s.stack} {s.layer}" if several else str(s.layer) for s in sites)}
    if site in BY_HEAD:
        axes["head"] = tuple(map(str, range(parts[0].values.shape[2])))
    labels = parts[0].labels
    if any(part.labels != labels for part in parts):
        raise ValueError(
            f"examples have {', '.join(sorted({str(len(p.labels)) for p in parts}))} positions: "
            "name positions ({'end': -1, 'subject': [...]}), or choose positions='together'"
        )
    return axes if labels == ["all"] else axes | {"position": tuple(labels)}


def _check(site: str, direction: str, method: str, steps: int) -> None:
    for given, known, what in (
        (site, KINDS, "site"),
        (direction, ("denoise", "noise"), "direction"),
        (method, METHODS, "method"),
    ):
        if given not in known:
            raise ValueError(f"{what}={given!r}: expected one of {', '.join(known)}")
    if steps < 1:
        raise ValueError(f"steps={steps}: expected 1 or more")
