"""Probing: what can be read off the activations of each layer, or of each head.

A probe that finds a property says that it is there, not that the model uses it, and a probe can
learn a task by itself. So every score stands beside controls (`probe_controls.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.instruments.attentive_probe import fit_attentive
from headwise.instruments.examples import Examples, digests, model_view, read_examples
from headwise.instruments.features import Features, Position, collect_features, probed_sites
from headwise.instruments.linear_probe import fit_logistic, fit_ridge
from headwise.instruments.probe_controls import (
    CONTROLS,
    control_task,
    shuffled_labels,
    untrained_copy,
)
from headwise.instruments.probe_folds import Split, folds_of
from headwise.instruments.probe_result import Probe
from headwise.instruments.provenance import model_name, versions
from headwise.models import ModelView
from headwise.models import view as view_of

__all__ = ["Probe", "probe"]

Fit = Callable[[Tensor, Tensor, Tensor | None], Callable[..., Tensor]]


def probe(
    model: nn.Module | ModelView,
    inputs: Any,
    labels: Any,
    site: str = "residual",
    position: Position = "last",
    kind: str = "linear",
    *,
    layers: Sequence[int] | None = None,
    folds: int = 5,
    strength: float = 1.0,
    controls: Sequence[str] = ("shuffled",),
    types: Any | None = None,
    seed: int = 0,
    keep: bool = False,
    stack: str | None = None,
    tokenizer: Any | None = None,
    processor: Any | None = None,
    tokens: int | None = None,
    windows: int | None = 1,
    batch_size: int = 16,
    memory: int = 4 << 30,
) -> Probe:
    """Cross-validated probes of `labels` at a site of every layer.

    labels: `(examples,)` classes (whole numbers) or numbers (floating point, r2 of a ridge
    regression); with position="each", `(examples, n)` for examples of equal length, -1 being no
    class. site: a kind of `models.sites`; at "heads", "queries", "keys" and "values" every head
    has a probe of its own. position: where it is read, see `Features`. kind: "linear" (L2
    logistic regression), or "attentive" (a learned query pools all positions; classes only).
    layers: which. folds: parts of the examples, seeded and stratified, each tested once by a probe
    fitted on the others; rows of one example are never on both sides. strength: of the data
    against the penalty, on features of deviation 1. controls: of "shuffled", "task", "untrained".
    types: `(examples,)` (or as labels) whole numbers, the types of the control task; the token at
    the position by default. keep: fit probes on all rows too (`Probe.probes`). memory: most bytes
    of activations that are kept at a time.

    Raises ValueError for labels that do not fit or are one class, fewer examples of a class than
    folds, controls that are not known, and activations of more than `memory`.
    """
    for name in controls:
        if name not in CONTROLS:
            raise ValueError(f"no control {name!r}; there are {', '.join(CONTROLS)}")
    if kind not in ("linear", "attentive"):
        raise ValueError(f"kind={kind!r}: expected 'linear' or 'attentive'")
    if kind == "attentive":
        if site in ("heads", "queries", "keys", "values"):
            raise ValueError(f"attentive probes read whole positions, not the {site} of one head")
        position = "all"
    elif isinstance(position, str) and position == "all":
        raise ValueError("position='all' is for attentive probes; take 'each' or 'mean'")
    view = model_view(model)
    batches = read_examples(view.model, inputs, tokenizer, processor, tokens, windows, batch_size)
    sites = probed_sites(view, site, layers, stack)
    said = _labels(labels, batches[-1].rows.stop, position)
    features = collect_features(view, batches, sites, position, memory)
    target, rows = _rows(said, features)
    classes = 0 if target.is_floating_point() else int(target.max()) + 1
    if kind == "attentive" and not classes:
        raise ValueError("attentive probes are for classes, and the labels are numbers")
    splits = folds_of(target, features.example[rows], folds, seed)
    fit = _fitter(kind, classes, strength, seed)

    def scores(of: Features, y: Tensor) -> np.ndarray:
        return np.array(
            [
                [_score(fit, x, y, mask, split, bool(classes)) for split in splits]
                for x, mask in _places(of, rows)
            ]
        )

    found: dict[str, np.ndarray] = {}
    reasons: dict[str, str] = {}
    if "shuffled" in controls:
        found["shuffled"] = scores(features, shuffled_labels(target, seed))
    if "task" in controls:
        of_type = features.token[rows] if types is None else _flat(types, rows, features)
        if types is None and bool((of_type < 0).any()):
            reasons["task"] = "the rows are of no single token: give types="
        elif len(of_type.unique()) < 2:
            reasons["task"] = "all rows are of one type: give types="
        else:
            found["task"] = scores(features, control_task(target, of_type, seed))
    if "untrained" in controls:
        found["untrained"] = scores(
            _untrained(view, batches, sites, position, memory, seed), target
        )
    names, layer, head = _named(features)
    whole = _places(features, rows) if keep else []
    return Probe(
        site=site,
        names=names,
        layer=layer,
        head=head,
        folds=scores(features, target),
        controls=found,
        metric="accuracy" if classes else "r2",
        chance=float(target.bincount().max() / len(target)) if classes else 0.0,
        probes=[fit(x, target, mask) for x, mask in whole],
        reasons=reasons,
        provenance={
            "model": model_name(view.model),
            "inputs": digests(batches),
            "rows": len(target),
            "bytes": features.bytes,
            "settings": {"kind": kind, "folds": folds, "strength": strength, "seed": seed},
            "versions": versions(),
        },
    )


def _labels(labels: Any, examples: int, position: Position) -> Tensor:
    found = torch.as_tensor(labels)
    if found.dtype == torch.bool:
        found = found.long()
    each = isinstance(position, str) and position == "each"
    if found.dim() != (2 if each else 1) or len(found) != examples:
        raise ValueError(
            f"labels have shape {tuple(found.shape)}; expected "
            f"{f'({examples}, n)' if each else f'({examples},)'}: one for each "
            f"{'position' if each else 'example'}"
        )
    return found.cpu()


def _rows(labels: Tensor, features: Features) -> tuple[Tensor, Tensor]:
    """What is asked, and of which rows of the features."""
    if labels.dim() == 2:
        if int(features.position.max()) >= labels.shape[1]:
            raise ValueError(f"labels are for {labels.shape[1]} positions; examples are longer")
        labels = labels[features.example, features.position]
    if labels.is_floating_point():
        asked = labels.isfinite()
        return labels[asked], asked
    asked = labels >= 0
    target = labels[asked]
    if len(target.unique()) < 2:
        raise ValueError("the labels are all of one class: there is nothing to tell apart")
    return target, asked


def _flat(types: Any, rows: Tensor, features: Features) -> Tensor:
    found = torch.as_tensor(types).cpu()
    found = found[features.example, features.position] if found.dim() == 2 else found
    if len(found) != len(rows):
        raise ValueError(f"types are {len(found)} for {len(rows)} rows")
    return found[rows]


def _places(features: Features, rows: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """(features of the rows, which positions count) of every layer or head, in order."""
    found: list[tuple[Tensor, Tensor | None]] = []
    for value in features.values.values():
        if features.real is not None:
            found.append((value[rows], features.real[rows]))
        elif value.dim() == 3:
            found += [(value[rows, head], None) for head in range(value.shape[1])]
        else:
            found.append((value[rows], None))
    return found


def _named(features: Features) -> tuple[list[str], np.ndarray, np.ndarray]:
    names, layer, head = [], [], []
    for site, value in features.values.items():
        by_head = features.real is None and value.dim() == 3
        for h in range(value.shape[1]) if by_head else [-1]:
            names.append(f"L{site.layer}H{h}" if by_head else str(site))
            layer.append(site.layer)
            head.append(h)
    return names, np.array(layer), np.array(head)


def _fitter(kind: str, classes: int, strength: float, seed: int) -> Fit:
    def fit(x: Tensor, y: Tensor, mask: Tensor | None) -> Callable[..., Tensor]:
        if kind == "attentive":
            real = x[mask] if mask is not None else x.flatten(0, 1)
            mean, size = real.mean(0), real.std(0).clamp_min(1e-6)
            found = fit_attentive((x - mean) / size, y, classes, mask, seed=seed)
            return lambda x, mask=None: found((x - mean) / size, mask)
        if not classes:
            return fit_ridge(x, y, strength)
        return fit_logistic(x, y, classes, strength)

    return fit


@torch.no_grad()
def _score(
    fit: Fit, x: Tensor, y: Tensor, mask: Tensor | None, split: Split, classified: bool
) -> float:
    train, test = split
    some = None if mask is None else mask[train]
    found = fit(x[train], y[train], some)
    said = found(x[test]) if mask is None else found(x[test], mask[test])
    right = y[test]
    if classified:
        return float((said.argmax(1) == right).double().mean())
    off = (said[:, 0] - right.double()).pow(2).sum()
    return float(1 - off / (right.double() - right.double().mean()).pow(2).sum())


def _untrained(
    view: ModelView,
    batches: Sequence[Examples],
    sites: Any,
    position: Position,
    memory: int,
    seed: int,
) -> Features:
    twin = view_of(untrained_copy(view.model, seed))
    return collect_features(twin, batches, sites, position, memory)
