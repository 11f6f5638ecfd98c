"""Attention becomes low-rank, the feed-forward part loses channels.

LoRAP looks at the singular values of trained matrices. Those of attention fall off, above all once
every input channel is weighed by how large it is on real text; those of the feed-forward part do
not. So attention's matrices become products of two thin ones, the best ones under the weighing
|(W - W') diag(s)| with s_j = ||X_j||, and queries and keys, which fall off faster, get fewer of
the parameters than values and outputs. The feed-forward part loses whole channels, ranked without
gradients by the norm of weight times activation over everything that belongs to a channel; the
very least important hundredth, the authors find, is to stay.

The room has all of it: `factorise(weighting="diagonal")` and `prune_channels`. It has the full
second moments of the inputs as well, which take correlations into account and lose less.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headwise.compress.structure.channels import prune_channels
from headwise.compress.structure.low_rank import factorise
from headwise.compress.structure.matrices import matrices_of
from headwise.compress.structure.moments import input_moments
from headwise.compress.structure.ranks import largest_rank, spectrum
from headwise.instruments.examples import read_examples
from headwise.instruments.metrics import metric_of
from headwise.models import LayerView, ModelView, view
from headwise.models.prefix import logits_of
from headwise.models.projections import features_first
from headwise.papers import Measured, Picture, at_most, claim, paper, picture
from headwise.papers.embedded import embedded_model, embedded_text

Inputs = dict[str, Tensor]
Shrink = Callable[..., nn.Module]

QUERY_KEY_SHARE = 0.25
"""Of attention's parameters: what W_Q and W_K get together (1 : 3 to W_V and W_O)."""


@paper(
    title="LoRAP: Transformer Sub-Layers Deserve Differentiated Structured Compression for Large "
    "Language Models",
    source="arXiv 2404.09695",
    year=2024,
    modality="text",
    plain="Attention is factorised by activation-weighted SVD, the feed-forward part loses "
    "channels.",
    equation=r"\min_{\mathrm{rank}\, W' \le r} \left\| (W - W')\, \mathrm{diag}(s) \right\|_F, "
    r"\quad s_j = \|X_j\|_2",
    parts=("LowRank", "Factorise", "PruneChannels"),
    reported="Better perplexity and zero-shot accuracy than LLM-Pruner and LoRAPrune on LLaMA at "
    "20 and 50 % of the parameters removed.",
    unsure="The ratio 1 : 3 of parameters and the norm over a channel's weights are from memory.",
    needs=("transformers",),
    taxonomy=("beyond/compression",),
    use="""
from headwise.papers.compress.lorap import lorap, text
from headwise.papers.embedded import embedded_model

small = lorap(embedded_model(), text(0), keep=0.7)
""",
)
def lorap(
    model: nn.Module,
    inputs: Inputs,
    keep: float = 0.7,
    parts: tuple[str, ...] = ("attention", "mlp"),
    weighting: str = "diagonal",
    query_key: float = QUERY_KEY_SHARE,
    spared: float = 0.01,
) -> nn.Module:
    """A smaller copy, with the share `keep` of the parameters of attention and feed-forward parts.

    query_key: share of attention's parameters for queries and keys; matrices whose part is too
    large for two factors to save anything stay whole, and the rest goes to the others. spared:
    share of channels, the least important ones, that are not pruned.
    """
    small = copy.deepcopy(model)
    look = view(small)
    if "mlp" in parts:
        prune_channels(small, pruned_channels(look, inputs, keep, spared))
    if "attention" in parts:
        ranks = attention_ranks(look, keep, query_key)
        factorise(small, inputs, rank=ranks, weighting=weighting)
    return small


def attention_ranks(look: ModelView, keep: float, query_key: float) -> dict[str, int]:
    """Name -> rank of the matrices that are factorised."""
    ranks: dict[str, int] = {}
    for layer in look.layers:
        inside = {n for n, m in matrices_of(look, "attention").items() if m in _of(layer)}
        sizes = {n: features_first(look.model.get_submodule(n)).shape for n in inside}
        qk = {n for n in inside if n.endswith(("q_proj", "k_proj"))}
        budget = keep * sum(s.numel() for s in sizes.values())
        for group, share in ((inside - qk, 1 - query_key), (qk, query_key)):
            whole = sum(sizes[n].numel() for n in group)
            mine = budget if group is qk else min(share * budget, whole)
            budget -= mine
            for name in group:
                part = mine * sizes[name].numel() / whole
                rank = int(part / sum(sizes[name]))
                if rank <= largest_rank(*sizes[name]):
                    ranks[name] = max(1, rank)
    return ranks


def _of(layer: LayerView) -> set[nn.Module]:
    return {m for a in layer.attentions for m in a.module.modules()}


def channel_importance(layer: LayerView, looked: dict[str, Tensor]) -> Tensor:
    """`(channels,)`: norm of |W| * ||X|| over a channel's rows of gate and up and its column of
    down. looked: root mean square `(in,)` of what each matrix reads, by its last name."""
    mlp: Any = layer.mlp
    square: Tensor = 0  # type: ignore[assignment]
    for name in ("gate_proj", "up_proj"):
        square = square + (getattr(mlp, name).weight.double() * looked[name]).square().sum(1)
    return (square + (mlp.down_proj.weight.double() * looked["down_proj"]).square().sum(0)).sqrt()


@torch.no_grad()
def pruned_channels(
    look: ModelView, inputs: Inputs, keep: float, spared: float
) -> dict[int, list[int]]:
    """Layer -> channels that go."""
    matrices = matrices_of(look, "mlp")
    moments = input_moments(look.model, matrices, read_examples(look.model, inputs))
    found = {}
    for layer in look.layers:
        mine = {n: m for n, m in matrices.items() if m in set(layer.module.modules())}
        sizes = {n.split(".")[-1]: moments[n].second().diagonal().sqrt() for n in mine}
        order = channel_importance(layer, sizes).argsort().tolist()
        count, safe = round((1 - keep) * len(order)), round(spared * len(order))
        found[layer.index] = sorted(order[safe : safe + count])
    return found


def by_plain_svd(model: nn.Module, inputs: Inputs, **more: Any) -> nn.Module:
    """The control: singular values of the weights themselves."""
    return lorap(model, inputs, weighting="none", **more)


def with_shares_exchanged(model: nn.Module, inputs: Inputs, **more: Any) -> nn.Module:
    """The control: queries and keys get what values and outputs should."""
    return lorap(model, inputs, query_key=1 - QUERY_KEY_SHARE, **more)


def random_channels(model: nn.Module, inputs: Inputs, **more: Any) -> nn.Module:
    """The control: a random choice of as many channels."""
    small = copy.deepcopy(model)
    random = torch.Generator().manual_seed(5)
    for index, gone in pruned_channels(view(small), inputs, more["keep"], 0.0).items():
        mlp: Any = view(small).layers[index].mlp
        drawn = torch.randperm(mlp.down_proj.in_features, generator=random)[: len(gone)]
        prune_channels(small, {index: drawn.tolist()})
    return small


def all_low_rank(model: nn.Module, inputs: Inputs, **more: Any) -> nn.Module:
    """The control: the feed-forward part is factorised like attention."""
    small = copy.deepcopy(model)
    factorise(small, inputs, keep=more["keep"], weighting="diagonal")
    return small


def sparing_none(model: nn.Module, inputs: Inputs, **more: Any) -> nn.Module:
    """The control: the least important channels go too."""
    return lorap(model, inputs, spared=0.0, **more)


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1, 2)


def text(seed: int, test: bool = False) -> Inputs:
    """16 windows of 128 tokens, others for tests than for calibration."""
    return {"input_ids": embedded_text(16, 128, 32 * seed + 16 * test)}


@torch.no_grad()
def price(small: nn.Module, model: nn.Module, seed: int) -> float:
    """KL(model || small) in nats on test text."""
    given = text(seed, True)
    now, clean = (logits_of(one(**given)) for one in (small, model))
    return float(metric_of("kl").score(now, given, clean).mean())


@cache
def _price(
    shrink: Shrink, seed: int, keep: float, parts: tuple[str, ...] = ("attention", "mlp")
) -> float:
    model = embedded_model()
    return price(shrink(model, text(seed), keep=keep, parts=parts), model, seed)


def in_other_units(model: nn.Module, seed: int) -> nn.Module:
    """The same function: the channels that attention reads, on scales that span 100 times."""
    same: Any = copy.deepcopy(model)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in same.model.layers:
            scale = 10 ** (2 * torch.rand(same.config.hidden_size, generator=random) - 1)
            layer.input_layernorm.weight.mul_(scale)
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, name).weight.div_(scale)
    return same


def weighted(weight: Tensor, x: Tensor, rank: int) -> Tensor:
    """W' of a rank for inputs x `(tokens, in)`, by the contribution's weighing."""
    up, down = spectrum(weight, x.T @ x / len(x), "diagonal").factors(weight, rank)
    return up @ down


def unweighted(weight: Tensor, x: Tensor, rank: int) -> Tensor:
    """The control: plain SVD."""
    up, down = spectrum(weight, None, "none").factors(weight, rank)
    return up @ down


@claim(control=unweighted, subject=weighted, unit="ratio of output errors", seeds=SEEDS)
def large_inputs_are_kept_first(fit: Callable[..., Tensor], seed: int) -> Measured:
    """Rank 16 of a random 64 x 64 matrix, inputs on scales that span 100 times: the weighted SVD
    has an output error at least 20 % below plain SVD."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 64, generator=random, dtype=torch.float64)
    x = torch.randn(256, 64, generator=random, dtype=torch.float64) * torch.logspace(-1, 1, 64)
    errors = [float((x @ (weight - one(weight, x, 16)).T).norm()) for one in (fit, unweighted)]
    return at_most(errors[0] / errors[1], 0.8)


@claim(control=by_plain_svd, unit="ratio of KL", seeds=SEEDS, quick=False)
def units_of_channels_do_not_matter(shrink: Shrink, seed: int) -> Measured:
    """With half of attention's parameters, a model whose channels were put on other scales (the
    same function) loses what the model loses, to 5 %; plain SVD loses far more."""
    same = in_other_units(embedded_model(), seed)
    small = shrink(same, text(seed), keep=0.5, parts=("attention",))
    usual = _price(shrink, seed, 0.5, ("attention",))
    return at_most(price(small, same, seed) / usual, 1.05, usual=usual)


@claim(control=with_shares_exchanged, unit="ratio of KL", seeds=SEEDS, quick=False)
def values_and_outputs_need_more(shrink: Shrink, seed: int) -> Measured:
    """With half of attention's parameters: KL at most half of what it is where queries and keys
    get the larger part. (An even split is as good in a model as small as this.)"""
    given = _price(shrink, seed, 0.5, ("attention",))
    return at_most(given / _price(with_shares_exchanged, seed, 0.5, ("attention",)), 0.5)


@claim(control=random_channels, unit="ratio of KL", seeds=SEEDS, quick=False)
def channels_are_ranked_without_gradients(shrink: Shrink, seed: int) -> Measured:
    """Half of the channels of feed-forward parts gone: KL at most 0.6 of that of random ones."""
    given = _price(shrink, seed, 0.5, ("mlp",))
    return at_most(given / _price(random_channels, seed, 0.5, ("mlp",)), 0.6, nats=given)


@claim(control=all_low_rank, unit="ratio of KL", seeds=SEEDS, quick=False)
def sublayers_deserve_different_treatment(shrink: Shrink, seed: int) -> Measured:
    """At 70 % of the parameters, KL at most 0.8 of that of a model that is low-rank throughout."""
    given = _price(shrink, seed, 0.7)
    return at_most(given / _price(all_low_rank, seed, 0.7), 0.8, nats=given)


@claim(
    control=sparing_none,
    unit="ratio of KL",
    seeds=SEEDS,
    quick=False,
    not_here="a hundredth of 384 channels is 4, and each has work to do in a model of 0.9 million "
    "parameters: the least important ones are least important here",
)
def the_least_important_hundredth_matters(shrink: Shrink, seed: int) -> Measured:
    """Half of the channels gone: keeping the least important 1 % lowers KL by 2 % or more."""
    given = _price(shrink, seed, 0.5, ("mlp",))
    return at_most(given / _price(sparing_none, seed, 0.5, ("mlp",)), 0.98)


@picture
def kl_by_share() -> Picture:
    """What predictions lose by the share of parameters that is kept."""
    shares = [0.5, 0.6, 0.7, 0.8, 0.9]
    ways: dict[str, Shrink] = {
        "LoRAP": lorap,
        "plain SVD (control)": by_plain_svd,
        "all low rank (control)": all_low_rank,
    }
    return Picture(
        title="What a smaller copy of the embedded model loses",
        x="share of layers' parameters kept",
        y="KL from the model, nats a token",
        lines={name: (shares, [_price(way, 0, s) for s in shares]) for name, way in ways.items()},
    )
