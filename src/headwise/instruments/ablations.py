"""`ablation`: what a model loses without each head, attention, feed-forward part or layer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from headwise.edits import active as edits_of
from headwise.instruments import provenance
from headwise.instruments.ablated_parts import WHAT, Part, heads_site, parts_of
from headwise.instruments.atlas import Atlas
from headwise.instruments.cause_tables import as_columns, assembled
from headwise.instruments.effect_gradients import check_estimate, estimated
from headwise.instruments.examples import Examples, digests, model_view, read_examples
from headwise.instruments.metrics import Metric, metric_of
from headwise.instruments.part_effects import Measurement
from headwise.instruments.partial import Partial, Result
from headwise.instruments.references import replacement_of
from headwise.instruments.replacements import HOW
from headwise.instruments.run import evaluating
from headwise.models import ModelView

__all__ = ["ablation"]

Progress = Callable[[int, int, str], Any]


def ablation(
    model: nn.Module | ModelView,
    inputs: Any,
    metric: Any = "loss",
    how: str = "zero",
    what: str | Sequence[str] = "heads",
    *,
    reference: Any | None = None,
    by_position: bool = False,
    frozen: bool = False,
    draws: int = 4,
    estimate: str | Sequence[str] = (),
    exact: bool = True,
    steps: int = 8,
    batch_size: int = 16,
    copies: int | None = None,
    tokens: int | None = None,
    windows: int | None = 1,
    seed: int = 0,
    tokenizer: Any | None = None,
    processor: Any | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | Any | None = None,
    name: str | None = None,
    revision: str | None = None,
    command: str | None = None,
) -> Atlas:
    """The effect of taking out each part: metric of the changed model minus that of the unchanged
    one, mean over examples, with its standard error.

        ablation(model, text, metric="loss", tokenizer=tok).top("effect")

    inputs, tokens, windows, tokenizer, processor: examples, as in `see`; `labels` among a dict of
    inputs go to the metric. metric: "loss", "accuracy", "kl", a `Metric`, or a function of (logits,
    inputs) that gives `(batch,)` (see `metrics`).

    how: "zero"; "mean", of `reference` (examples, by default the inputs themselves), over all their
    tokens or `by_position`; "resample", what another example of equal length has there, mean effect
    of `draws` draws; "uniform", heads only: the map is even over what may be seen (attention-only
    ablation). A layer that is taken out adds nothing (the mean update; another example's).

    what: "heads" (head columns `effect`, `effect_se`), "layers", "attention", "mlp" (layer columns
    `layer_effect`, `attention_effect`, `cross_attention_effect`, `mlp_effect`, each with `_se`), or
    several of these. For several heads at once see `ablate_together`, for tokens `ablate_tokens`.

    frozen: all maps stay as they are without the change, so that its effect goes through values
    alone (pattern-preserving ablation, Olsson et al. 2022, arXiv 2209.11895). estimate: "gradient"
    and "integrated" add `effect_gradient`, `effect_integrated` of heads (see `effect_gradients`),
    with their rank correlation with the exact effect in the provenance; exact=False leaves out
    the exact one. steps: points of the integrated estimate.

    batch_size: examples of equal length that run together; copies: parts in one pass, None: as many
    as fit in memory and help. out, resume, progress, name, revision, command: as in `see`; finished
    batches are kept in `out/partial` until all are done, and then returned, not written.

    The provenance's "cause" says what was measured: metric, how, the unchanged model's mean, number
    of examples. The model is left as it was found. Raises ValueError for what cannot be measured,
    UnsupportedModelError for models whose parts are not known, before anything runs where it can.
    """
    began = time.perf_counter()
    view = model_view(model)
    kinds = [what] if isinstance(what, str) else list(dict.fromkeys(what))
    estimates = [estimate] if isinstance(estimate, str) else list(dict.fromkeys(estimate))
    measure = metric_of(metric)
    parts = {kind: parts_of(view, kind) for kind in kinds}
    _check(kinds, how, estimates, exact, measure, draws, copies, steps)
    batches = read_examples(view.model, inputs, tokenizer, processor, tokens, windows, batch_size)
    pool = batches
    if reference is not None:
        pool = read_examples(
            view.model, reference, tokenizer, processor, tokens, windows, batch_size
        )
    settings: dict[str, Any] = {
        "metric": measure.name,
        "how": how,
        "what": kinds,
        "frozen": frozen,
        "estimate": estimates,
        "exact": exact,
        "tokens": tokens,
        "windows": windows,
        "batch_size": batch_size,
        "seed": seed,
    }
    settings |= {"by_position": by_position} if how == "mean" else {}
    settings |= {"draws": draws} if how == "resample" else {}
    settings |= {"steps": steps} if "integrated" in estimates else {}
    with evaluating(view.model):
        weights = provenance.weights_hash(view.model)
        identity: dict[str, Any] = {
            "model": weights,
            "settings": settings,
            "inputs": digests(batches),
        }
        identity |= {"reference": digests(pool)} if reference is not None else {}
        identity |= {"edits": edits} if (edits := edits_of(view.model)) else {}
        partial = Partial(out, identity, resume)
        every = [part for kind in kinds for part in parts[kind]]
        instead = replacement_of(
            view, every, how, pool, by_position, draws, seed, reference is not None
        )
        run = Measurement(view, every if exact else [], measure, instead, frozen, copies)
        results, before = _measure(run, kinds, parts, estimates, steps, batches, partial, progress)
    cause = {
        "metric": measure.name,
        "unit": measure.unit,
        "better": measure.better,
        "how": how,
        "frozen": frozen,
        "examples": sum(map(len, batches)),
        "reference": "the inputs" if reference is None else sum(map(len, pool)),
    }
    atlas = assembled(view, results, cause)
    facts = provenance.collect(
        view.model,
        [
            {"name": _names(batch), "sha256": digest, "tokens": _tokens(batch)}
            for batch, digest in zip(batches, digests(batches), strict=True)
        ],
        time.perf_counter() - began + before,
        name=name,
        revision=revision,
        digest=weights,
        command=command,
        settings=settings,
    )
    atlas.provenance = facts | atlas.provenance
    partial.remove()
    return atlas


def _measure(
    run: Measurement,
    kinds: Sequence[str],
    parts: dict[str, list[Part]],
    estimates: Sequence[str],
    steps: int,
    batches: list[Examples],
    partial: Partial,
    progress: Progress | Any | None,
) -> tuple[list[Result], float]:
    """One result an example, and the seconds that finished ones took before."""
    view, tell = run.view, getattr(progress, "step", progress)
    heads = [heads_site(view, a) for a in view.attentions] if estimates else []
    passes = len(run.parts) * run.replacement.draws
    size = passes + len(estimates) * len(view.attentions) * run.replacement.draws
    results: list[Result] = []
    before = 0.0
    for number, (batch, digest) in enumerate(zip(batches, digests(batches), strict=True)):
        keys = [f"{digest} {row}" for row in range(len(batch))]
        known = [done for key in keys if (done := partial.load("cause", key)) is not None]
        if len(known) == len(batch):
            results += known
            before += sum(result.seconds for result in known)
            continue
        began = time.perf_counter()
        step = _Steps(tell, number * size, size, size * len(batches), _names(batch))
        clean = run.clean(batch, heads)
        tables: dict[str, np.ndarray] = {"unchanged": run.base(batch, clean).cpu().numpy()[None]}
        if run.parts:
            found = run.effects(batch, clean, step)
            for kind in kinds:
                tables[kind], found = found[: len(parts[kind])], found[len(parts[kind]) :]
        for estimate in estimates:
            tables[estimate] = estimated(run, batch, clean, estimate, steps, step)
        seconds = (time.perf_counter() - began) / len(batch)
        for row, key in enumerate(keys):
            own = {name: table[:, row] for name, table in tables.items()}
            result = as_columns(view, own, parts, seconds)
            partial.save("cause", key, result)
            results.append(result)
    return results, before


class _Steps:
    """Counts what a batch has done, and tells."""

    def __init__(self, tell: Any, before: int, size: int, total: int, what: str) -> None:
        self.tell, self.before, self.size, self.total, self.what = tell, before, size, total, what
        self.done = 0

    def __call__(self, more: int = 1) -> None:
        self.done = min(self.done + more, self.size)
        if self.tell is not None:
            self.tell(self.before + self.done, self.total, self.what)


def _check(
    kinds: Sequence[str],
    how: str,
    estimates: Sequence[str],
    exact: bool,
    metric: Metric,
    draws: int,
    copies: int | None,
    steps: int,
) -> None:
    if not kinds:
        raise ValueError(f"what=(): expected one or several of {', '.join(WHAT)}")
    if how not in HOW:
        raise ValueError(f"how={how!r}: expected one of {', '.join(HOW)}")
    if how == "uniform" and set(kinds) != {"heads"}:
        raise ValueError("how='uniform' exchanges the maps of heads: it goes with what='heads'")
    if min(draws, steps, 1 if copies is None else copies) < 1:
        raise ValueError(f"draws={draws}, steps={steps}, copies={copies}: expected 1 or more")
    for estimate in estimates:
        check_estimate(estimate, metric)
    if estimates and "heads" not in kinds:
        raise ValueError("estimates are of heads: add 'heads' to what=")
    if not exact and (not estimates or set(kinds) != {"heads"}):
        raise ValueError("exact=False leaves only estimates of heads: name some with estimate=")


def _names(batch: Examples) -> str:
    first, last = batch.rows.start + 1, batch.rows.stop
    return f"example {first}" if first == last else f"examples {first} to {last}"


def _tokens(batch: Examples) -> int:
    ids = batch.inputs.get("input_ids")
    return len(batch) if ids is None else ids.numel()
