"""Write facts into a model's weights, as a patch: `edit_fact`, `edit_facts`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from headwise.edits import locating, pmet
from headwise.edits.at_rest import at_rest
from headwise.edits.deltas import Delta, LowRank, low_rank
from headwise.edits.fact_prompts import Fact, Ids, Wording, read_fact, read_wording, rows_of
from headwise.edits.key_statistics import KeyStatistics, collect_key_statistics
from headwise.edits.patch_file import Patch
from headwise.edits.prefixes import generated_prefixes
from headwise.edits.rank_one import rank_one_update
from headwise.edits.target_values import TargetValue, ValueSearch, read_keys, search_value
from headwise.models import ModelView, view
from headwise.models.errors import UnsupportedModelError
from headwise.models.spots import down_projection
from headwise.models.structure import LayerView

METHODS = ("rome", "pmet")
Progress = Callable[[int, int, str], None]


def edit_fact(
    model: nn.Module | ModelView,
    prompt: str | Ids,
    subject: str | int | tuple[int, int],
    target: str | int | Ids,
    **options: Any,
) -> Patch:
    """Make a patch with which the model answers `prompt` with `target`; the model stays as it is
    until the patch is applied. Options and errors are those of `edit_facts`.

        patch = edit_fact(model, "The Space Needle is in the city of", "Space Needle", "Rome",
                          tokenizer=tokenizer, statistics=text)
        with patch:
            model.generate(**inputs)

    Without a tokenizer: ids, the place of the subject's last token (or start and stop), ids.
    """
    return edit_facts(model, [Fact(prompt, subject, target)], **options)


def edit_facts(
    model: nn.Module | ModelView,
    facts: Sequence[Fact],
    *,
    tokenizer: Any | None = None,
    method: str = "rome",
    layers: int | Sequence[int] | None = None,
    statistics: Any = None,
    prefixes: int | Sequence[Any] | None = None,
    essence: Any = "{} is a",
    search: ValueSearch | None = None,
    weight: float | None = None,
    root: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Patch:
    """Write several facts. ROME writes one after the other into one layer, each as a change of
    rank one; PMET all at once into several layers.

    layers: 0-based. By default the layer that causal tracing finds for the first fact (see
    `locating.trace_layers`); for PMET it and up to four before it.
    statistics: `KeyStatistics`, or the text (or token ids) to collect them on, or "identity" for
    an update that does not know which keys are usual, and disturbs more.
    prefixes: texts (or ids) put before the prompt, whose keys are averaged; a number of texts that
    the model writes itself, 5 by default with a tokenizer; none without one.
    essence: a text with {} for the subject whose next token shall not change, or ids with the
    subject's place as `(ids, place)`, or None; without a tokenizer it is left out unless given.
    weight: for PMET, how much usual keys count against the new ones; by default 0.4 per neuron,
    about what the authors take (6000 for 16384 neurons, with six layers).
    root: for PMET, whether a layer takes one over the square root of the layers that are left, or,
    as in MEMIT, one over their number.
    progress: called with (done, total, what).

    Raises ValueError for a model that does not look back only, for layers that are not there, for
    missing or other models' statistics, and as `Fact` is read; UnsupportedModelError where a
    layer's last projection is not known (mixtures of experts) or runs several times.
    """
    look = model if isinstance(model, ModelView) else view(model)
    if method not in METHODS:
        raise ValueError(f"method={method!r} is none of {', '.join(METHODS)}")
    if not facts:
        raise ValueError("no facts to write")
    if not look.causal or len(look.stacks) > 1:
        raise ValueError(
            f"{type(look.model).__name__} is no decoder that looks back only: facts are written "
            "where the subject's last token has been read and the answer has not"
        )
    read = [read_fact(fact, tokenizer) for fact in facts]
    how = search or ValueSearch()
    with at_rest(look.model):
        chosen, traced = _layers(look, layers, method, read[0][0], seed, progress)
        known = _statistics(look, statistics, chosen, tokenizer, progress)
        before = _prefixes(look, prefixes, tokenizer, seed)
        tasks = []
        for fact, (wording, target) in zip(facts, read, strict=True):
            lines = [wording]
            lines += [read_wording(fact.prompt, fact.subject, tokenizer, one) for one in before]
            tasks.append((lines, target, _essence(essence, fact, tokenizer)))
        if method == "rome":
            found, deltas = _rome(look, chosen[0], tasks, known, how, progress)
        else:
            shares = pmet.shares(len(chosen), root)
            found, deltas = _pmet(look, chosen, tasks, known, how, weight, shares, progress)
    record = {
        "method": method,
        "request": [fact.told() for fact in facts],
        "layers": [layer.index for layer in chosen],
        "traced": traced,
        "statistics": known.record | {"tokens": known.tokens} if known else "identity",
        "ridge": {str(one.index): known.ridge(one.index) for one in chosen} if known else None,
        "prefixes": [one if isinstance(one, str) else torch.as_tensor(one).tolist()
                     for one in before],
        "search": asdict(how),
        "weight": weight if method == "pmet" else None,
        "root": root if method == "pmet" else None,
        "seed": seed,
        "values": [one.told() for one in found],
    }  # fmt: skip
    return Patch.of(look, deltas, record)


Task = tuple[list[Wording], Tensor, Wording | None]
Found = tuple[list[TargetValue], dict[str, Delta]]


def _rome(
    look: ModelView,
    layer: LayerView,
    tasks: list[Task],
    known: KeyStatistics | None,
    how: ValueSearch,
    progress: Progress | None,
) -> Found:
    """One fact after the other, each on the model as the earlier ones left it."""
    module, name = down_projection(layer), _weight_name(look, layer)
    found: list[TargetValue] = []
    outs: list[Tensor] = []
    intos: list[Tensor] = []
    for lines, target, essence in tasks:
        so_far = _deltas(name, module, outs, intos)
        with Patch(so_far, model=look.model):
            value = search_value(look, layer, lines, target, essence, how, progress=progress)
        solved = known.solve(layer.index, value.key) if known else value.key
        out, into = rank_one_update(value.key, value.wanted - value.output, solved)
        found.append(value)
        outs.append(out.cpu())
        intos.append(into.cpu())
    return found, _deltas(name, module, outs, intos)


def _pmet(
    look: ModelView,
    layers: list[LayerView],
    tasks: list[Task],
    known: KeyStatistics | None,
    how: ValueSearch,
    weight: float | None,
    shares: list[float],
    progress: Progress | None,
) -> Found:
    last = layers[-1]
    found = [
        search_value(look, last, lines, target, essence, how, attention=True, progress=progress)
        for lines, target, essence in tasks
    ]
    wanted = torch.stack([value.wanted for value in found], 1)
    deltas: dict[str, Delta] = {}
    for layer, share in zip(layers, shares, strict=True):
        with Patch(deltas, model=look.model):
            keys = torch.stack([_mean_key(look, layer, task) for task in tasks], 1)
            now = torch.stack([_mean_output(look, last, task) for task in tasks], 1)
        hidden = len(keys)
        moment = known.moment(layer.index) if known else torch.eye(hidden, dtype=torch.float64)
        heavy = 0.4 * hidden if weight is None else weight
        if known:
            moment = moment + known.ridge(layer.index) * torch.eye(hidden, dtype=torch.float64)
        out, into = pmet.ridge_update((wanted - now) / share, keys, moment, heavy)
        name, module = _weight_name(look, layer), down_projection(layer)
        deltas |= _deltas(name, module, [out.cpu()], [into.cpu()])
    return found, deltas


def _mean_key(look: ModelView, layer: LayerView, task: Task) -> Tensor:
    return read_keys(look, layer, rows_of(task[0]))[0].mean(0)


def _mean_output(look: ModelView, layer: LayerView, task: Task) -> Tensor:
    return read_keys(look, layer, rows_of(task[0]))[1].mean(0)


def _deltas(
    name: str, module: nn.Module, outs: list[Tensor], intos: list[Tensor]
) -> dict[str, Delta]:
    if not outs:
        return {}
    whole: LowRank = low_rank(module, torch.cat(outs, 1).float(), torch.cat(intos, 0).float())
    return {name: whole}


def _weight_name(look: ModelView, layer: LayerView) -> str:
    module = down_projection(layer)
    for name, parameter in look.model.named_parameters():
        if parameter is module.weight:
            return name
    raise UnsupportedModelError(
        f"layer {layer.index}: the weight of its last projection is no parameter of the model"
    )


def _layers(
    look: ModelView,
    given: int | Sequence[int] | None,
    method: str,
    wording: Wording,
    seed: int,
    progress: Progress | None,
) -> tuple[list[LayerView], list[float] | None]:
    """(layers in order, effects of causal tracing where they were chosen by it)"""
    traced = None
    if given is None:
        effects = locating.trace_layers(look, wording, seed=seed, progress=progress)
        best = locating.best_layer(effects)
        has = [layer.index for layer in look.layers if layer.mlp_ends]
        numbers = [n for n in has if best - 4 <= n <= best] if method == "pmet" else [best]
        traced = [round(value, 6) for value in effects.nan_to_num(0.0).tolist()]
    else:
        numbers = sorted({given} if isinstance(given, int) else set(given))
    if method == "rome" and len(numbers) != 1:
        raise ValueError(f"layers={given}: ROME writes into one layer; PMET into several")
    known = {layer.index: layer for layer in look.layers}
    missing = [n for n in numbers if n not in known]
    if missing or not numbers:
        raise ValueError(f"layers={given}: the model has layers 0 to {max(known)}")
    for number in numbers:
        down_projection(known[number])  # raises where it is not known
    return [known[n] for n in numbers], traced


def _statistics(
    look: ModelView,
    given: Any,
    layers: list[LayerView],
    tokenizer: Any | None,
    progress: Progress | None,
) -> KeyStatistics | None:
    if given is None:
        raise ValueError(
            "statistics= is needed: text (or token ids) of the kind that the model shall go on to "
            'answer as before, KeyStatistics collected on it, or "identity" to do without'
        )
    if isinstance(given, str) and given == "identity":
        return None
    if not isinstance(given, KeyStatistics):
        numbers = [layer.index for layer in layers]
        return collect_key_statistics(look, given, numbers, tokenizer, progress=progress)
    given.check(look.model)
    for layer in layers:
        given.moment(layer.index)
    return given


def _prefixes(look: ModelView, given: Any, tokenizer: Any | None, seed: int) -> list[Any]:
    if given is None:
        given = 5 if tokenizer is not None else 0
    if not isinstance(given, int):
        return list(given)
    if given and tokenizer is None:
        raise ValueError(f"prefixes={given}: texts are generated with a tokenizer only; give ids")
    return list(generated_prefixes(look, tokenizer, given, seed=seed)) if given else []


def _essence(given: Any, fact: Fact, tokenizer: Any | None) -> Wording | None:
    if given is None or (isinstance(given, str) and not isinstance(fact.subject, str)):
        return None
    if isinstance(given, str):
        return read_wording(given, str(fact.subject), tokenizer)
    ids, place = given
    return read_wording(ids, place, tokenizer)
