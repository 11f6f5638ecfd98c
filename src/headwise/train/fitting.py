"""The micro trainer: enough for a claim, and not more."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.tasks import Task
from headwise.train.schedule import share


@dataclass(frozen=True)
class Fitted:
    """What `fit` did. `losses`: of every step. `stopped`: steps, seconds or target."""

    losses: list[float]
    steps: int
    seconds: float
    stopped: str

    @property
    def loss(self) -> float:
        """Mean of the last tenth of the steps (NaN where the loss diverged or nothing ran)."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last) if last else math.nan


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside, and as if nothing had happened afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.enable_grad()
def fit(
    model: nn.Module,
    task: Task,
    steps: int = 1000,
    size: int = 32,
    rate: float = 1e-3,
    warmup: float = 0.05,
    schedule: str = "cosine",
    decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.98),
    clip: float | None = 1.0,
    seconds: float | None = None,
    target: float | None = None,
    seed: int = 0,
    parameters: Iterable[Tensor] | Iterable[dict[str, Any]] | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    each: Callable[[int, float], None] | None = None,
) -> Fitted:
    """Train `model` on a task with AdamW, for at most `steps` steps of `size` problems.

    `rate`: the highest learning rate; `warmup`: share of the steps over which it rises; then
    `schedule`, one of cosine, linear, constant. `clip`: largest norm of all gradients. It ends
    early after `seconds` (what was reached then depends on the machine), or when the mean loss of
    the last 20 steps is under `target`. `parameters`: what is trained, all by default.
    `optimizer`: called with the parameters, in place of AdamW; its rates follow the schedule.
    `each(step, loss)` is called after every step. A loss that is not finite ends the training and
    stands in `losses`. Penalties that modules ask for (a method `penalty() -> Tensor`, such as
    the balance of experts) are added to the loss that is minimised, not to what is reported.

    The model is trained in place, on the device where it is, with the random numbers of `seed`.
    """
    groups: list[Any] = list(model.parameters() if parameters is None else parameters)
    if optimizer is None:
        adam = torch.optim.AdamW(groups, lr=rate, betas=betas, weight_decay=decay)
        chosen: torch.optim.Optimizer = adam
    else:
        chosen = optimizer(groups)
    highest = [group["lr"] for group in chosen.param_groups]
    trained = [p for group in chosen.param_groups for p in group["params"]]
    device = trained[0].device
    losses: list[float] = []
    stopped = "steps"
    started = time.perf_counter()
    model.train()
    with seeded(seed):
        for step in range(steps):
            for group, top in zip(chosen.param_groups, highest, strict=True):
                group["lr"] = top * share(step, steps, warmup, schedule)
            batch = task.batch(step, size)
            inputs = {name: value.to(device) for name, value in batch.inputs.items()}
            loss = task.loss(logits(model(**inputs)), _on(batch, device))
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                stopped = "not finite"
                break
            (loss + penalty(model)).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(trained, clip)
            chosen.step()
            chosen.zero_grad()
            if each is not None:
                each(step, losses[-1])
            if seconds is not None and time.perf_counter() - started > seconds:
                stopped = "seconds"
                break
            if target is not None and step >= 19 and sum(losses[-20:]) / 20 < target:
                stopped = "target"
                break
    return Fitted(losses, len(losses), time.perf_counter() - started, stopped)


def penalty(model: nn.Module) -> Tensor | float:
    """Sum of what the modules of a model ask to be kept small, each by its `penalty()`."""
    asking: list[Any] = [module for module in model.modules() if hasattr(module, "penalty")]
    return sum(module.penalty() for module in asking)


@torch.no_grad()
def evaluate(
    model: Callable[..., Tensor], task: Task, batches: int = 8, size: int = 64, split: str = "test"
) -> dict[str, float]:
    """What the task measures (`loss`, `accuracy`, ...), over problems that were not trained on.

    `model`: a module, put into evaluation mode meanwhile, or an oracle, which is any callable
    that takes a batch's inputs by name.
    """
    module = model if isinstance(model, nn.Module) else None
    was = module is not None and module.training
    device = torch.device("cpu")
    if module is not None:
        module.eval()
        device = next((p.device for p in module.parameters()), device)
    sums: dict[str, list[float]] = {}
    for step in range(batches):
        batch = task.batch(step, size, split)
        inputs = {name: value.to(device) for name, value in batch.inputs.items()}
        for name, (total, count) in task.measure(
            logits(model(**inputs)), _on(batch, device)
        ).items():
            held = sums.setdefault(name, [0.0, 0.0])
            held[0] += total
            held[1] += count
    if module is not None:
        module.train(was)
    return {name: total / count if count else math.nan for name, (total, count) in sums.items()}


def logits(output: Any) -> Tensor:
    """The numbers a task looks at: the output itself, or its `logits` (transformers)."""
    return getattr(output, "logits", output)


def _on(batch: Any, device: torch.device) -> Any:
    if device.type == "cpu":
        return batch
    return type(batch)(batch.inputs, batch.targets.to(device), batch.facts)
