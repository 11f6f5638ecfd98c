"""Rounding the matrices of an attention by what attention makes of them.

Post-training quantisation rounds each matrix so that its own output changes least, ||X dW^T||.
aespa keeps to one matrix at a time, which is cheap, but asks what becomes of its output: an error
in the queries is met by the keys, so the scores' error ||X dW_Q^T K^T|| counts (the softmax is
dropped by a bound); keys likewise meet the queries; values are averaged by the map A, so
||A X dW_V^T|| counts. Each is a quadratic form of second moments that are summed up once:

    queries  tr(dW E[X^T X] dW^T E[K^T K])     keys  tr(dW E[X^T X] dW^T E[Q^T Q])
    values   tr(dW E[X^T A^T A X] dW^T)

for each head, so that the cost of a trial does not depend on the number of calibration tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from headwise.compress.bits.descent import descend, quadratic_error
from headwise.compress.bits.quantised_linear import QuantisedLinear
from headwise.compress.bits.rounding import Rounded, round_to_nearest
from headwise.compress.bits.weights import Quantise
from headwise.compress.step import take
from headwise.models import view
from headwise.models.backbones import Decoder
from headwise.models.structure import AttentionView
from headwise.papers import Measured, at_most, claim, paper
from headwise.parts import Attention, Mixer, TokenShift
from headwise.tasks import MultiQueryRecall
from headwise.train import evaluate, fit, seeded

Forms = tuple[Tensor, Tensor | None]
"""inner `(width, width)` and outer `(head_dim, head_dim)` of the error of one head's rows."""
Targets = Callable[["Moments", str, int], Forms]


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of one attention on calibration tokens, means over sequences. inputs
    `(width, width)`; queries, keys `(heads, head_dim, head_dim)`; mixed `(heads, width, width)`, of
    what a head's map averages."""

    inputs: Tensor
    queries: Tensor
    keys: Tensor
    mixed: Tensor


def moments(attention: AttentionView, x: Tensor) -> Moments:
    """Of the attention's inputs x `(batch, n, width)`, for causal attention without positions."""
    q, k, weights = maps(attention, x)
    mixed = weights @ x[:, None]
    return Moments(
        *(
            torch.einsum(rule, one, one) / len(x)
            for rule, one in (
                ("bnd,bne->de", x),
                ("bhnd,bhne->hde", q),
                ("bhnd,bhne->hde", k),
                ("bhnd,bhne->hde", mixed),
            )
        )
    )


def maps(attention: AttentionView, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q and k `(batch, heads, n, head_dim)` and the map `(batch, heads, n, n)`."""
    q, k = (
        torch.einsum("bnw,hdw->bhnd", x, weight) if bias is None
        else torch.einsum("bnw,hdw->bhnd", x, weight) + bias[:, None]
        for weight, bias in (
            (attention.query_weight(), attention.query_bias()),
            (attention.key_weight(), attention.key_bias()),
        )
    )  # fmt: skip
    n = x.shape[1]
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    scores = (q @ k.mT * attention.head_dim**-0.5).masked_fill(later, -torch.inf)
    return q, k, scores.softmax(-1)


@paper(
    title="Towards Next-Level Post-Training Quantization of Hyper-Scale Transformers",
    source="arXiv 2402.08958",
    year=2024,
    modality="text",
    plain="Queries, keys and values are rounded one by one, by what the attention makes of their "
    "errors.",
    equation=r"\min_{\Delta W_Q} \mathrm{tr}\big(\Delta W_Q\, \mathbb{E}[X^\top X]\, "
    r"\Delta W_Q^\top\, \mathbb{E}[K^\top K]\big)",
    parts=("QuantisedLinear",),
    reported="OPT, BLOOM and LLaMA in 2 to 4 bits with less perplexity lost than by layer-wise "
    "rounding, several times as fast as block-wise reconstruction.",
    unsure="Roundings are chosen by coordinate descent, which needs no step sizes; the paper "
    "learns them by gradient (AdaRound).",
    taxonomy=("beyond/compression",),
    use="""
from headwise.papers.compress.aespa import attention_wise, calibration, rounded_attention, trained

model = rounded_attention(trained(0), calibration(0), attention_wise, bits=3)
""",
)
def attention_wise(found: Moments, which: str, head: int) -> Forms:
    """The quadratic form of the error of a head's queries, keys or values."""
    if which == "value":
        return found.mixed[head], None
    return found.inputs, (found.keys if which == "query" else found.queries)[head]


def layer_wise(found: Moments, which: str, head: int) -> Forms:
    """The control: each matrix for its own output."""
    return found.inputs, None


def nearest(found: Moments, which: str, head: int) -> Forms:
    """The control: each number for itself."""
    return torch.eye(len(found.inputs)), None


def rounded_attention(
    model: nn.Module, given: dict[str, Tensor], targets: Targets, bits: int
) -> nn.Module:
    """A copy of the model whose queries, keys and values are in few bits, one scale a row."""
    model = copy.deepcopy(model)
    names = {id(module): name for name, module in model.named_modules()}
    for attention, x in inputs_of(model, given):
        known, made = moments(attention, x), {}
        projections = attention.projections
        assert not isinstance(projections, str)
        for which in ("query", "key", "value"):
            part = getattr(projections, which)
            heads = []
            for head, weight in enumerate(part.weight):
                heads.append(
                    descend(round_to_nearest(weight, bits), weight, *targets(known, which, head))
                )
            zeros = torch.cat([h.zero for h in heads if h.zero is not None])
            codes = torch.cat([h.codes for h in heads])
            rows = Rounded(codes, torch.cat([h.scale for h in heads]), zeros, bits)
            made[names[id(part.module)]] = rows
        take(model, Quantise(tuple((name, bits) for name in made)))
        for name, rows in made.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, QuantisedLinear)
            layer.fill(rows)
    return model


def inputs_of(model: nn.Module, given: dict[str, Tensor]) -> list[tuple[AttentionView, Tensor]]:
    """What every attention reads."""
    found: list[tuple[AttentionView, Tensor]] = []
    handles = []
    for one in view(model).attentions:

        def keep(module: nn.Module, args: tuple[Tensor], of: AttentionView = one) -> None:
            found.append((of, args[0].detach()))

        projections = one.projections
        assert not isinstance(projections, str)
        handles.append(projections.query.module.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(**given)
    for handle in handles:
        handle.remove()
    return found


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1, 2)
TASK = MultiQueryRecall(pairs=4, length=32, vocabulary=32, power=1.0)


@cache
def trained(seed: int) -> nn.Module:
    """A layer that joins neighbours, then two of four heads, that recalls values of keys."""

    def mixer(layer: int) -> Mixer:
        return Attention(64, 4, causal=True) if layer else TokenShift(64, causal=True)

    with seeded(seed):
        model = Decoder(32, 64, 3, mixer, feed=lambda layer: None, tied=False)
    fit(model, TASK, steps=120, size=32, rate=5e-3, seed=seed)
    return model.eval()


def calibration(seed: int, count: int = 32) -> dict[str, Tensor]:
    return TASK.batch(seed, count).inputs


@torch.no_grad()
def map_error(targets: Targets, seed: int, bits: int = 3) -> float:
    """Mean squared change of the attentions' outputs (values mixed by the map), on other tokens."""
    model = trained(seed)
    made = rounded_attention(model, calibration(seed), targets, bits)
    total = 0.0
    for (plain, x), few in zip(
        inputs_of(model, TASK.batch(99, 32, "test").inputs), view(made).attentions, strict=True
    ):
        outputs = []
        for attention in (plain, few):
            value = torch.einsum("bnw,hdw->bhnd", x, attention.value_weight())
            outputs.append(maps(attention, x)[2] @ value)
        total += float((outputs[0] - outputs[1]).square().mean() / outputs[0].square().mean())
    return total


@claim(control=layer_wise, unit="largest relative difference", seeds=SEEDS)
def traces_are_norms(targets: Targets, seed: int) -> Measured:
    """For one sequence the forms equal ||X dW^T K^T||^2, ||X dW^T Q^T||^2 and ||A X dW^T||^2 to
    1e-5."""
    attention, x = inputs_of(trained(seed), calibration(seed, 1))[0]
    known = moments(attention, x)
    q, k, weights = maps(attention, x)
    worst = torch.zeros(())
    for which, after in (("query", k), ("key", q), ("value", None)):
        for head in range(attention.heads):
            delta = torch.randn(attention.head_dim, x.shape[-1])
            got = quadratic_error(delta, *targets(known, which, head))
            moved = x[0] @ delta.T
            moved = weights[0, head] @ moved if after is None else moved @ after[0, head].T
            want = moved.square().sum()
            worst = torch.maximum(worst, (got - want).abs() / want)
    return at_most(worst, 1e-5)


@claim(control=layer_wise, unit="share of the layer-wise error", seeds=SEEDS)
def attention_changes_less(targets: Targets, seed: int) -> Measured:
    """In 3 bits, what the heads give changes by at most 0.9 (squared, on other tokens) of what it
    changes when each matrix is rounded for its own output by the same descent."""
    return at_most(map_error(targets, seed) / map_error(layer_wise, seed), 0.9)


@claim(control=nearest, unit="share of the error of nearest rounding", seeds=SEEDS)
def far_less_than_nearest(targets: Targets, seed: int) -> Measured:
    """And by at most 0.7 of what rounding to the nearest changes."""
    return at_most(map_error(targets, seed) / map_error(nearest, seed), 0.7)


@claim(control=layer_wise, unit="share of the layer-wise rise of the loss", seeds=SEEDS)
def the_task_suffers_less(targets: Targets, seed: int) -> Measured:
    """In 2 bits the loss on the task rises by at most 0.9 of what it rises with layer-wise
    rounding."""
    model = trained(seed)

    def rise(of: Targets) -> float:
        made = rounded_attention(model, calibration(seed), of, 2)
        return evaluate(made, TASK, 2)["loss"] - evaluate(model, TASK, 2)["loss"]

    mine, theirs = rise(targets), rise(layer_wise)
    return at_most(mine / theirs, 0.9, rise=mine, layer_wise=theirs)


def with_moments(x: Tensor, k: Tensor) -> Callable[[Tensor], Tensor]:
    inner, outer = x.T @ x, k.T @ k
    return lambda delta: quadratic_error(delta, inner, outer)


def with_tokens(x: Tensor, k: Tensor) -> Callable[[Tensor], Tensor]:
    """The control: the scores' error, computed each time."""
    return lambda delta: ((x @ delta.T) @ k.T).square().sum()


@claim(subject=with_moments, control=with_tokens, unit="ratio of operations")
def trials_do_not_see_tokens(prepare: Callable[..., Callable[..., Tensor]], seed: int) -> Measured:
    """One evaluation of the error takes as many operations after 4,000 tokens as after 400."""
    counts = []
    for tokens in (400, 4000):
        error = prepare(torch.randn(tokens, 64), torch.randn(tokens, 16))
        with FlopCounterMode(display=False) as counter:
            error(torch.randn(16, 64))
        counts.append(counter.get_total_flops())
    return at_most(counts[1] / counts[0], 1.01)
