"""The tuned lens: each layer's residual, translated into the last layer's terms, then read out.

Belrose et al. 2023, arXiv 2303.08112, section 2: an affine map per layer, (I + A_l) h + b_l, fitted
so that what is read out comes close to the model's own answer, by KL(final || translated), on any
text: no labels are needed. It starts as the logit lens (A = 0, b = 0).
"""

from __future__ import annotations

import copy
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as as_bytes
from torch import Tensor, nn

from headwise.instruments.examples import Examples, digests, model_view, read_examples
from headwise.instruments.provenance import model_name, versions, weights_hash
from headwise.instruments.readout import Readout, output_stack
from headwise.instruments.run import evaluating
from headwise.models import ModelView
from headwise.models.atomic import write_atomically

__all__ = ["TunedLens", "fit_lens"]


@dataclass(eq=False)
class TunedLens:
    """Translators of all layers but the last: `lens(model, inputs, kind=tuned)`.

    weight `(layers, width, width)`, bias `(layers, width)`: float32; what layer l reads becomes
    h + h weight[l]^T + bias[l]. record: the model's name and hash, what it was fitted on, and
    `kl`, the held-out nats of each layer before and after. `strict`: refuse models of other
    weights, not only those of other sizes.
    """

    weight: Tensor
    bias: Tensor
    record: dict[str, Any] = field(default_factory=dict)
    strict: bool = True
    kind = "tuned"

    def translate(self, residual: Tensor, layer: int) -> Tensor:
        """`(..., width)`, read by layer `layer`, in the last layer's terms."""
        h = residual.float()
        weight, bias = self.weight[layer].to(h.device), self.bias[layer].to(h.device)
        return (h + h @ weight.mT + bias).to(residual.dtype)

    def check(self, view: ModelView) -> None:
        """Raises ValueError for a model of another size, or (`strict`) of other weights."""
        layers, width = self.bias.shape
        there = sum(layer.stack == output_stack(view) for layer in view.layers)
        if (there, view.width) != (layers, width):
            raise ValueError(
                f"this lens is for {layers} layers of width {width}; {type(view.model).__name__} "
                f"has {there} of width {view.width}"
            )
        known = self.record.get("weights_hash")
        if self.strict and known is not None and known != weights_hash(view.model):
            raise ValueError(
                f"this lens was fitted on other weights ({self.record.get('model')}): fit one for "
                "this model, or set strict=False"
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """One safetensors file, whole or not at all."""
        path = Path(path)
        tensors = {"weight": self.weight.cpu().contiguous(), "bias": self.bias.cpu().contiguous()}
        content = as_bytes(tensors, {_KEY: json.dumps(self.record, sort_keys=True)})
        write_atomically(path, content)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str], strict: bool = True) -> TunedLens:
        """Raises FileNotFoundError, or ValueError for a file that holds no tuned lens."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file {path}")
        try:
            with safe_open(path, "pt") as file:
                said = (file.metadata() or {}).get(_KEY)
                if said is None or set(file.keys()) != {"weight", "bias"}:
                    raise ValueError(f"{path} holds no tuned lens of headwise")
                tensors = {name: file.get_tensor(name) for name in ("weight", "bias")}
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file ({error})") from error
        return cls(tensors["weight"], tensors["bias"], json.loads(said), strict)


_KEY = "headwise_tuned_lens"


def fit_lens(
    model: nn.Module | ModelView,
    inputs: Any,
    *,
    steps: int = 300,
    rate: float = 1e-3,
    rows: int = 32,
    held_out: float = 0.2,
    every: int = 25,
    patience: int = 4,
    seed: int = 0,
    tokenizer: Any | None = None,
    processor: Any | None = None,
    tokens: int | None = 128,
    windows: int | None = None,
    batch_size: int = 8,
) -> TunedLens:
    """Fit a tuned lens on inputs as `lens` takes them (a text is cut into windows of `tokens`).

    steps: of Adam with `rate`, which falls linearly to nothing; at each, every translator sees
    `rows` random positions of one batch. held_out: share of the batches (the last ones) that only
    measure, every `every` steps; of each layer the best translator is kept, and it ends early after
    `patience` measurements at which no layer got better. The model and its gradients stay as they
    are; random numbers are from `seed` alone.

    Raises ValueError where fewer than two batches are left to fit and measure on.
    """
    view = model_view(model)
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out}: expected a share between 0 and 1")
    batches = read_examples(view.model, inputs, tokenizer, processor, tokens, windows, batch_size)
    kept = max(1, round(held_out * len(batches)))
    if kept >= len(batches):
        raise ValueError(
            f"{len(batches)} batch of examples: a lens needs one to fit and one to measure on; "
            "give more text, or a smaller batch_size"
        )
    fitted, measured = batches[:-kept], batches[-kept:]
    with evaluating(view.model):
        found = _fit(view, fitted, measured, (steps, every, patience, rows), rate, seed)
    found.record |= {
        "model": model_name(view.model),
        "weights_hash": weights_hash(view.model),
        "inputs": digests(batches),
        "settings": {"steps": steps, "rate": rate, "rows": rows, "seed": seed},
        "versions": versions(),
    }
    return found


def _fit(
    view: ModelView,
    fitted: list[Examples],
    measured: list[Examples],
    plan: tuple[int, int, int, int],
    rate: float,
    seed: int,
) -> TunedLens:
    steps, every, patience, rows = plan
    random = torch.Generator().manual_seed(seed)
    first = Readout(view, fitted[0].inputs).last
    layers = sum(layer.stack == output_stack(view) for layer in view.layers)
    size, device = first.shape[-1], first.device
    tuned = TunedLens(
        torch.zeros(layers, size, size, device=device), torch.zeros(layers, size, device=device)
    )
    trained = [tuned.weight.requires_grad_(), tuned.bias.requires_grad_()]
    adam = torch.optim.Adam(trained, lr=rate)
    before = _measure(view, measured, tuned, rows, seed)
    best, lowest, worse, done = copy.deepcopy(tuned), before, 0, 0
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = rate * (1 - step / steps)
        batch = fitted[int(torch.randint(len(fitted), (), generator=random))]
        read = Readout(view, batch.inputs)
        sums = [torch.zeros_like(parameter) for parameter in trained]
        for loss in _losses(read, tuned, rows, random):  # one layer's graph at a time
            for total, grad in zip(sums, torch.autograd.grad(loss, trained), strict=True):
                total += grad
        for parameter, total in zip(trained, sums, strict=True):
            parameter.grad = total
        adam.step()
        done = step + 1
        if done % every and done != steps:
            continue
        now = _measure(view, measured, tuned, rows, seed)
        better = now < lowest
        with torch.no_grad():
            best.weight[better], best.bias[better] = tuned.weight[better], tuned.bias[better]
        lowest = torch.where(better, now, lowest)
        worse = 0 if bool(better.any()) else worse + 1
        if worse == patience or not math.isfinite(float(now.sum())):
            break
    kl = {"before": before.tolist(), "after": lowest.tolist()}
    return TunedLens(best.weight.detach(), best.bias.detach(), {"kl": kl, "steps": done})


def _losses(read: Readout, tuned: TunedLens, rows: int, random: torch.Generator) -> Any:
    """KL(final || translated) of each layer in turn, mean over some of the positions."""
    n = read.last.shape[1]
    some: Tensor | slice = slice(None)
    if read.by_row and rows < n:
        some = torch.randperm(n, generator=random)[:rows].to(read.last.device)
    with torch.no_grad():
        final = read(read.last[:, some]).float().log_softmax(-1)
    for layer, residual in enumerate(read.residuals[:-1]):
        logs = read(tuned.translate(residual[:, some], layer)).float().log_softmax(-1)
        yield (final.exp() * (final - logs)).sum(-1).mean()


@torch.no_grad()
def _measure(
    view: ModelView, batches: list[Examples], tuned: TunedLens, rows: int, seed: int
) -> Tensor:
    """Mean KL of each layer `(layers,)` in float64, on the same positions every time."""
    random = torch.Generator().manual_seed(seed)
    found = [
        torch.stack(list(_losses(Readout(view, batch.inputs), tuned, rows, random)))
        for batch in batches
    ]
    return torch.stack(found).double().mean(0)
