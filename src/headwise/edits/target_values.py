"""What a feed-forward layer would have to say at the subject for the target to follow.

Found by gradient descent on its output (and, for PMET, on the attention's beside it), with the
model's weights at rest: Meng et al. 2022, arXiv 2202.05262, eq. 4; Li et al. 2023,
arXiv 2308.08742, eq. 11 to 13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.edits.at_rest import device_of
from headwise.edits.fact_prompts import Rows, Wording, rows_of, target_logs
from headwise.models import ModelView
from headwise.models.errors import UnsupportedModelError
from headwise.models.prefix import Prefix
from headwise.models.sites import Site, recording, touching
from headwise.models.spots import down_projection
from headwise.models.structure import LayerView

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ValueSearch:
    """How target values are searched for.

    steps: at most so many of Adam. rate: its step, as a share of the output's root mean square.
    reach: longest change, as a multiple of the output's norm; longer ones are cut back to it.
    drift: weight of KL(edited || original) on the subject's essence, in nats. decay: weight of the
    change's norm, relative to the output's. enough: the loss in nats at which the search ends.
    """

    steps: int = 25
    rate: float = 0.5
    reach: float = 4.0
    drift: float = 0.0625
    decay: float = 0.05
    enough: float = 0.05

    def __post_init__(self) -> None:
        if self.steps < 1 or min(self.rate, self.reach) <= 0 or min(self.drift, self.decay) < 0:
            raise ValueError(f"{self}: steps >= 1, rate and reach > 0, drift and decay >= 0")


@dataclass(frozen=True, eq=False)
class TargetValue:
    """What was found: the mean key `(hidden,)`, the layer's output there and the output wanted
    `(width,)`, the loss in nats per target token before and after, and the steps it took.

    agreement: the smallest cosine between the key in one of the wordings and the mean. Where it
    is small the edit does not reach that wording: a subject that is the very first token of a
    line, on which attention rests, has a key of its own.
    """

    key: Tensor
    output: Tensor
    wanted: Tensor
    loss_before: float
    loss_after: float
    steps: int
    agreement: float = 1.0

    def told(self) -> dict[str, Any]:
        """The numbers, as JSON."""
        change = float((self.wanted - self.output).norm() / self.output.norm().clamp_min(1e-12))
        return {
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "steps": self.steps,
            "relative_change": change,
            "key_agreement": self.agreement,
        }


@contextmanager
def projecting(module: nn.Module, write: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """While this lasts, what a projection gives goes through `write`. In most models that is the
    site `mlp`; where a norm stands behind it (Gemma 2) it is what comes before the norm."""

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return write(output)

    handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def read_keys(view: ModelView, layer: LayerView, rows: Rows) -> tuple[Tensor, Tensor]:
    """(neurons, what the projection makes of them) at the subjects' last tokens, `(rows, hidden)`
    and `(rows, width)`, as the model is now."""
    made: list[Tensor] = []
    site = Site("neurons", layer.index)
    with recording(view, [site]) as kept, projecting(down_projection(layer), made.append):
        view.model(input_ids=rows.inputs.to(device_of(view.model)))
    if len(made) != 1 or made[0].dim() != 3:
        raise UnsupportedModelError(
            f"layer {layer.index}: its last projection ran {len(made)} times in one pass; a fact "
            "is written into one that runs once, on (batch, n, width)"
        )
    at = torch.arange(len(rows)), rows.subjects
    return kept[site][at].float(), made[0][at].float()


def search_value(
    view: ModelView,
    layer: LayerView,
    wordings: Sequence[Wording],
    target: Tensor,
    essence: Wording | None = None,
    search: ValueSearch | None = None,
    attention: bool = False,
    progress: Progress | None = None,
) -> TargetValue:
    """Search what the layer shall put out at the subject, the same in all wordings.

    essence: a prompt such as "{subject} is a", whose next-token distribution shall not drift.
    attention: whether the attention's output at the same place may change as well (PMET), by a
    vector that is thrown away afterwards.
    """
    how = search or ValueSearch()
    lines = rows_of([*wordings, *([essence] if essence is not None else [])], target)
    device, count = device_of(view.model), len(wordings)
    neurons, outputs = read_keys(view, layer, lines)
    key, start = neurons[:count].mean(0), outputs[:count].mean(0)
    size = torch.maximum(start.norm(), outputs.norm(dim=-1).mean()).clamp_min(1e-6)
    prefix = Prefix(view, {"input_ids": lines.inputs.to(device)})
    first = view.layers.index(layer)
    before = _drift_logs(prefix.output, lines, count)
    told = Rows(lines.inputs[:count], lines.subjects[:count], lines.ends[:count])
    begin = -float(target_logs(prefix.output[:count], told, target).mean())
    at = torch.arange(len(lines), device=device), lines.subjects.to(device)
    change = torch.zeros_like(start, requires_grad=True)
    moved = [change]
    site = Site("attention", layer.index)
    if attention:
        there, others = _attention_size(view, site, lines), torch.zeros_like(start)
        moved.append(others.requires_grad_())
    adam = torch.optim.Adam(
        [
            {"params": [change], "lr": how.rate * float(size) / len(start) ** 0.5},
            *(
                [{"params": [moved[1]], "lr": how.rate * float(there) / len(start) ** 0.5}]
                if attention
                else []
            ),
        ]
    )
    sizes = [float(size), float(there)] if attention else [float(size)]

    def put(output: Tensor) -> Tensor:
        return output.index_put(at, (start + change).to(output.dtype))

    def nudge(output: Tensor) -> Tensor:
        return output.index_put(at, moved[1].to(output.dtype).expand(len(lines), -1), True)

    writes = {site: nudge} if attention else {}
    best, least, loss, step = change.detach().clone(), float("inf"), begin, 0
    with torch.enable_grad():
        for step in range(how.steps + 1):
            with projecting(down_projection(layer), put):
                logits = prefix.run(writes, start=first)
            said = -target_logs(logits[:count], told, target).mean()
            whole = said + how.decay * sum(
                (m + 1e-12).norm() / s for m, s in zip(moved, sizes, strict=True)
            )
            if before is not None:
                now = _drift_logs(logits, lines, count)
                assert now is not None
                whole = whole + how.drift * (now.exp() * (now - before)).sum()
            if float(whole.detach()) < least:
                best, least = change.detach().clone(), float(whole.detach())
                loss = float(said.detach())
            if progress is not None:
                progress(step, how.steps, f"target value, {float(said.detach()):.2f} nats")
            if float(said.detach()) < how.enough or step == how.steps:
                break
            grads = torch.autograd.grad(whole, moved)
            for one, grad in zip(moved, grads, strict=True):
                one.grad = grad
            adam.step()
            with torch.no_grad():
                for one, s in zip(moved, sizes, strict=True):
                    one.mul_((how.reach * s / one.norm().clamp_min(1e-12)).clamp(max=1.0))
    if progress is not None:
        progress(how.steps, how.steps, f"target value, {loss:.2f} nats")
    alike = torch.cosine_similarity(neurons[:count], key[None], dim=-1)
    return TargetValue(key, start, start + best, begin, loss, step, float(alike.min()))


def _drift_logs(logits: Tensor, lines: Rows, count: int) -> Tensor | None:
    """Log-probabilities of what follows the essence, `(vocabulary,)`."""
    if len(lines) == count:
        return None
    return logits[count, int(lines.ends[count])].float().log_softmax(-1)


@torch.no_grad()
def _attention_size(view: ModelView, site: Site, lines: Rows) -> Tensor:
    """Mean norm of what the attention adds at the subjects."""
    kept: list[Tensor] = []

    def keep(value: Tensor) -> None:
        kept.append(value[torch.arange(len(lines)), lines.subjects].float())

    with touching(view, {site: keep}):
        view.model(input_ids=lines.inputs.to(device_of(view.model)))
    return kept[0].norm(dim=-1).mean().clamp_min(1e-6)
