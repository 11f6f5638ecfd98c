"""A layer goes, and its weights live on in its neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from headwise.compress.structure.layers import drop_layers
from headwise.compress.structure.matrices import bias_of, is_matrix
from headwise.compress.structure.moments import body_of, run, stopping, tokens_of
from headwise.compress.structure.sharing import modules_of
from headwise.instruments.examples import Examples, model_view, read_examples
from headwise.instruments.run import evaluating
from headwise.models import ModelView, UnsupportedModelError
from headwise.models.layers import first_tensor


@dataclass(frozen=True)
class Fused:
    """What `fuse_layer` did. removed: the layer; group: the layers around it that took it up, all
    as numbered before. losses: of every step, squared error of what the group gives over its
    square; before, after: the same over all inputs, with the layer only removed, and fused."""

    removed: int
    group: tuple[int, ...]
    losses: list[float]
    before: float
    after: float


class _Injected(nn.Module):
    """w -> w + (A B) * w_p  [+ D E], elementwise in w_p. A, D start at zero: nothing changes."""

    def __init__(self, other: Tensor, rank: int, update: int, random: torch.Generator) -> None:
        super().__init__()
        self.other: Tensor
        self.register_buffer("other", other.detach().clone())
        if other.dim() == 1:  # a bias
            self.left: nn.Parameter = nn.Parameter(torch.zeros_like(other))
            self.right = self.add_left = self.add_right = None
            return
        rows, columns = other.shape
        self.left = nn.Parameter(other.new_zeros(rows, rank))
        self.right = nn.Parameter(_drawn(rank, columns, random).to(other))
        self.add_left = nn.Parameter(other.new_zeros(rows, update)) if update else None
        self.add_right = nn.Parameter(_drawn(update, columns, random).to(other)) if update else None

    def forward(self, weight: Tensor) -> Tensor:
        coefficients = self.left if self.right is None else self.left @ self.right
        made = weight + coefficients * self.other
        if self.add_left is None or self.add_right is None:
            return made
        return made + self.add_left @ self.add_right


def fuse_layer(
    model: nn.Module | ModelView,
    inputs: Any,
    layer: int,
    group: int = 4,
    rank: int = 8,
    update: int = 0,
    steps: int = 100,
    rate: float = 3e-2,
    batch_size: int = 8,
    seed: int = 0,
    stack: str | None = None,
    **reading: Any,
) -> Fused:
    """Drop a layer and put its weights into those around it, for good (FuseGPT, Pei et al. 2024,
    arXiv 2411.14507).

        fuse_layer(model, texts, 7, tokenizer=tok)

    Every matrix W_j of the `group` nearest layers becomes W_j + (A B) * W_p, elementwise, with W_p
    the removed layer's matrix of the same name, frozen, and A B of `rank`, learned with Adam so
    that the residual behind the group stays what it was; then it is folded into W_j, which keeps
    its size. Biases get a coefficient for each feature. update: rank of a low-rank matrix that is
    learned beside and added to W_j, as the authors' code has it (and their paper's formula has
    not); 0 for none. rank 0 and an update are LoRA alone.

    Raises ValueError for a layer that is not there or a group that does not fit, or layers that
    differ; the model is then as it was.
    """
    look = model_view(model)
    modules = modules_of(look, "layer", stack)
    if not 0 <= layer < len(modules):
        raise ValueError(f"layer {layer}: this stack has layers 0 to {len(modules) - 1}")
    if not 1 <= group < len(modules) or rank < 0 or update < 0 or rank + update < 1 or steps < 0:
        raise ValueError(
            f"group={group}, rank={rank}, update={update}, steps={steps}: expected a group of 1 to "
            f"{len(modules) - 1} other layers, a rank above 0 and steps of 0 or more"
        )
    first = min(max(0, layer - (group + 1) // 2), len(modules) - group - 1)
    span = range(first, first + group + 1)
    neighbours = [place for place in span if place != layer]
    pairs = [pair for place in neighbours for pair in _pairs(modules[place], modules[layer], place)]
    if not pairs:
        raise UnsupportedModelError(
            f"the layers around layer {layer} hold no matrix of floats that could take in its "
            "weights: fuse first, and change the matrices that stay afterwards"
        )
    name = stack or look.stacks[0]
    blocks = [one.module for one in look.layers if one.stack == name]
    batches = read_examples(look.model, inputs, batch_size=batch_size, **reading)
    body = body_of(look.model, blocks)
    random = torch.Generator().manual_seed(seed)
    was = [p for p in look.model.parameters() if p.requires_grad]
    with evaluating(look.model), ExitStack() as undo:
        with torch.no_grad():
            wanted = [_behind(body, blocks[span[-1]], batch) for batch in batches]
        for parameter in was:
            parameter.requires_grad_(False)
            undo.callback(parameter.requires_grad_, True)
        undo.enter_context(_skipped(blocks[layer]))
        before = _error(body, blocks[span[-1]], batches, wanted)
        learned = _inject(pairs, rank, update, random)
        try:
            losses = _fit(body, blocks[span[-1]], batches, wanted, learned, steps, rate, random)
        finally:
            for mine, _, part in pairs:
                parametrize.remove_parametrizations(mine, part, leave_parametrized=True)
        for parameter in look.model.parameters():
            parameter.requires_grad_(False)
        after = _error(body, blocks[span[-1]], batches, wanted)
    kept = {id(p) for p in was}
    for parameter in look.model.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    drop_layers(look.model, [layer], stack=stack)
    return Fused(layer, tuple(neighbours), losses, before, after)


def _pairs(
    mine: Sequence[nn.Module], theirs: Sequence[nn.Module], place: int
) -> list[tuple[nn.Module, Tensor, str]]:
    """(matrix of a neighbour, the removed layer's tensor, "weight" or "bias")."""
    found: list[tuple[nn.Module, Tensor, str]] = []
    for a, b in zip(mine, theirs, strict=True):
        others = dict(b.named_modules())
        for path, module in a.named_modules():
            if not is_matrix(module):
                continue
            other = others.get(path)
            if other is None or not is_matrix(other) or other.weight.shape != module.weight.shape:
                raise ValueError(f"layer {place} differs from the removed one in {path}")
            assert isinstance(other.weight, Tensor)
            found.append((module, other.weight, "weight"))
            bias, theirs_bias = bias_of(module), bias_of(other)
            if bias is not None and theirs_bias is not None:
                found.append((module, theirs_bias, "bias"))
    return found


def _inject(
    pairs: list[tuple[nn.Module, Tensor, str]], rank: int, update: int, random: torch.Generator
) -> list[nn.Parameter]:
    learned: list[nn.Parameter] = []
    for module, other, part in pairs:
        injected = _Injected(other, rank, update, random)
        parametrize.register_parametrization(module, part, injected)
        learned += list(injected.parameters())
    return learned


def _fit(
    body: nn.Module,
    last: nn.Module,
    batches: list[Examples],
    wanted: list[Tensor],
    learned: list[nn.Parameter],
    steps: int,
    rate: float,
    random: torch.Generator,
) -> list[float]:
    adam = torch.optim.Adam(learned, lr=rate)
    losses = []
    with torch.enable_grad():
        for step in range(steps):
            for group in adam.param_groups:
                group["lr"] = rate * min(1.0, 2 * (steps - step) / steps)
            number = int(torch.randint(len(batches), (1,), generator=random))
            loss = _distance(_behind(body, last, batches[number]), wanted[number], batches[number])
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def _error(
    body: nn.Module, last: nn.Module, batches: list[Examples], wanted: list[Tensor]
) -> float:
    found = [
        float(_distance(_behind(body, last, batch), goal, batch))
        for batch, goal in zip(batches, wanted, strict=True)
    ]
    return sum(found) / len(found)


def _distance(given: Tensor, wanted: Tensor, batch: Examples) -> Tensor:
    mine, goal = tokens_of(given, batch), tokens_of(wanted, batch)
    return (mine - goal).square().sum() / goal.square().sum()


def _behind(body: nn.Module, last: nn.Module, batch: Examples) -> Tensor:
    """The residual that a layer leaves; nothing behind it is computed."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found = first_tensor(output)
        assert found is not None
        kept.append(found)

    handle = last.register_forward_hook(keep)
    try:
        with stopping(last):
            run(body, batch)
    finally:
        handle.remove()
    return kept[-1]


@contextmanager
def _skipped(module: nn.Module) -> Iterator[None]:
    """The layer gives what it is handed."""

    def skip(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        several = isinstance(output, tuple | list)
        return type(output)([stream, *output[1:]]) if several else stream

    handle = module.register_forward_hook(skip, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _drawn(rows: int, columns: int, random: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=random) / max(1, columns) ** 0.5
