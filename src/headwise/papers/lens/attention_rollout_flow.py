"""What reached a token through all layers, not only where the last one looks.

After a few layers a position holds a mixture of the whole input, so where a late layer looks says
little of which input tokens it uses. Two ways to follow attention back to the inputs, from maps
alone: rollout multiplies the layers' maps, as if what is at a position moved along them in these
shares; flow takes them as pipes with capacities and asks how much could come through from each
input. Both count the residual connection as attention to oneself, half and half.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from headwise.instruments.attribution import attribute
from headwise.instruments.flow import flow
from headwise.instruments.kept_maps import keep
from headwise.instruments.metrics import Metric
from headwise.instruments.rollout import random_scores, raw_attention, rollout
from headwise.instruments.targets import LogitOf, ProbabilityOf
from headwise.models import ModelView, view
from headwise.models.backbones import Decoder
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture
from headwise.parts import Attention, Rotary
from headwise.tasks import Needle
from headwise.train import fit, seeded

Method = Callable[..., Tensor]


@paper(
    title="Quantifying Attention Flow in Transformers",
    source="arXiv 2005.00928",
    year=2020,
    modality="text",
    plain="Attention of all layers multiplied (rollout), or taken as capacities of a network "
    "(flow), says which input tokens reached a position.",
    equation=r"\tilde A_l = \tfrac12 \bar A_l + \tfrac12 I, \quad R = \tilde A_L \cdots \tilde A_1",
    parts=("Attention",),
    reported="Spearman correlation with blank-out scores, verb number prediction, last layer: raw "
    "attention near 0.3, rollout and flow above 0.5 to 0.7.",
    unsure="The paper's correlations are quoted from memory. The mixture for cross-attention (half "
    "stays, half goes to the encoder) is ours: the paper has self-attention only.",
    needs=("scipy",),
    taxonomy=("beyond/analysis",),
    use="""
from headwise.instruments import attribute
from headwise.papers.lens.attention_rollout_flow import trained

model, ids = trained(0), [4, 8, 4, 0, 2, 9, 5, 1, 3, 1, 11, 7, 5, 0, 5, 3, 12, 11]
print(attribute(model, ids, method="rollout").top(3))
print(attribute(model, ids, method="flow").top(3))
""",
)
def followed(view: ModelView, inputs: dict[str, Any], metric: Metric) -> dict[str, Tensor]:
    """Rollout and flow `(batch, n)` from the position that the answer is read from."""
    return {"rollout": rollout(view, inputs, metric), "flow": flow(view, inputs, metric)}


# -- what both are, by definitions that are counted out -------------------------------------------

SEEDS = (0, 1, 2)


def _small(seed: int, n: int, layers: int) -> tuple[nn.Module, dict[str, Tensor], list[Tensor]]:
    """A random model with sharp maps, ids, and its mixed maps."""
    with seeded(seed):
        model = Decoder(9, 8, layers, lambda layer: Attention(8, 2, causal=True)).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.7)
        ids = {"input_ids": torch.randint(0, 9, (1, n))}
    kept, _ = keep(view(model), ids, LogitOf(0))
    own = torch.eye(n, dtype=torch.float64)
    return model, ids, [0.5 * one.map.dense()[0].double().mean(0) + 0.5 * own for one in kept]


@claim(subject=rollout, control=raw_attention, unit="largest difference", seeds=SEEDS)
def rollout_sums_over_all_paths(method: Method, seed: int) -> Measured:
    """Row by row, without a matrix, it is the sum over all 64 paths through 3 layers of 4 tokens
    of the products of their weights."""
    model, ids, maps = _small(seed, 4, 3)
    right = torch.zeros(4, dtype=torch.float64)
    for third, second, first in product(range(4), repeat=3):
        right[first] += maps[2][3, third] * maps[1][third, second] * maps[0][second, first]
    found = method(view(model), ids, LogitOf(1))[0].double()
    return at_most((found - right).abs().max(), 1e-6, sum=found.sum())


@claim(subject=flow, control=rollout, unit="largest difference", seeds=SEEDS)
def flow_is_the_smallest_cut(method: Method, seed: int) -> Measured:
    """What can flow equals the smallest of all cuts, tried one by one (3 layers, 4 tokens)."""
    model, ids, maps = _small(seed, 4, 3)
    right = torch.tensor([_cut(maps, 3, sink) for sink in range(4)], dtype=torch.float64)
    found = method(view(model), ids, LogitOf(1))[0].double()
    return at_most((found - right).abs().max(), 1e-6)


def _cut(maps: list[Tensor], source: int, sink: int) -> float:
    """The smallest sum of capacities over sets of nodes that hold the source and not the sink."""
    n, layers = len(maps[0]), len(maps)
    sides = torch.tensor(list(product((0.0, 1.0), repeat=n)), dtype=torch.float64)
    # all ways to put one layer on either side, and the least that its cuts above have cost
    least = torch.where((sides == torch.eye(n)[source]).all(1), 0.0, torch.inf)
    for layer in reversed(range(layers)):
        cost = torch.einsum("ai,ij,bj->ab", sides, maps[layer], 1 - sides)
        least = (least[:, None] + cost).amin(0)
    # inputs other than the sink lead nowhere, and cost nothing on the source's side
    alone = 1 - torch.eye(n, dtype=torch.float64)[sink]
    return float(least[(sides == alone).all(1)].min())


@claim(subject=rollout, control=raw_attention, unit="share of 50 relays", seeds=SEEDS)
def a_relay_is_seen_through(method: Method, seed: int) -> Measured:
    """One head copies token a to place b, the next layer reads b: rollout without the residual
    ranks a first, the last layer's attention b."""
    random = torch.Generator().manual_seed(seed)
    hits = 0
    more = {"residual": 0.0} if method is rollout else {}
    for _ in range(50):
        source, relay = torch.randperm(7, generator=random)[:2].sort().values.tolist()
        found = method(view(_relay(source, relay)), {"input_ids": IDS}, LogitOf(0), **more)
        hits += int(found[0].argmax() == source)
    return at_least(hits / 50, 0.95)


IDS = torch.arange(8)[None]


@torch.no_grad()
def _relay(source: int, relay: int) -> Decoder:
    """Two layers over one-hot places: `relay` looks at `source`, then the last place at `relay`."""
    with seeded(0):
        model = Decoder(
            8, 16, 2, lambda layer: Attention(16, 1, causal=True), lambda layer: None, tied=False
        ).eval()
    look = view(model)
    assert look.embedding is not None
    look.embedding.copy_(torch.eye(16)[:8] - torch.eye(16)[8:])
    for attention, (query, key) in zip(look.attentions, ((relay, source), (7, relay)), strict=True):
        asks, answers = attention.query_weight()[0], attention.key_weight()[0]
        for weight, place in ((asks, query), (answers, key)):
            weight.zero_()
            weight[0, place] = 4.0
        attention.output_weight().mul_(0.1)
    return model


# -- what a trained model uses --------------------------------------------------------------------


def task() -> Needle:
    """Three keys with their values in 16 tokens, one of them asked."""
    return Needle(length=16, words=8, keys=4, needles=3)


@cache
def trained(seed: int) -> Decoder:
    """Two layers of attention alone, which answer all."""
    with seeded(seed):
        model = Decoder(
            task().vocabulary,
            32,
            2,
            lambda layer: Attention(32, 2, position=Rotary(), causal=True),
            lambda layer: None,
        )
    fit(model, task(), steps=800, size=64, rate=3e-3, seed=seed, target=0.02)
    return model.eval()


@cache
def questions(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids `(64, 18)`, the answers, and what blanking each token out changes `(64, 17)`: the mean
    change of the answer's probability over all tokens that may stand there instead."""
    batch = task().batch(0, 64, "test")
    ids, answers = batch.inputs["input_ids"][:, :18], batch.targets[:, 17]
    model, metric = trained(seed), ProbabilityOf(answers)
    changed = torch.zeros(64, 17)
    for place, token in product(range(17), range(task().vocabulary)):
        other = ids.clone()
        other[:, place] = token
        with torch.no_grad():
            changed[:, place] += metric.score(model(other), {})
    with torch.no_grad():
        before = metric.score(model(ids), {})[:, None]
    return ids, answers, (before - changed / task().vocabulary).abs()


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of rows `(batch, n)`, without ties, `(batch,)`."""
    ranks = torch.stack([x.double().argsort(-1).argsort(-1).double() for x in (a, b)])
    ranks = ranks - ranks.mean(-1, keepdim=True)
    return (ranks[0] * ranks[1]).sum(-1) / (ranks[0].norm(dim=-1) * ranks[1].norm(dim=-1))


def _agreement(method: Method, seed: int) -> Measured:
    ids, answers, blanked = questions(seed)
    found = attribute(trained(seed), ids, answers, method).scores
    others = attribute(trained(seed), ids, answers, random_scores).scores
    rows = [spearman(torch.as_tensor(one)[:, :17], blanked).mean() for one in (found, others)]
    return at_least(rows[0], 0.22, random=rows[1])


@claim(subject=rollout, control=raw_attention, unit="Spearman's rho", seeds=SEEDS, quick=False)
def rollout_agrees_with_blanking_out(method: Method, seed: int) -> Measured:
    """In a trained model, rollout ranks tokens as blanking them out does, better than where the
    last layer looks (control). The bound lies between what both measured here; the order is the
    paper's."""
    return _agreement(method, seed)


@claim(subject=flow, control=raw_attention, unit="Spearman's rho", seeds=SEEDS, quick=False)
def flow_agrees_with_blanking_out(method: Method, seed: int) -> Measured:
    """The same of flow."""
    return _agreement(method, seed)


@picture
def one_question() -> Picture:
    """What each method says of one question, beside what blanking out does."""
    ids, answers, blanked = questions(0)
    methods = {"last layer": raw_attention, "rollout": rollout, "flow": flow}
    lines = {
        name: attribute(trained(0), ids[:1], answers[:1], method).scores[0][:17]
        for name, method in methods.items()
    }
    lines["blank-out"] = blanked[0].numpy()
    return Picture(
        title="Relevance of the tokens of one question (largest: 1)",
        x="position",
        y="relevance",
        lines={name: (list(range(17)), (row / row.max()).tolist()) for name, row in lines.items()},
    )
