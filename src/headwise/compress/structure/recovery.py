"""What was taken out of a model is made up for by the matrices that are left, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.compress.step import take
from headwise.compress.structure.biases import AddBias
from headwise.compress.structure.least_squares import Fit, Problem
from headwise.compress.structure.low_rank import LowRank
from headwise.compress.structure.matrices import bias_of, is_matrix
from headwise.compress.structure.moments import body_of, run, stopping, tokens_of
from headwise.compress.structure.walking import Walk, can_go_on, first_of
from headwise.instruments.examples import Examples, model_view, read_examples
from headwise.instruments.metrics import metric_of
from headwise.instruments.run import evaluating
from headwise.models import LayerView, ModelView, Site, UnsupportedModelError, recording
from headwise.models.prefix import logits_of
from headwise.models.projections import features_first
from headwise.models.spots import down_projection

TARGETS = ("residual", "output")
PARTS = ("attention", "mlp")


@dataclass(frozen=True)
class Recovery:
    """What `compensate` did. before, after: mean KL(original || model) in nats on the test
    inputs. fits: name of a matrix -> what its fit did. skipped: "layer 3 mlp" and the like, parts
    that no single matrix of floats ends."""

    before: float
    after: float
    fits: dict[str, Fit]
    skipped: tuple[str, ...]


def compensate(
    model: nn.Module | ModelView,
    original: nn.Module | ModelView,
    inputs: Any,
    test: Any = None,
    target: str = "residual",
    parts: Sequence[str] = PARTS,
    ridge: float | None = None,
    bias: bool = False,
    layers: Sequence[int] | None = None,
    **reading: Any,
) -> Recovery:
    """Fit the last matrix of every attention and feed-forward part of a smaller model so that
    on calibration text it gives what the original gave: least squares, layer after layer, each on
    what the layers before it, already fitted, hand over.

        compensate(small, model, texts, tokenizer=tok)

    target: "residual", what brings the residual to where the original had it, so that what earlier
    layers lost is made up for too, and a dropped span by the feed-forward part before it (pre-norm
    models; LoRAP and SliceGPT have no such step; ReplaceMe, arXiv 2505.02819, does it for dropped
    layers); "output", what the original's part gave (FLAP, arXiv 2312.11983, by the bias alone).
    parts: "attention", "mlp" or both. ridge: pull to the weights as they are, of the mean square
    of a feature, by default chosen on a held-out quarter of the tokens, where no change is one of
    the choices. bias: give matrices without a bias one (the step AddBias). layers: which of the
    original's layers each of the model's was, needed where layers are missing. test: what the
    price is measured on, by default the inputs. reading: as in `read_examples`.

    Runs every layer of both models a few times over the inputs; keeps second moments of one matrix,
    and of each batch what one layer of either gave. Raises
    ValueError for layers that do not match, UnsupportedModelError for models in which attention
    and MLP do not add up to the residual (post-norm: target="output").
    """
    small, whole = model_view(model), model_view(original)
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: expected one of {', '.join(TARGETS)}")
    if not parts or any(part not in PARTS for part in parts):
        raise ValueError(f"parts={parts!r}: expected some of {', '.join(PARTS)}")
    places = _matched(small, whole, layers)
    batches = read_examples(whole.model, inputs, **reading)
    tests = batches if test is None else read_examples(whole.model, test, **reading)
    with evaluating(small.model), evaluating(whole.model), torch.no_grad():
        if target == "residual":
            _require_sums(whole, batches[0])
        jobs, skipped = _jobs(small, places, parts, target)
        before = _divergence(small.model, whole.model, tests)
        if bias:
            bare = [name for _, _, name in jobs if bias_of(_last(small.model, name)) is None]
            if bare:
                take(small.model, AddBias(tuple(dict.fromkeys(bare))))
        fits: dict[str, Fit] = {}
        mine, theirs = (
            [Walk(look, batch, reuse) for batch in batches]
            for look, reuse in ((v, can_go_on(v, batches[0])) for v in (small, whole))
        )
        for place, part, name in jobs:
            problem = _gathered(mine, theirs, place, part, name, target)
            fits[name] = problem.solve(_last(small.model, name), ridge)
        after = _divergence(small.model, whole.model, tests)
    return Recovery(before, after, fits, tuple(skipped))


@dataclass(frozen=True, eq=False)
class _Place:
    """A layer of the smaller model, the original's that it was, and the last before the next."""

    layer: LayerView
    was: LayerView
    until: int


def _matched(small: ModelView, whole: ModelView, layers: Sequence[int] | None) -> list[_Place]:
    if small.stacks != whole.stacks:
        raise ValueError(f"stacks {small.stacks} are not those of the original, {whole.stacks}")
    if layers is not None and len(small.stacks) > 1:
        raise ValueError("layers= is for models of one stack")
    found = []
    for stack in small.stacks:
        mine = [layer for layer in small.layers if layer.stack == stack]
        theirs = [layer for layer in whole.layers if layer.stack == stack]
        was = list(range(len(theirs))) if layers is None else list(layers)
        if len(was) != len(mine) or sorted(set(was)) != was or was[-1] >= len(theirs):
            raise ValueError(
                f"the {stack} has {len(mine)} layers and the original {len(theirs)}: say which of "
                f"them they were with layers=, {len(mine)} rising numbers; got {was}"
            )
        ends = [*[n - 1 for n in was[1:]], len(theirs) - 1]
        found += [
            _Place(layer, theirs[n], end) for layer, n, end in zip(mine, was, ends, strict=True)
        ]
    return found


def _jobs(
    small: ModelView, places: list[_Place], parts: Sequence[str], target: str
) -> tuple[list[tuple[_Place, str, str]], list[str]]:
    """(place, part, name of its last matrix) in order, and what has no such matrix."""
    names = {id(module): name for name, module in small.model.named_modules()}
    jobs, skipped = [], []
    for place in places:
        layer = place.layer
        if target == "residual" and len(layer.attentions) > 1:
            raise UnsupportedModelError(
                f"layer {layer.index} has {len(layer.attentions)} attentions: use target='output'"
            )
        for part in (part for part in PARTS if part in parts):
            matrix = _end_of(layer, part)
            last = matrix.up if isinstance(matrix, LowRank) else matrix
            # its part is gone, or it has few bits and no matrix that could be fitted
            if last is None or not is_matrix(last) or not features_first(last).numel():
                skipped.append(f"layer {layer.index} {part}")
            else:
                assert matrix is not None
                jobs.append((place, part, names[id(matrix)]))
    return jobs, skipped


def _end_of(layer: LayerView, part: str) -> nn.Module | None:
    """The last matrix of a part, None where none was found or something follows it."""
    if part == "attention":
        ends = [a.projections for a in layer.attentions if a.kind == "self"]
        found = getattr(ends[0], "output", None) if ends else None
        return found if found is not None and found in layer.attention_ends else None
    try:
        found = down_projection(layer)
    except UnsupportedModelError:
        return None
    return found if found is layer.mlp_ends[0] or layer.mlp is layer.mlp_ends[0] else None


def _last(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    found = module.up if isinstance(module, LowRank) else module
    assert is_matrix(found)
    return found


def _gathered(
    mine: list[Walk], theirs: list[Walk], place: _Place, part: str, name: str, target: str
) -> Problem:
    """Moments of what a part's last matrix reads, and of what it should give."""
    problem = Problem()
    for walk, whole in zip(mine, theirs, strict=True):
        small, batch = walk.view, walk.batch
        matrix = _last(small.model, name)
        walk.to(small.layers.index(place.layer))
        whole.to(whole.view.layers.index(place.was))
        wanted = _wanted(whole, place, part, target)
        stack = place.layer.stack if len(small.stacks) > 1 else None
        sites = [Site("residual", place.layer.index, stack)] if target == "residual" else []
        if sites and part == "mlp" and place.layer.attentions:
            sites.append(Site("attention", place.layer.index, stack))
        read: list[Tensor] = []
        body = body_of(small.model, [matrix])
        with ExitStack() as hooks:
            hooks.enter_context(walk.remembering())
            kept = hooks.enter_context(recording(small, sites))
            handle = matrix.register_forward_pre_hook(_keeping(read))
            hooks.callback(handle.remove)
            hooks.enter_context(stopping(matrix))
            run(body, batch)
        for there in kept.values():
            wanted = wanted - there
        problem.add(tokens_of(read[-1], batch), tokens_of(wanted, batch))
    return problem


def _keeping(read: list[Tensor]) -> Any:
    def keep(module: nn.Module, args: Any) -> None:
        read.append(args[0])

    return keep


def _wanted(walk: Walk, place: _Place, part: str, target: str) -> Tensor:
    """`(batch, n, width)`: what the original had there."""
    whole = walk.view
    stack = place.was.stack if len(whole.stacks) > 1 else None
    here = place.was.index
    if target == "output":
        sites = [Site(part, here, stack)]
    elif part == "attention":  # the residual between attention and MLP
        sites = [Site("residual", here, stack), Site("attention", here, stack)]
    else:
        sites = [Site("residual", place.until + 1, stack)]
    layers = [layer for layer in whole.layers if layer.stack == place.was.stack]
    last = layers[min(max(s.layer for s in sites), len(layers) - 1)].module
    with walk.remembering(), recording(whole, sites) as kept, stopping(last):
        run(body_of(whole.model, [layer.module for layer in layers]), walk.batch)
    return sum((kept[site] for site in sites[1:]), kept[sites[0]])


def _require_sums(whole: ModelView, batch: Examples) -> None:
    """Tried on one example."""
    sums: list[tuple[LayerView, list[Site], list[Site]]] = []
    for layer in whole.layers:
        stack = layer.stack if len(whole.stacks) > 1 else None
        kinds = [*(["attention"] if layer.attentions else []), *(["mlp"] if layer.mlp_ends else [])]
        ends = [Site("residual", layer.index + n, stack) for n in (0, 1)]
        sums.append((layer, ends, [Site(kind, layer.index, stack) for kind in kinds]))
    asked = dict.fromkeys(site for _, ends, sites in sums for site in (*ends, *sites))
    with recording(whole, asked) as kept:
        run(body_of(whole.model, [one.module for one in whole.layers]), first_of(batch))
    for layer, ends, sites in sums:
        before, after = (kept[site] for site in ends)
        rest = after - before - sum(kept[site].view_as(before) for site in sites)
        if float(rest.norm()) > 1e-3 * float(after.norm()):
            raise UnsupportedModelError(
                f"layer {layer.index} of {type(whole.model).__name__}: attention and MLP do not "
                "add up to what it gives (post-norm?): use target='output'"
            )


def _divergence(model: nn.Module, original: nn.Module, batches: list[Examples]) -> float:
    """Mean KL(original || model) over examples, nats."""
    kl, total, count = metric_of("kl"), 0.0, 0
    for batch in batches:
        clean = logits_of(run(original, batch))
        score = kl.score(logits_of(run(model, batch)), batch.inputs, clean)
        total, count = total + float(score.double().sum()), count + len(score)
    return total / count
