"""Two models become one: their neurons are matched by optimal transport, then averaged.

Two networks that learned the same thing have its neurons in different places, so that the mean of
their weights is neither. A transport plan between the neurons of a layer, by how far apart they
are, says which of the one belong to which of the other. A transformer asks for rules: all that is
added to the residual stream needs one common plan for its channels, and norms are aligned as
diagonals by it; what queries and keys are turned by has to cancel in their product, so they share a
plan; the plan of the values goes on into the output projection; heads are matched as wholes.
Plans may be hard (a matching) or soft (Sinkhorn), and between widths that differ.

Here the two are small language models. Residual channels are compared by activations on the same
text, the neurons inside of layers by their weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from headwise.models import Site, recording, view
from headwise.models.backbones import Decoder
from headwise.papers import Measured, at_most, claim, paper
from headwise.parts import Attention
from headwise.parts.feed.mlp import Mlp
from headwise.tasks import PythonManual
from headwise.train import evaluate, fit, seeded

Fuse = Callable[[Decoder, Decoder, Tensor], Decoder]


@paper(
    title="Transformer Fusion with Optimal Transport",
    source="arXiv 2310.05719",
    year=2023,
    modality="any",
    plain="Neurons of two transformers are matched by optimal transport, then averaged.",
    equation=r"W_A' = \mathrm{diag}(1/\nu) \, T_{out}^{\top} \, W_A \, T_{in} \, "
    r"\mathrm{diag}(1/\mu), \quad W = \tfrac{1}{2} (W_A' + W_B)",
    parts=("Attention", "Mlp"),
    reported="Fused without training far better than plain averages, after short training better "
    "than either parent (ViT on CIFAR, BERT).",
    unsure="Costs of residual channels are averaged over all layers (one of the paper's policies); "
    "matching heads by their value-output maps is ours.",
    needs=("scipy",),
    taxonomy=("beyond/compression",),
    use="""
from headwise.papers.compress.transformer_otfusion import otfusion, text, trained

fused = otfusion(trained(0), trained(1), text())
""",
)
def otfusion(one: Decoder, other: Decoder, inputs: Tensor, blur: float | None = None) -> Decoder:
    """A model of the shapes of `other`: the mean of both, `one` aligned to it. inputs: token ids
    `(batch, n)`. blur: None, plans are matchings (as far as widths allow); else Sinkhorn's
    regularisation, in units of the mean cost."""
    fused = copy.deepcopy(aligned(one, other, inputs, blur))
    with torch.no_grad():
        for mine, theirs in zip(fused.parameters(), other.parameters(), strict=True):
            mine.copy_((mine + theirs) / 2)
    return fused


def transport(cost: Tensor, blur: float | None = None, rounds: int = 2000) -> Tensor:
    """A plan `(n, m)` between even masses, times m: columns sum to 1. Exact where blur is None
    (a matching for n = m, else scipy's linear program)."""
    n, m = cost.shape
    if blur is not None:
        return sinkhorn(cost, blur, rounds) * m
    from scipy.optimize import linear_sum_assignment

    # equal masses in units of 1 / lcm are matched one to one
    times = torch.lcm(torch.tensor(n), torch.tensor(m)).item()
    a, b = int(times // n), int(times // m)
    rows, columns = linear_sum_assignment(
        cost.repeat_interleave(a, 0).repeat_interleave(b, 1).double().numpy()
    )
    plan = torch.zeros(n, m, dtype=cost.dtype)
    index = (torch.as_tensor(rows) // a, torch.as_tensor(columns) // b)
    return plan.index_put(index, torch.tensor(1 / b, dtype=cost.dtype), accumulate=True)


def sinkhorn(cost: Tensor, blur: float, rounds: int = 2000) -> Tensor:
    """The plan `(n, m)` of even masses 1/n and 1/m that minimises cost and blur * entropy (Cuturi
    2013, arXiv 1306.0895), in logarithms."""
    n, m = cost.shape
    log_kernel = -cost.double() / (blur * cost.double().mean().clamp_min(1e-30))
    f, g = log_kernel.new_zeros(n), log_kernel.new_zeros(m)
    for _ in range(rounds):
        f = -torch.tensor(float(n)).log() - torch.logsumexp(log_kernel + g, 1)
        g = -torch.tensor(float(m)).log() - torch.logsumexp(log_kernel + f[:, None], 0)
    return (log_kernel + f[:, None] + g).exp().to(cost.dtype)


@torch.no_grad()
def aligned(one: Decoder, other: Decoder, inputs: Tensor, blur: float | None = None) -> Decoder:
    """`one` in the shapes of `other`, its neurons where those of `other` that they match are."""
    moved: Any = copy.deepcopy(other)
    a: Any = one
    b: Any = other
    flow = transport(_far(_residuals(one, inputs), _residuals(other, inputs)), blur)
    moved.embed.weight.copy_(a.embed.weight @ flow)
    norms = [(moved.stack.wiring.last, a.stack.wiring.last)]
    for place in a.stack.wiring.norms:
        norms += zip(moved.stack.wiring.norms[place], a.stack.wiring.norms[place], strict=True)
    for new, old in norms:
        new.weight.copy_(old.weight @ flow)
        new.bias.copy_(old.bias @ flow)
    for layer in range(a.stack.depth):
        _feed(moved.stack.feeds[layer], a.stack.feeds[layer], b.stack.feeds[layer], flow, blur)
        views = [view(m).attentions[layer] for m in (moved, one, other)]
        _heads(views, flow, blur)
    done: Decoder = moved
    return done


def _feed(new: Any, old: Any, goal: Any, flow: Tensor, blur: float | None) -> None:
    """flow turns residual channels of the one into those of the other."""
    up, down = old.up.weight @ flow, flow.T @ old.down.weight
    mine = torch.cat([up, old.up.bias[:, None], down.T], 1)
    theirs = torch.cat([goal.up.weight, goal.up.bias[:, None], goal.down.weight.T], 1)
    plan = transport(_far(mine.T, theirs.T), blur)
    new.up.weight.copy_(plan.T @ up)
    new.up.bias.copy_(plan.T @ old.up.bias)
    # of several neurons that became one, what each gave is summed up again
    new.down.weight.copy_(down @ plan * (len(up) / len(goal.up.weight)))
    new.down.bias.copy_(flow.T @ old.down.bias)


def _heads(views: list[Any], flow: Tensor, blur: float | None) -> None:
    """Heads are matched by their value-output maps; inside of a pair, query and key share a plan,
    and value and output another."""
    new, old, goal = views
    query, key, value = (w() @ flow for w in (old.query_weight, old.key_weight, old.value_weight))
    output = flow.T @ old.output_weight()
    maps = [
        (o @ v).flatten(1)
        for o, v in ((output, value), (goal.output_weight(), goal.value_weight()))
    ]
    heads = transport(_far(maps[0].T, maps[1].T)).argmax(0).tolist()
    for head, mine in enumerate(heads):
        sides = (query[mine], key[mine]), (goal.query_weight()[head], goal.key_weight()[head])
        turn = transport(_far(torch.cat(sides[0], 1).T, torch.cat(sides[1], 1).T), blur)
        new.query_weight()[head] = turn.T @ query[mine]
        new.key_weight()[head] = turn.T @ key[mine]
        goals = torch.cat([goal.value_weight()[head], goal.output_weight()[head].T], 1)
        plan = transport(_far(torch.cat([value[mine], output[mine].T], 1).T, goals.T), blur)
        new.value_weight()[head] = plan.T @ value[mine]
        new.output_weight()[head] = output[mine] @ plan
    bias = old.output_bias()
    if bias is not None:
        new.output_bias().copy_(bias @ flow)


def _far(mine: Tensor, theirs: Tensor) -> Tensor:
    """`(n, m)` squared distances between columns of `(features, n)` and `(features, m)`."""
    return torch.cdist(mine.T.double(), theirs.T.double()).square().to(mine.dtype)


def _residuals(model: Decoder, inputs: Tensor) -> Tensor:
    """`(tokens * places, width)`: what passes on the residual stream, each place in units of its
    own size."""
    depth = len(view(model).layers)
    with recording(view(model), [Site("residual", n) for n in range(depth + 1)]) as kept:
        model(inputs)
    return torch.cat([x.flatten(0, 1) / x.square().mean().sqrt() for x in kept.values()])


def vanilla(one: Decoder, other: Decoder, inputs: Tensor) -> Decoder:
    """The control: the mean of the weights as they stand."""
    fused = copy.deepcopy(other)
    with torch.no_grad():
        for mine, theirs in zip(fused.parameters(), one.parameters(), strict=True):
            mine.copy_((mine + theirs) / 2)
    return fused


def one_round(cost: Tensor, blur: float) -> Tensor:
    """The control: a single round of scaling."""
    return sinkhorn(cost, blur, 1)


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1, 2)
WIDTH, HEADS = 32, 4


def task() -> PythonManual:
    return PythonManual(48)


def text() -> Tensor:
    """8 texts that were not trained on."""
    return task().batch(0, 8, "valid").inputs["input_ids"]


@cache
def trained(seed: int, hidden: int = 64) -> Decoder:
    """Two layers, 120 steps."""
    with seeded(seed):
        model = Decoder(
            task().vocabulary,
            WIDTH,
            2,
            lambda layer: Attention(WIDTH, HEADS, causal=True),
            lambda layer: Mlp(WIDTH, hidden),
        )
    fit(model, task(), steps=120, size=12, rate=5e-3, seed=seed)
    return model.eval()


@torch.no_grad()
def shuffled(model: Decoder, seed: int) -> Decoder:
    """The same function: neurons, and channels of values within heads, in other places."""
    same: Any = copy.deepcopy(model)
    random = torch.Generator().manual_seed(seed)
    for attention in view(same).attentions:
        for head in range(HEADS):
            order = torch.randperm(WIDTH // HEADS, generator=random)
            attention.value_weight()[head] = attention.value_weight()[head][order]
            attention.output_weight()[head] = attention.output_weight()[head][:, order]
    for feed in same.stack.feeds:
        order = torch.randperm(len(feed.up.weight), generator=random)
        feed.up.weight.copy_(feed.up.weight[order])
        feed.up.bias.copy_(feed.up.bias[order])
        feed.down.weight.copy_(feed.down.weight[:, order])
    done: Decoder = same
    return done


def loss(model: Decoder) -> float:
    return evaluate(model, task(), 4, 32)["loss"]


@claim(control=vanilla, unit="largest difference of logits", seeds=SEEDS)
def a_shuffled_copy_is_put_in_order(fuse: Fuse, seed: int) -> Measured:
    """A model fused with a copy whose neurons and value channels were permuted is that model, to
    1e-3."""
    model = trained(0)
    fused = fuse(shuffled(model, seed), model, text())
    with torch.no_grad():
        return at_most(float((fused(text()) - model(text())).abs().max()), 1e-3)


@claim(control=vanilla, unit="nats above the plain mean", seeds=SEEDS, quick=False)
def independent_models_fuse_better_than_their_mean(fuse: Fuse, seed: int) -> Measured:
    """Two models trained from different seeds: the loss of the fused one is 0.05 nats or more below
    that of the plain mean of their weights."""
    one, other = trained(seed), trained(seed + 1)
    plain, parent = loss(vanilla(one, other, text())), loss(other)
    fused = loss(fuse(one, other, text()))
    return at_most(fused - plain, -0.05, fused=fused, mean=plain, parent=parent)


@claim(control=one_round, subject=sinkhorn, unit="largest difference", seeds=SEEDS)
def plans_keep_their_masses(plan: Callable[[Tensor, float], Tensor], seed: int) -> Measured:
    """Rows of a 12 x 20 plan sum to 1/12 and columns to 1/20, to 1e-6."""
    cost = torch.rand(12, 20, generator=torch.Generator().manual_seed(seed)).double()
    found = plan(cost, 0.1)
    apart = torch.cat([found.sum(1) - 1 / 12, found.sum(0) - 1 / 20])
    return at_most(float(apart.abs().max()), 1e-6)
