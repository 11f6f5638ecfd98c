"""Projections without weights: they give what the same projection of an earlier layer gave.

Nothing of a model's own forward pass is rewritten. Where a layer asks its query projection for
queries, it is handed those of another layer; the rest (rotation, masks, kernels) goes on as ever.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from headwise.models.projections import features_first
from headwise.parts.slots import Given, Project, Turn


class Held:
    """A forward hook that keeps what its module gave last, until it is recalled. Copies and files
    leave that out.

    Checkpointed layers run again during the backward pass, from the last to the first, so a layer
    recalls before its source has run: with gradients the numbers are kept for that (`again`).
    """

    def __init__(self) -> None:
        self.value: Any = None
        self.again: Any = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not _going_back():
            self.value, self.again = output, None

    def __getstate__(self) -> dict[str, Any]:
        return {"value": None, "again": None}

    def recall(self, x: Tensor, who: str) -> Tensor:
        """What was kept. Raises RuntimeError unless it is of the same tokens as x `(batch, n,
        ...)`, as far as sizes tell."""
        found = self.again if _going_back() else self.value
        if found is None or found.shape[:2] != x.shape[:2]:
            have = "nothing" if found is None else f"{tuple(found.shape)}"
            raise RuntimeError(
                f"{who} recalls what an earlier layer computed on the same tokens, x is "
                f"{tuple(x.shape)} and there is {have}: run the model as a whole"
            )
        kept: Tensor = found
        if not _going_back():
            self.value = None
            if kept.requires_grad:
                self.again = kept.detach().requires_grad_()
        return kept


def _going_back() -> bool:
    """Whether this is a part of a forward pass that a backward pass does again."""
    return torch._C._current_graph_task_id() != -1


class Recalled(nn.Module):
    """Stands where a projection (or a norm of queries or keys) stood, and gives what `source`, the
    same module of another layer, gave for these tokens. `weight` and `bias` are the source's."""

    recalls = True

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self._source = (source,)  # in a tuple, into which modules do not look
        self.held = Held()
        source.register_forward_hook(self.held)
        if hasattr(source, "nf"):
            self.nf = source.nf

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self._source[0].weight)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", getattr(self._source[0], "bias", None))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.held.recall(x, type(self).__name__)
        return found


class RecalledFused(nn.Module):
    """The same for one projection to queries, keys and values side by side: values are its own,
    `value`; queries and keys, the first `shared` features, are the source's."""

    recalls = True

    def __init__(self, own: nn.Module, source: nn.Module, shared: int) -> None:
        super().__init__()
        self._source = (source,)
        self.shared = shared
        self.held = Held()
        source.register_forward_hook(self.held)
        table, bias = features_first(own), getattr(own, "bias", None)
        out, width = table.shape
        self.value = nn.Linear(
            width, out - shared, bias is not None, device=table.device, dtype=table.dtype
        )
        with torch.no_grad():
            self.value.weight.copy_(table[shared:])
            if bias is not None:
                self.value.bias.copy_(bias[shared:])

    @property
    def weight(self) -> Tensor:
        """`(out, in)`, put together: to be read, changes do not reach the parameters."""
        return torch.cat([features_first(self._source[0])[: self.shared], self.value.weight])

    @property
    def bias(self) -> Tensor | None:
        theirs = getattr(self._source[0], "bias", None)
        return None if theirs is None else torch.cat([theirs[: self.shared], self.value.bias])

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.held.recall(x, type(self).__name__)
        return torch.cat([found[..., : self.shared], self.value(x)], -1)


def lent(model: nn.Module) -> list[tuple[nn.Module, Recalled | RecalledFused]]:
    """(projection that is shared, what recalls it), for all in a model of transformers."""
    found = (m for m in model.modules() if isinstance(m, Recalled | RecalledFused))
    return [(m._source[0], m) for m in found]


def is_lent(module: nn.Module) -> bool:
    """Whether another layer recalls what this projection gives."""
    return any(isinstance(hook, Held) for hook in module._forward_hooks.values())


def lend_instead(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Whoever recalls what `old` gave recalls what `new` gives, which takes its place."""
    for source, reader in lent(model):
        if source is old:
            reader._source = (new,)
            new.register_forward_hook(reader.held)
            if isinstance(reader, Recalled) and not hasattr(new, "nf") and hasattr(reader, "nf"):
                del reader.nf


class RecalledProject(Project):
    """The projection of an attention of `headwise.parts`: queries and keys, turned and with those
    of the past, are the source's; values are its own, and the only thing that it caches."""

    recalls = True

    def __init__(self, own: Project, source: Project) -> None:
        super().__init__()
        assert own.size is not None
        self._source = (source,)
        self.size = own.size
        self.value = cast(nn.Linear, own.value)
        self.held = Held()
        source.register_forward_hook(self.held)

    @property
    def query(self) -> nn.Module:
        return cast(nn.Module, self._source[0].query)

    @property
    def key(self) -> nn.Module:
        return cast(nn.Module, self._source[0].key)

    def forward(self, given: Given, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        size, held = self.size, self.held.value
        assert size is not None
        assert given.source is not None
        v = self.value(given.source).unflatten(-1, (-1, size.value_dim)).transpose(1, 2)
        v = turn.value(v)
        if given.state is not None:
            v = given.state.append("value", v, given.keep)
        if held is None or held[0].shape[2] != given.x.shape[1] or held[1].shape[2] != v.shape[2]:
            have = "nothing" if held is None else f"keys {tuple(held[1].shape)}"
            raise RuntimeError(
                f"RecalledProject: the source layer did not run on the same tokens, there is "
                f"{have} for values {tuple(v.shape)}: run the model as a whole"
            )
        self.held.value = None
        return held[0], held[1], v

    def width(self) -> int:
        assert self.size is not None
        return self.size.kv_heads * self.size.value_dim

    def flops(self, n_q: int, n_k: int) -> int:
        assert self.size is not None
        return 2 * n_k * self.size.context_dim * self.size.kv_heads * self.size.value_dim
