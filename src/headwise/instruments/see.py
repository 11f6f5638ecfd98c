"""`see`: what every head and layer of a model does on given inputs, as an Atlas."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from headwise.edits import active as edits_of
from headwise.instruments import provenance, stimuli
from headwise.instruments.atlas import Atlas
from headwise.instruments.atlas_file import FILE_NAME
from headwise.instruments.batch import Batch
from headwise.instruments.catalog import chosen
from headwise.instruments.columns import COLUMNS, HEAD_COLUMNS, LAYER_COLUMNS
from headwise.instruments.head_rows import rows_of
from headwise.instruments.inputs import Source, read_inputs
from headwise.instruments.instrument import Instrument, Tables
from headwise.instruments.kinds import label_all
from headwise.instruments.partial import Partial, Result
from headwise.instruments.positions import position_table
from headwise.instruments.run import Run, evaluating
from headwise.instruments.stimuli import Stimuli
from headwise.instruments.tokens import Tokens
from headwise.instruments.weights import Weights
from headwise.models import ModelView, view

__all__ = ["see"]

Progress = Callable[[int, int, str], Any]
"""Called with steps done, steps in all, and what was done last."""


def see(
    model: nn.Module,
    inputs: Any,
    instruments: str | Iterable[str] | None = None,
    tokens: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | Any | None = None,
    tokenizer: Any | None = None,
    *,
    windows: int | None = 1,
    processor: Any | None = None,
    name: str | None = None,
    revision: str | None = None,
    command: str | None = None,
) -> Atlas:
    """Measure every head and layer of a Hugging Face model, as it comes.

    inputs: one or several of: text (str), a text file (Path), token ids (integer tensor `(n,)` or
    `(batch, n)`), images (with `processor`) or their pixel values, audio features, or a dict of
    model inputs with samples in front; each may be a pair (name, input). Every sample counts the
    same; with several, `Atlas.spread` holds standard errors over them. An encoder-decoder that is
    given text reads it in its encoder and, shifted by one, in its decoder.

    instruments: names, see `headwise instruments`; None: all. tokens: length of the samples that
    texts and token ids are cut into (None: 2,048 of a text or what the model is made for, token
    ids whole); windows: samples taken from each text from its beginning on, all of the same
    length (None: as many as there are). batch_size: samples of equal length that run together.
    seed: of random tokens, needles and sampled rows: the same seed gives the same numbers.

    out: a folder that keeps every finished sample under `partial`, and in the end
    `atlas.safetensors` instead; resume: go on with what is there. progress: a function of (steps
    done, steps in all, what), or an object with such a `step`. name, revision, command: for the
    provenance, where the model's config does not say.

    The model is left as it was found. Memory grows with the number of tokens, not with its
    square. Raises ValueError for inputs that cannot be measured, `UnsupportedModelError` for a
    model that cannot be observed, `ResumeError` for a folder of another run.
    """
    if min(batch_size, tokens or batch_size, windows or batch_size) < 1 or 0 in (tokens, windows):
        raise ValueError(
            f"batch_size {batch_size}, tokens {tokens}, windows {windows}: expected 1 or more"
        )
    began = time.perf_counter()
    kinds = chosen(instruments)
    look = view(model)
    words = Tokens(tokenizer, getattr(model, "config", None))
    sources = read_inputs(model, inputs, words, processor, tokens, windows)
    with evaluating(model):
        made = Stimuli(look, words, seed)
        batches = _batches(made, sources, batch_size, {kind.stimulus for kind in kinds})
        active = [kind() for kind in kinds if issubclass(kind, Instrument)]
        settings = {
            "tokens": tokens,
            "windows": windows,
            "batch_size": batch_size,
            "seed": seed,
            "instruments": {kind.name: getattr(kind, "version", 1) for kind in kinds},
            "repeats": [stimuli.REPEATS, stimuli.PERIOD],
            "needles": [stimuli.NEEDLES, stimuli.NEEDLE, stimuli.HAYSTACK],
        }
        weights = provenance.weights_hash(model)
        digests = [digest for batch in batches for digest in batch.digests]
        identity: dict[str, Any] = {"model": weights, "settings": settings, "inputs": digests}
        if edits := edits_of(model):  # samples of the model as it is do not go on here
            identity["edits"] = edits
        partial = Partial(out, identity, resume)
        for instrument in active:
            instrument.start(look, seed)
        results, before = _measure(Run(look, active), batches, partial, progress)
        alone = _from_weights(look) if Weights in kinds else {}
        atlas = _assemble(look, active, results, alone)
    atlas.provenance = provenance.collect(
        model,
        [source.entry for source in sources],
        time.perf_counter() - began + before,
        name=name,
        revision=revision,
        digest=weights,
        command=command,
        settings=settings,
    )
    if out is not None:
        atlas.save(Path(out) / FILE_NAME)
        partial.remove()
    return atlas


def _batches(
    made: Stimuli, sources: Sequence[Source], batch_size: int, wanted: set[str]
) -> list[Batch]:
    """Everything that is to run."""
    samples = [sample for source in sources for sample in source.samples]
    found: list[Batch] = []
    speaks = made.takes_tokens(samples)
    limit = position_table(made.model)
    for sample in samples:
        length = sample.inputs["input_ids"].shape[1] if speaks else 0
        if limit is not None and length > limit:
            raise ValueError(
                f"{sample.name} has {length} tokens, but the model looks positions up in a table "
                f"of {limit}: pass tokens={limit} or fewer"
            )
    if "text" in wanted:
        found += made.text(samples, batch_size)
    if "repeat" in wanted and speaks:
        found += made.repeats(samples)
    if "needle" in wanted and speaks:
        found += made.needles(samples, [source.content for source in sources])
    return found


def _measure(
    run: Run, batches: Sequence[Batch], partial: Partial, progress: Progress | Any | None
) -> tuple[dict[str, list[Result]], float]:
    """Results of all samples by stimulus, and the seconds that finished ones took before."""
    tell = getattr(progress, "step", progress)
    size = len(run.view.attentions)
    total, done, before = size * len(batches), 0, 0.0
    results: dict[str, list[Result]] = {}
    for batch in batches:
        known = [partial.load(batch.stimulus, digest) for digest in batch.digests]
        found = [result for result in known if result is not None]
        if len(found) == len(batch):
            before += sum(result.seconds for result in found)
        else:
            base = done

            def step(where: str, base: int = base, what: str = _names(batch)) -> None:
                nonlocal done
                done += 1
                if tell is not None:
                    tell(min(done, base + size), total, f"{what}, {where}")

            found = run.measure(batch, step)
            for digest, result in zip(batch.digests, found, strict=True):
                partial.save(batch.stimulus, digest, result)
            done = base
        done += size
        results.setdefault(batch.stimulus, []).extend(found)
    return results, before


def _names(batch: Batch) -> str:
    more = f" and {len(batch) - 1} more" if len(batch) > 1 else ""
    return f"{batch.names[0]}{more}"


def _assemble(
    look: ModelView,
    active: Sequence[Instrument],
    results: dict[str, list[Result]],
    alone: dict[str, np.ndarray],
) -> Atlas:
    """Means and standard errors over samples, then what follows from the means."""
    heads = dict(alone)
    layers: dict[str, np.ndarray] = {}
    spread: dict[str, np.ndarray] = {}
    pairs: dict[str, np.ndarray] = {}
    count = sum(a.heads for a in look.attentions)
    for instrument in active:
        for column in instrument.columns:
            table = layers if column in LAYER_COLUMNS else heads
            table[column.name] = np.full(len(look.layers) if table is layers else count, np.nan)
    for found in results.values():
        for name in dict.fromkeys(name for result in found for name in result.heads):
            heads[name], error = _mean([r.heads[name] for r in found if name in r.heads])
            if len(found) > 1:
                spread[name] = error
        for name in dict.fromkeys(name for result in found for name in result.layers):
            layers[name], _ = _mean([r.layers[name] for r in found if name in r.layers])
        for name in dict.fromkeys(name for result in found for name in result.pairs):
            pairs[name], _ = _mean([r.pairs[name] for r in found if name in r.pairs])
    tables = Tables(max(1, len(results.get("text", ()))), heads, layers, pairs)
    for instrument in active:
        if instrument.stimulus in results:
            instrument.conclude(tables)
    rows, places = rows_of(look)
    heads = {**rows, **heads}
    kinds, reasons = label_all(heads)
    heads["kind"] = np.array(kinds)
    return Atlas(
        heads=_ordered(heads, [c.name for c in HEAD_COLUMNS]),
        layers={**places, **_ordered(layers, [c.name for c in LAYER_COLUMNS])},
        columns={c.name: c for i in active for c in i.columns if c.name not in COLUMNS},
        pairs=pairs,
        spread=spread,
        reasons=reasons,
        tiles=[tile for found in results.values() for result in found for tile in result.tiles],
    )


def _mean(values: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over samples and its standard error, each over those that are not NaN."""
    stacked = np.stack(values)
    known = ~np.isnan(stacked)
    count = known.sum(0)
    some = np.maximum(count, 1)
    mean = np.where(known, stacked, 0).sum(0) / some
    squares = np.where(known, (stacked - mean) ** 2, 0).sum(0)
    error = np.sqrt(squares / np.maximum(count - 1, 1) / some)
    return np.where(count > 0, mean, np.nan), np.where(count > 1, error, np.nan)


def _ordered(table: dict[str, np.ndarray], order: Sequence[str]) -> dict[str, np.ndarray]:
    """The columns in the order of the list of columns, unknown ones behind."""
    return {name: table[name] for name in dict.fromkeys([*order, *table]) if name in table}


def _from_weights(look: ModelView) -> dict[str, np.ndarray]:
    instrument = Weights(look)
    read = [instrument.read(attention) for attention in look.attentions]
    names = [column.name for column in Weights.columns]
    return {name: np.concatenate([np.asarray(scores[name]) for scores in read]) for name in names}
