"""A model's unchanged run on some examples, and runs with changes that start as late as they can.

A change of a head at layer l leaves everything before that head's output as it was. So a run
with it starts at layer l (`models.Prefix`), and in layer l the attention up to the changed one
answers from memory: the heads' outputs are known, and only the output projection is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.models import ModelView, Prefix, Site, recording
from headwise.models.fused_activations import fused_activations
from headwise.models.interface import EDITORS, OBSERVERS
from headwise.models.sites import Write

__all__ = ["CleanRun", "Start"]


@dataclass(frozen=True, order=True)
class Start:
    """Where a changed run starts: the first `attentions` attentions of layer number `layer` (in
    order of execution) answer from memory, and with `feed` the feed-forward part gives anything,
    because what it gives is exchanged."""

    layer: int
    attentions: int = 0
    feed: bool = False


@dataclass
class _Answer:
    """What an attention gave: `shell` without its first tensor, and `joined`, what went into its
    output projection, which is computed anew where it is inside of the attention."""

    shell: Any
    joined: Tensor
    projection: nn.Module | None


class CleanRun:
    """One batch, run once; `values`: what was at the sites that were asked for.

    `output`: the model's answer. `run`: the answer with changes. `reuse=False` computes
    everything each time (the slow twin). Keeps the numbers of `Prefix`, of the sites, and of
    what goes into every output projection.

    rows: how many of the last positions the answer is read at, None for all. The last layer's
    feed-forward part then leaves the others out, if a trial shows that these do not need them.
    """

    def __init__(
        self,
        view: ModelView,
        inputs: Mapping[str, Any],
        sites: Iterable[Site] = (),
        reuse: bool = True,
        rows: int | None = None,
    ) -> None:
        self.view = view
        self._rows: int | None = None
        self._answers: dict[nn.Module, _Answer] = {}
        self._feeds: dict[nn.Module, Any] = {}
        self._order: list[nn.Module] = []
        self._reuse = reuse
        keeping = self._keeping() if reuse else nullcontext()
        with self._quick(), recording(view, sites) as values, keeping:
            self.prefix = Prefix(view, inputs, reuse)
        self.values: dict[Site, Tensor] = dict(values)
        self.output = self.prefix.output
        if rows is not None and self.prefix.reuses and len(view.stacks) == 1:
            self._rows = rows
            self._rows = rows if self._alike() else None

    @property
    def batch(self) -> int:
        return self.prefix.batch

    def start_of(self, sites: Iterable[Site]) -> Start:
        """The latest start of a run that changes these sites."""
        places = {(layer.stack, layer.index): n for n, layer in enumerate(self.view.layers)}
        found = []
        for site in sites:
            stack = site.stack or self.view.stacks[0]
            number = places.get((stack, site.layer))
            if number is None:  # the residual that a stack's last layer leaves
                found.append(Start(places[stack, site.layer - 1] + 1))
                continue
            layer = self.view.layers[number]
            if site.kind in ("heads", "attention"):
                at = [a.kind for a in layer.attentions].index(site.attention)
                found.append(Start(number, at + 1))
            elif site.kind == "mlp":
                found.append(Start(number, len(layer.attentions), True))
            else:
                found.append(Start(number))
        return min(found)

    def run(self, writes: Mapping[Site, Write], copies: int, start: Start) -> Tensor:
        """The answer `(copies * batch, ...)`, copies behind each other, with the writes in force.

        Raises RuntimeError if one of them was never asked: the model does not run that place.
        """
        waiting = set(writes)
        watched = {site: _noting(waiting, site, write) for site, write in writes.items()}
        with self._quick(), self._remembering(start, copies):
            found = self.prefix.run(watched, copies, start=start.layer)
        missed = [s for s in waiting if s.kind not in ("queries", "keys")]  # of maps not needed
        if missed:
            names = ", ".join(sorted(map(str, missed)))
            raise RuntimeError(f"{names}: the model did not come by there in this pass")
        return found

    def _alike(self) -> bool:
        """Whether the last layer gives the same where it is read, the other rows left out."""
        with torch.no_grad():
            again = self.run({}, 1, Start(len(self.view.layers) - 1))
        size = self.output.abs().amax().clamp_min(1e-12)
        return bool((again - self.output).abs().amax() <= 1e-5 * size)

    def _quick(self) -> AbstractContextManager[None]:
        return fused_activations(self.view.model) if self._reuse else nullcontext()

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        handles: list[Any] = []
        joined: dict[nn.Module, tuple[Tensor, Any]] = {}

        def project(module: nn.Module, args: Any, output: Any) -> None:
            if args and isinstance(args[0], Tensor):
                joined[module] = (args[0].detach(), output)

        def attend(projection: nn.Module) -> Callable[..., None]:
            def keep(module: nn.Module, args: Any, output: Any) -> None:
                self._order.append(module)
                self._answers.pop(module, None)
                first = output[0] if isinstance(output, tuple | list) else output
                inner = projection in set(module.modules())
                if not isinstance(first, Tensor):
                    return
                if not inner:
                    self._answers[module] = _Answer(_shell(output), first.detach(), None)
                elif projection in joined:
                    went, came = joined[projection]
                    if came is first or (came.shape == first.shape and torch.equal(came, first)):
                        self._answers[module] = _Answer(_shell(output), went, projection)

            return keep

        def feed(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) else output
            if args and isinstance(args[0], Tensor) and args[0].shape == first.shape:
                self._feeds[module] = _shell(output)

        for attention in self.view.attentions:
            found = attention.projections
            if isinstance(found, str) or found.output is None:
                continue
            if "forward" not in vars(attention.module):  # somebody else stands in for it
                handles.append(found.output.register_forward_hook(project))
                handles.append(attention.module.register_forward_hook(attend(found.output)))
        for layer in self.view.layers:
            if layer.mlp is not None and "forward" not in vars(layer.mlp):
                handles.append(layer.mlp.register_forward_hook(feed))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _remembering(self, start: Start, copies: int) -> Iterator[None]:
        """The attentions before the change give what they gave, for each of the copies."""
        touched: list[nn.Module] = []

        def stand_in(module: nn.Module, forward: Callable[..., Any]) -> None:
            module.forward = forward
            touched.append(module)

        try:
            if self.prefix.reuses and start.layer < len(self.view.layers):
                layer = self.view.layers[start.layer]
                known = [a.module for a in layer.attentions[: start.attentions]]
                if _in_order(self._order, known):
                    for module in known:
                        # who edits or observes one counts its calls
                        watched = id(module) in EDITORS or id(module) in OBSERVERS
                        if module in self._answers and not watched:
                            stand_in(module, self._answering(self._answers[module], copies))
                if start.feed and layer.mlp is not None and layer.mlp in self._feeds:
                    shell = self.prefix.repeated(self._feeds[layer.mlp], copies)
                    stand_in(layer.mlp, lambda x, *args, **kwargs: _filled(shell, x))
            last = self.view.layers[-1].mlp
            if self._rows is not None and last in self._feeds and last not in touched:
                stand_in(last, _of_last_rows(last.forward, self._rows))
            yield
        finally:
            for module in touched:
                del module.forward

    def _answering(self, answer: _Answer, copies: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            known = self.prefix.repeated(answer.joined, copies)
            first = known if answer.projection is None else answer.projection(known)
            return _filled(self.prefix.repeated(answer.shell, copies), first)

        return forward


def _in_order(ran: list[nn.Module], wanted: list[nn.Module]) -> bool:
    """Whether these ran in this order, each once (and perhaps again in a trial)."""
    first = [ran.index(module) for module in wanted if module in ran]
    return len(first) == len(wanted) and first == sorted(first)


def _shell(output: Any) -> Any:
    """What is given beside the first tensor; None where that is all."""
    if isinstance(output, tuple | list):
        rest = [part.detach() if isinstance(part, Tensor) else part for part in output[1:]]
        return type(output)([None, *rest])
    return None


def _filled(shell: Any, first: Tensor) -> Any:
    return first if shell is None else type(shell)([first, *shell[1:]])


def _of_last_rows(forward: Callable[..., Any], rows: int) -> Callable[..., Any]:
    """A feed-forward part that computes the last positions, and gives zeros at the others."""

    def some(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = forward(x[:, -rows:].contiguous(), *args, **kwargs)
        first = output[0] if isinstance(output, tuple | list) else output
        whole = nn.functional.pad(first, (0, 0, x.shape[1] - rows, 0))
        return whole if first is output else type(output)([whole, *output[1:]])

    return some


def _noting(waiting: set[Site], site: Site, write: Write) -> Write:
    def noted(there: Tensor) -> Tensor | None:
        waiting.discard(site)
        return write(there)

    return noted
