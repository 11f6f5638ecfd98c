"""Direct logit attribution: what each part writes straight into an answer, with nothing between.

Elhage et al. 2021, A Mathematical Framework for Transformer Circuits ("direct path", "residual
stream as a sum"): the last residual is the embedding plus all that attentions and MLPs have added.
With the statistics of the final norm held at what they are, the logit is linear in it, and falls
into a sum over the embedding, every head, every attention's bias, every MLP, and the biases at the
end. Paths through other parts are in the parts that they end in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.instruments.atlas import Atlas
from headwise.instruments.columns import Column
from headwise.instruments.examples import digests, model_view, read_examples
from headwise.instruments.frozen_norms import Frozen, frozen, linear_answer
from headwise.instruments.provenance import model_name, versions
from headwise.instruments.readout import Readout, output_stack
from headwise.instruments.run import evaluating
from headwise.instruments.targets import read_target
from headwise.models import AttentionView, LayerView, ModelView, UnsupportedModelError
from headwise.models.sites import Site, recording, sites_of

__all__ = ["DirectEffects", "direct_effects"]


@dataclass(eq=False, repr=False)
class DirectEffects:
    """Contributions in logits; `score` is their sum over everything in an example.

    score, embedding, final `(examples,)`: final are biases of the last norm and of the head.
    heads `(examples, n_heads)`, bias, mlps `(examples, layers)`: bias is what an attention adds
    that is no head's. attentions: the heads, in order. target: what was explained, in words.
    """

    score: np.ndarray
    embedding: np.ndarray
    heads: np.ndarray
    bias: np.ndarray
    mlps: np.ndarray
    final: np.ndarray
    places: list[tuple[str, str, int, int]]
    target: str
    provenance: dict[str, Any]

    @property
    def total(self) -> np.ndarray:
        """The sum of all contributions `(examples,)`."""
        parts = self.heads.sum(1) + self.bias.sum(1) + self.mlps.sum(1)
        return np.asarray(self.embedding + parts + self.final)

    def atlas(self) -> Atlas:
        """Means over examples, with standard errors: heads' `direct_effect`, and by layer
        `direct_attention` (its heads and bias) and `direct_mlp`."""
        stack, attention, layer, head = (np.array(c) for c in zip(*self.places, strict=True))
        count, layers = len(self.score), self.mlps.shape[1]
        heads: dict[str, np.ndarray] = {"layer": layer, "head": head}
        if len(set(stack)) > 1 or len(set(attention)) > 1:
            heads |= {"stack": stack, "attention": attention}
        by_layer = np.stack([self.heads[:, layer == n].sum(1) for n in range(layers)], 1)
        error = self.heads.std(0, ddof=1) / np.sqrt(count) if count > 1 else None
        return Atlas(
            heads=heads | {"direct_effect": self.heads.mean(0)},
            layers={
                "layer": np.arange(layers),
                "direct_attention": (by_layer + self.bias).mean(0),
                "direct_mlp": self.mlps.mean(0),
            },
            columns=dict(_COLUMNS),
            spread={} if error is None else {"direct_effect": error},
            provenance=self.provenance | {"target": self.target},
        )

    def __repr__(self) -> str:
        order = np.argsort(-np.abs(self.heads.mean(0)))[:5]
        best = ", ".join(
            f"L{self.places[i][2]}H{self.places[i][3]} {self.heads[:, i].mean():+.2f}"
            for i in order
        )
        return (
            f"{self.target}: {self.score.mean():.2f} over {len(self.score)} examples = embedding "
            f"{self.embedding.mean():+.2f}, heads {self.heads.sum(1).mean():+.2f}, biases of "
            f"attentions {self.bias.sum(1).mean():+.2f}, MLPs {self.mlps.sum(1).mean():+.2f}, "
            f"final biases {self.final.mean():+.2f}\nlargest heads: {best}"
        )


_SOURCE = "Elhage et al. 2021, A Mathematical Framework for Transformer Circuits"
_COLUMNS = {
    column.name: column
    for column in (
        Column(
            "direct_effect",
            "logits",
            "What the head writes straight into the answer, the final norm's size held fixed.",
            _SOURCE,
        ),
        Column(
            "direct_attention",
            "logits",
            "What the layer's attention, its bias included, writes straight into the answer.",
            _SOURCE,
        ),
        Column(
            "direct_mlp", "logits", "What the layer's MLP writes straight into the answer.", _SOURCE
        ),
    )
}


def direct_effects(
    model: nn.Module | ModelView,
    inputs: Any,
    target: Any = None,
    *,
    tokenizer: Any | None = None,
    processor: Any | None = None,
    tokens: int | None = None,
    windows: int | None = 1,
    batch_size: int = 8,
) -> DirectEffects:
    """Take an answer apart into what every part writes straight into it.

    target: as for `attribute`: None (the predicted token or class), an id or `(examples,)` (the
    logit at the last position, or `LogitOf(ids, at)` elsewhere), `LogitDifference(right, wrong,
    at)`, or a function of (logits, inputs) that is linear in the logits. Of a model whose logits
    are capped (Gemma 2) it is the logit before the cap, and `target` says so.

    Sums to the answer within rounding, which is checked for every layer. Raises
    UnsupportedModelError, naming the layer, where what attention and MLP add does not make up what
    the residual changes by (norms after adding, gates), or where the head is not linear;
    ValueError for a target that is not linear in the logits.
    """
    view = model_view(model)
    batches = read_examples(view.model, inputs, tokenizer, processor, tokens, windows, batch_size)
    asked = read_target(target, batches[-1].rows.stop)
    rows: list[dict[str, Tensor]] = []
    capped = None
    with evaluating(view.model):
        for batch in batches:
            metric = asked.of(view, batch.inputs, batch.rows)
            found, capped = _take_apart(view, batch.inputs, metric)
            rows.append(found)
    joined = {name: torch.cat([row[name] for row in rows]).cpu().numpy() for name in rows[0]}
    speaks = [a for a in view.attentions if a.stack == output_stack(view)]
    return DirectEffects(
        **joined,
        places=[(a.stack, a.kind, a.layer, h) for a in speaks for h in range(a.heads)],
        target=asked.words + ("" if capped is None else f", before the soft cap of {capped:g}"),
        provenance={
            "model": model_name(view.model),
            "inputs": digests(batches),
            "versions": versions(),
        },
    )


def _take_apart(
    view: ModelView, inputs: dict[str, Tensor], metric: Any
) -> tuple[dict[str, Tensor], float | None]:
    stack = output_stack(view)
    layers = [layer for layer in view.layers if layer.stack == stack]
    named = stack if len(view.stacks) > 1 else None
    kinds = ("attention", "heads", "mlp")
    sites = [s for kind in kinds for s in sites_of(view, kind) if s.stack == named]
    with recording(view, sites) as seen:
        read = Readout(view, inputs)
        parts = dict(seen)
    answer = linear_answer(read, metric)
    heads, bias, mlps = [], [], []
    for number, layer in enumerate(layers):
        update = read.residuals[number + 1] - read.residuals[number]
        index = layer.index
        added = {a: parts[Site("attention", index, named, a.kind)] for a in layer.attentions}
        feed = parts.get(Site("mlp", index, named))
        factor = _factor(layer, update, [*added.values(), *([] if feed is None else [feed])])
        counts = factor * answer.direction  # (batch, n, width)
        rest = torch.zeros(len(update), dtype=torch.float64, device=update.device)
        for attention, whole in added.items():
            outputs = parts[Site("heads", index, named, attention.kind)]
            mine = _by_head(layer, attention, outputs, whole, counts)
            heads.append(mine)
            rest = rest + _dot(whole, counts) - mine.sum(1)
        bias.append(rest)
        mlps.append(_dot(feed, counts) if feed is not None else torch.zeros_like(rest))
    first = read.residuals[0]
    return {
        "score": answer.score,
        "embedding": _dot(first, answer.direction),
        "heads": torch.cat(heads, 1) if heads else first.new_zeros(len(first), 0).double(),
        "bias": torch.stack(bias, 1),
        "mlps": torch.stack(mlps, 1),
        "final": answer.constant,
    }, answer.capped


def _factor(layer: LayerView, update: Tensor, parts: list[Tensor]) -> Tensor:
    """The one factor between what the parts give and what the residual changes by."""
    name = f"layer {layer.index} ({type(layer.module).__name__})"
    if not parts:
        raise UnsupportedModelError(f"{name}: what its parts add to the residual is not known")
    total = torch.stack([part.double() for part in parts]).sum(0)
    change = update.double()
    factor = (change * total).sum() / total.pow(2).sum().clamp_min(1e-300)
    factor = factor.round() if abs(float(factor) - 1) < 1e-4 else factor
    off = (change - factor * total).abs().amax()
    if float(off) > 1e-3 * float(change.abs().amax()) + 1e-5 * float(total.abs().amax()):
        raise UnsupportedModelError(
            f"{name}: attention and MLP do not add up to what the residual changes by (off by "
            f"{float(off):.2g} of {float(change.abs().amax()):.2g}): something else stands between "
            "(a norm after adding, a gate), and their direct effects are not defined"
        )
    return factor


def _by_head(
    layer: LayerView, attention: AttentionView, outputs: Tensor, added: Tensor, counts: Tensor
) -> Tensor:
    """`(batch, heads)` float64; a norm or scale behind the attention stays as it is now."""
    weight = attention.output_weight().detach().double()
    before = torch.einsum("bnhd,hwd->bnw", outputs.double(), weight)
    bias = attention.output_bias()
    whole = before if bias is None else before + bias.detach().double()
    through = _behind(layer, attention, whole, added)
    return torch.einsum("bnhd,hwd,bnw->bh", outputs.double(), weight, through.back(counts))


def _behind(layer: LayerView, attention: AttentionView, whole: Tensor, added: Tensor) -> Frozen:
    norm: nn.Module | None = None
    if len(layer.attention_ends) == 1 and not isinstance(attention.projections, str):
        (end,) = layer.attention_ends
        norm = None if end in (attention.module, attention.projections.output) else end
    return frozen(norm, whole, added, f"behind {attention.name}")


def _dot(part: Tensor, counts: Tensor) -> Tensor:
    return (part.double() * counts).sum((1, 2))
