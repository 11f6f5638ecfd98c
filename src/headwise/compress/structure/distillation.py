"""A smaller model learns from the answers of the model that it was."""

from __future__ import annotations

import inspect
import io
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise.instruments.examples import Examples, model_view, read_examples
from headwise.instruments.run import evaluating
from headwise.models import ModelView, Site, recording
from headwise.models.atomic import write_atomically
from headwise.models.prefix import logits_of


@dataclass(frozen=True)
class Distilled:
    """What `distil` did. losses: of every step, those before an interruption among them. steps:
    how many there are now. seconds: of this call. stopped: "steps", "seconds", "interrupted" (by
    Ctrl-C) or "not finite"."""

    losses: list[float]
    steps: int
    seconds: float
    stopped: str


def distil(
    model: nn.Module | ModelView,
    teacher: nn.Module | ModelView,
    inputs: Any,
    steps: int = 100,
    seconds: float | None = None,
    batch_size: int = 8,
    rate: float = 1e-4,
    warmup: float = 0.1,
    decay: float = 0.0,
    temperature: float = 1.0,
    hidden: float = 0.0,
    layers: Mapping[int, int] | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    each: Callable[[int, float], Any] | None = None,
    **reading: Any,
) -> Distilled:
    """Train `model` in place, with AdamW, on

        T^2 KL(teacher || model), both softened by T  +  hidden * mean over layers of |h - h_t|^2
                                                                              / |h_t|^2

    (Hinton et al. 2015, arXiv 1503.02531; hidden states as in TinyBERT, arXiv 1909.10351, without
    its maps between widths, so that widths must be equal), mean over real tokens.

        distil(small, model, texts, seconds=600, tokenizer=tok)

    steps, seconds: the budget, whichever ends first. rate rises over the share `warmup` of the
    steps and falls to zero along a cosine. hidden, layers: weight and pairs {layer of the model:
    layer of the teacher} whose outputs are compared, by default all where both have as many.
    parameters: what is trained, by default everything. Batches are drawn in an order that only
    `seed` and the number of the step decide. checkpoint: a file that is written at the end and
    when it is interrupted, and read at the beginning: the same call then goes on, to the same
    losses. each(step, loss). reading: as in `read_examples`.

    Raises ValueError for numbers that do not fit, and for a teacher that answers in another shape.
    """
    small, large = model_view(model), model_view(teacher)
    _check(steps, seconds, temperature, hidden, warmup)
    pairs = _pairs(small, large, layers) if hidden else {}
    batches = read_examples(large.model, inputs, batch_size=batch_size, **reading)
    trained = list(small.model.parameters() if parameters is None else parameters)
    was = [(p, p.requires_grad) for p in trained]
    adam = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=decay)
    losses = _resumed(checkpoint, small.model, adam, (steps, seed, rate))
    began = time.perf_counter()
    stopped = "steps"
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        with evaluating(large.model), evaluating(small.model), torch.enable_grad():
            while len(losses) < steps:
                number = len(losses)
                for group in adam.param_groups:
                    group["lr"] = rate * _share(number, steps, warmup)
                batch = batches[_drawn(number, len(batches), seed)]
                loss = _loss(small, large, batch, temperature, hidden, pairs)
                if not math.isfinite(float(loss.detach())):
                    stopped = "not finite"
                    break
                adam.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(trained, 1.0)
                adam.step()
                losses.append(float(loss.detach()))
                if each is not None:
                    each(number, losses[-1])
                if seconds is not None and time.perf_counter() - began >= seconds:
                    stopped = "seconds"
                    break
    except KeyboardInterrupt:
        stopped = "interrupted"
    finally:
        adam.zero_grad()
        for parameter, needed in was:
            parameter.requires_grad_(needed)
    if checkpoint is not None:
        _write(Path(checkpoint), small.model, adam, losses, (steps, seed, rate))
    return Distilled(losses, len(losses), time.perf_counter() - began, stopped)


def _loss(
    small: ModelView,
    large: ModelView,
    batch: Examples,
    temperature: float,
    hidden: float,
    pairs: Mapping[Site, Site],
) -> Tensor:
    with torch.no_grad(), recording(large, pairs.values()) as theirs:
        wanted = logits_of(_called(large.model, batch))
    with recording(small, pairs, detach=False) as mine:
        given = logits_of(_called(small.model, batch))
    if given.shape != wanted.shape:
        raise ValueError(
            f"the teacher answers {tuple(wanted.shape)}, the model {tuple(given.shape)}"
        )
    real = _real(batch, given)
    soft = (wanted.float() / temperature).log_softmax(-1)
    other = (given.float() / temperature).log_softmax(-1)
    kl = (soft.exp() * (soft - other)).sum(-1)
    loss = temperature**2 * (kl * real).sum() / real.sum()
    if pairs:
        apart = [_apart(mine[a], theirs[b], batch) for a, b in pairs.items()]
        loss = loss + hidden * torch.stack(apart).mean()
    return loss


def _apart(mine: Tensor, theirs: Tensor, batch: Examples) -> Tensor:
    real = _real(batch, mine)
    square = ((mine - theirs).square().sum(-1) * real).sum()
    return square / (theirs.square().sum(-1) * real).sum().clamp_min(1e-12)


def _real(batch: Examples, like: Tensor) -> Tensor:
    """1 for real tokens (or examples), of the shape of `like` without its last axis."""
    mask = batch.inputs.get("attention_mask")
    shape = like.shape[:-1]
    return like.new_ones(shape) if mask is None or mask.shape != shape else mask.to(like.dtype)


def _called(model: nn.Module, batch: Examples) -> Any:
    known = inspect.signature(model.forward).parameters
    return model(**batch.given, **({"use_cache": False} if "use_cache" in known else {}))


def _pairs(
    small: ModelView, large: ModelView, layers: Mapping[int, int] | None
) -> dict[Site, Site]:
    if len(small.stacks) > 1:
        raise ValueError("hidden= is for models of one stack of layers")
    if layers is None:
        if len(small.layers) != len(large.layers):
            raise ValueError(
                f"hidden= compares {len(small.layers)} layers with {len(large.layers)}: give "
                "layers={layer of the model: layer of the teacher}"
            )
        layers = {n: n for n in range(len(small.layers))}
    if small.width != large.width:
        raise ValueError(f"hidden= needs equal widths, not {small.width} and {large.width}")
    # what a layer gives is what the next one reads
    return {Site("residual", a + 1): Site("residual", b + 1) for a, b in layers.items()}


def _check(
    steps: int, seconds: float | None, temperature: float, hidden: float, warmup: float
) -> None:
    if steps < 1 or (seconds is not None and seconds <= 0):
        raise ValueError(f"steps={steps}, seconds={seconds}: expected a budget above 0")
    if temperature <= 0 or hidden < 0 or not 0 <= warmup < 1:
        raise ValueError(
            f"temperature={temperature}, hidden={hidden}, warmup={warmup}: expected above 0, 0 or "
            "more, and a share below 1"
        )


def _drawn(step: int, count: int, seed: int) -> int:
    """Which batch: every pass over them in an order of its own."""
    whole, place = divmod(step, count)
    random = torch.Generator().manual_seed(seed * 1_000_003 + whole)
    return int(torch.randperm(count, generator=random)[place])


def _share(step: int, steps: int, warmup: float) -> float:
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _resumed(
    path: str | os.PathLike[str] | None,
    model: nn.Module,
    adam: torch.optim.Optimizer,
    settings: tuple[int, int, float],
) -> list[float]:
    if path is None or not Path(path).is_file():
        return []
    held = torch.load(path, map_location="cpu", weights_only=True)
    if tuple(held["settings"]) != settings:
        raise ValueError(
            f"{path} was written with steps, seed, rate = {tuple(held['settings'])}, not "
            f"{settings}: use the same, or another file"
        )
    model.load_state_dict(held["model"])
    adam.load_state_dict(held["adam"])
    losses: list[float] = held["losses"]
    return losses


def _write(
    path: Path,
    model: nn.Module,
    adam: torch.optim.Optimizer,
    losses: list[float],
    settings: tuple[int, int, float],
) -> None:
    held = {
        "model": model.state_dict(),
        "adam": adam.state_dict(),
        "losses": losses,
        "settings": list(settings),
    }
    content = io.BytesIO()
    torch.save(held, content)
    write_atomically(path, content.getvalue())
