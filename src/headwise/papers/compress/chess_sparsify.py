"""Neurons of a gated layer that are skipped by thresholds of their own.

A gated feed-forward layer adds act(gate)_i * up_i along a direction of its own for every neuron i.
Where the gate is near zero the neuron can be skipped, and its rows of the other two matrices are
not read. One threshold for all gates of a layer (CATS) asks whether the gate is small; CHESS asks
whether what the neuron adds will be small, and expects |up_i| to be about its mean over
calibration text: importance |gate_i| E|up_i|, one quantile of it for the layer, and so a threshold
for every neuron. In attention, inputs are thresholded too, but only of the query and output
projections: keys and values are read again by every later token, so errors there stay.

The room's `threshold_activations` measures the thresholds and puts in layers that skip for real.
What is here besides are the thresholds on inputs of attention.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headwise.compress.bits.thresholded import Thresholded
from headwise.compress.bits.thresholds import threshold_activations
from headwise.instruments.metrics import metric_of
from headwise.models import view
from headwise.models.backbones import Decoder
from headwise.models.default import default_model_path, default_text
from headwise.models.prefix import logits_of
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture, within
from headwise.parts import Attention
from headwise.parts.feed.gated import Gated

Inputs = dict[str, Tensor]
Sparsify = Callable[[nn.Module, Inputs, float], Any]


@paper(
    title="CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective "
    "Sparsification",
    source="arXiv 2409.01366",
    year=2024,
    modality="text",
    plain="Neurons whose gate is below a threshold of their own are skipped in decoding.",
    equation=r"\tilde{g}_i = g_i \, [\, |g_i| > t_i \,], \quad "
    r"t_i = \frac{Q_s(|g_j| \, \mathbb{E}|u_j|)}{\mathbb{E}|u_i|}",
    parts=("Thresholded",),
    reported="Up to 1.27 times as fast as the dense model, and less loss on 8 tasks than one "
    "threshold a layer.",
    unsure="Which projections of attention have their inputs thresholded: query and output here.",
    needs=("transformers",),
    taxonomy=("beyond/compression",),
    use="""
from headwise.papers.compress.chess_sparsify import by_channel, default_model, text

by_channel(default_model(), text(0, 4), 0.7)  # 70 % of neurons are skipped, token by token
""",
)
def by_channel(model: nn.Module, given: Inputs, sparsity: float) -> None:
    """Thresholds of every neuron's own, from calibration inputs; in place."""
    threshold_activations(model, given, sparsity, by="channel")


def by_tensor(model: nn.Module, given: Inputs, sparsity: float) -> None:
    """The control (CATS, arXiv 2404.08763): one threshold for all gates of a layer."""
    threshold_activations(model, given, sparsity, by="tensor")


def by_first_layer(model: nn.Module, given: Inputs, sparsity: float) -> None:
    """The control: all layers have the thresholds of the first."""
    threshold_activations(model, given, sparsity, by="tensor")
    layers = [m for m in model.modules() if isinstance(m, Thresholded)]
    for layer in layers:
        layer.thresholds.copy_(layers[0].thresholds)


def without_skipping(model: nn.Module, given: Inputs, sparsity: float) -> None:
    """The control: the same zeros, but all rows are read and multiplied."""
    by_channel(model, given, sparsity)
    for layer in model.modules():
        if isinstance(layer, Thresholded):
            layer.training = True


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1, 2)
LENGTH = 128


def default_model() -> nn.Module:
    """The embedded model."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(default_model_path())
    return model.eval()


@cache
def _tokens() -> Tensor:
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(default_model_path())
    ids = words(default_text(60_000)[0], return_tensors="pt")["input_ids"][0]
    return torch.as_tensor(ids)


def text(seed: int, count: int = 8, other: bool = False) -> Inputs:
    """Windows of held-out text; `other`: none of those that calibration has."""
    windows = _tokens().unfold(0, LENGTH, LENGTH)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    chosen = order[-count:] if other else order[:count]
    return {"input_ids": windows[chosen].clone()}


def loss(model: nn.Module, given: Inputs) -> float:
    with torch.no_grad():
        found = metric_of("loss").score(logits_of(model(**given)), given)
    return float(found.mean())


@claim(control=by_tensor, unit="rise of the loss over that of one threshold a layer", seeds=SEEDS)
def own_thresholds_lose_less(sparsify: Sparsify, seed: int) -> Measured:
    """On held-out text with 70 % of neurons skipped, the embedded model's loss rises by at most 0.9
    of what it rises with one threshold a layer."""
    plain, rises = default_model(), {}
    for name, method in (("it", sparsify), ("tensor", by_tensor)):
        model = copy.deepcopy(plain)
        method(model, text(seed), 0.7)
        rises[name] = loss(model, text(seed, 16, True)) - loss(plain, text(seed, 16, True))
    return at_most(rises["it"] / rises["tensor"], 0.9, **{f"rise_{k}": v for k, v in rises.items()})


@claim(control=by_tensor, unit="error over that of one threshold a layer", seeds=SEEDS)
def more_so_where_ups_differ(sparsify: Sparsify, seed: int) -> Measured:
    """With log-normal sizes of up the error of a random layer's output is at most 0.8 of that of
    one threshold."""
    random = torch.Generator().manual_seed(seed)

    def error(method: Sparsify) -> float:
        torch.manual_seed(seed)
        model = Decoder(
            60,
            32,
            1,
            lambda layer: Attention(32, 4, causal=True),
            feed=lambda layer: Gated(32, 256),
        ).eval()
        feed = next(m for m in model.modules() if isinstance(m, Gated))
        with torch.no_grad():
            sizes = torch.randn(256, generator=random.manual_seed(seed)).exp()
            feed.up.weight.mul_(sizes[:, None])
        given = {"input_ids": torch.randint(60, (4, 64), generator=random)}
        x = torch.randn(500, 32, generator=random)
        with torch.no_grad():
            want = feed(x)
            method(model, given, 0.7)
            made = next(m for m in model.modules() if isinstance(m, Thresholded))
            return float((made(x) - want).norm() / want.norm())

    return at_most(error(sparsify) / error(by_tensor), 0.8)


@claim(control=by_first_layer, unit="share of neurons", seeds=SEEDS)
def as_sparse_as_asked(sparsify: Sparsify, seed: int) -> Measured:
    """On text that was not calibrated on, the layer that is furthest off skips within 3 points of
    the share that was asked for; the first layer's thresholds do not serve the others."""
    model = default_model()
    sparsify(model, text(seed), 0.7)
    layers = [m for m in model.modules() if isinstance(m, Thresholded)]
    shares: list[float] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        shares.append(float((args[0] == 0).float().mean()))

    handles = [layer.down.register_forward_hook(note) for layer in layers]
    loss(model, text(seed, 16, True))
    for handle in handles:
        handle.remove()
    return within(max(shares, key=lambda share: abs(share - 0.7)), 0.7, 0.03)


@claim(control=without_skipping, unit="share of decoded tokens", seeds=SEEDS)
def skipped_rows_are_not_read(sparsify: Sparsify, seed: int) -> Measured:
    """Decoding one token, the rows of up and down that belong to skipped neurons can hold anything
    (here: what is not a number) and the answer is the same."""
    model = default_model()
    sparsify(model, text(seed), 0.7)
    layer = next(m for m in model.modules() if isinstance(m, Thresholded))
    width = layer.down.nf
    right = 0
    for x in torch.randn(20, 1, 1, width):
        broken = copy.deepcopy(layer)
        with torch.no_grad():
            gate = broken.activation(broken.gate(x)).flatten()
            off = gate.abs() <= broken.thresholds
            broken.down.weight[off] = torch.nan
            assert isinstance(broken.up, nn.Linear)
            broken.up.weight[off] = torch.nan
            right += int(torch.allclose(broken(x), layer(x), atol=1e-5))
    return at_least(right / 20, 1.0)


@claim(
    subject=("query", "output"),
    control=("query", "key", "value", "output"),
    unit="nats",
    seeds=SEEDS,
)
def keys_and_values_stay_dense(which: tuple[str, ...], seed: int) -> Measured:
    """With the smallest half of the inputs of the query and output projections set to zero, the
    loss rises by at most 0.75 of what it rises when keys and values are made from such inputs as
    well (selective sparsification)."""
    model, given = default_model(), text(seed, 16, True)
    dense = loss(model, given)
    rises = [
        loss_with_sparse_inputs(model, text(seed), given, some, 0.5) - dense
        for some in (which, ("query", "key", "value", "output"))
    ]
    return at_most(rises[0] / rises[1], 0.75, rise=rises[0], rise_all=rises[1])


def loss_with_sparse_inputs(
    model: nn.Module, calibration: Inputs, given: Inputs, which: tuple[str, ...], sparsity: float
) -> float:
    """Loss on `given` while inputs below a threshold (a quantile of calibration inputs, for each
    projection) are zero."""
    modules: list[nn.Module] = []
    for attention in view(model).attentions:
        found = attention.projections
        assert not isinstance(found, str)
        parts = {part: getattr(found, part) for part in ("query", "key", "value")}
        known = {name: part.module for name, part in parts.items()} | {"output": found.output}
        modules += [known[name] for name in which]
    seen: dict[nn.Module, Tensor] = {}
    handles = [
        m.register_forward_pre_hook(lambda module, args: seen.update({module: args[0].abs()}))
        for m in modules
    ]
    loss(model, calibration)
    for handle in handles:
        handle.remove()
    limits = {m: x.flatten().sort().values[int(sparsity * x.numel())] for m, x in seen.items()}
    handles = [
        m.register_forward_pre_hook(
            lambda module, args: (torch.where(args[0].abs() > limits[module], args[0], 0),)
        )
        for m in modules
    ]
    try:
        return loss(model, given)
    finally:
        for handle in handles:
            handle.remove()


@picture
def loss_by_sparsity() -> Picture:
    """Rise of the loss as more neurons are skipped."""
    plain, given = default_model(), text(0, 8, True)
    shares = [0.3, 0.5, 0.7, 0.8, 0.9]
    lines = {}
    for name, method in (
        ("channel by channel (CHESS)", by_channel),
        ("one a layer (control)", by_tensor),
    ):
        rises = []
        for share in shares:
            model = copy.deepcopy(plain)
            method(model, text(0), share)
            rises.append(loss(model, given) - loss(plain, given))
        lines[name] = (shares, rises)
    return Picture(
        title="What it costs to skip neurons, by how their thresholds are set",
        x="share of neurons skipped",
        y="rise of the loss, nats",
        lines=lines,
    )
