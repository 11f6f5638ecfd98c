"""What a model is made of, as the instruments see it: stacks of layers, their attentions, heads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from headwise.models.errors import UnsupportedModelError
from headwise.models.projections import Projections, features_first


@dataclass(frozen=True, eq=False)
class AttentionView:
    """One attention of a model at one place of its execution.

    A module that runs several times (ALBERT) has one AttentionView for each time.

    `name`: path of the module. `layer`: 0-based in its `stack`. `kind`: "self" or "cross".
    `norm`: the module whose output is the attention's input, None where the residual itself is
    (post-norm models, or a norm that was not found). `causal`: whether it looks back only, as
    far as the module says; the pattern of its map is what counts.
    """

    name: str
    module: nn.Module
    layer: int
    stack: str
    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    norm: nn.Module | None = None
    causal: bool = False
    projections: Projections | str = field(default="", repr=False)
    observable: str | None = field(default=None, repr=False)
    """None, or the reason why this attention cannot be observed."""

    def _found(self) -> Projections:
        if isinstance(self.projections, str):
            raise UnsupportedModelError(f"{self.name}: {self.projections}")
        return self.projections

    @property
    def cached_heads(self) -> int:
        """Key-value heads that a cache holds: fewer than `kv_heads`, which the attention function
        is handed, where groups of query heads have become unequal."""
        found = self.projections
        return self.kv_heads if isinstance(found, str) else found.key.heads

    @property
    def key_value_of(self) -> tuple[int, ...]:
        """For each query head the number of the cached key-value head that it reads."""
        found, held = self.projections, self.cached_heads
        read = None if isinstance(found, str) else found.key.read
        return read or tuple(h * held // self.heads for h in range(self.heads))

    def query_weight(self) -> Tensor:
        """W_Q `(heads, head_dim, width)`, a view of the parameter: q_h = x W_Q[h]^T.

        Raises UnsupportedModelError when the projections were not found; the other weights too.
        """
        return self._found().query.weight

    def key_weight(self) -> Tensor:
        """W_K `(kv_heads, head_dim, in_width)`; in cross-attention, in_width is the encoder's."""
        return self._found().key.weight

    def value_weight(self) -> Tensor:
        """W_V `(kv_heads, value_dim, in_width)`."""
        return self._found().value.weight

    def output_weight(self) -> Tensor:
        """W_O `(heads, width, value_dim)`: the residual receives the sum of o_h W_O[h]^T."""
        found = self._found()
        if found.output is None:
            raise UnsupportedModelError(f"{self.name}: no output projection was found")
        return found.output_weight

    def query_bias(self) -> Tensor | None:
        """`(heads, head_dim)` or None."""
        return self._found().query.bias

    def key_bias(self) -> Tensor | None:
        """`(kv_heads, head_dim)` or None."""
        return self._found().key.bias

    def value_bias(self) -> Tensor | None:
        """`(kv_heads, value_dim)` or None."""
        return self._found().value.bias

    def output_bias(self) -> Tensor | None:
        """`(width,)` or None; it belongs to no head."""
        bias: Tensor | None = getattr(self._found().output, "bias", None)
        return bias


@dataclass(frozen=True, eq=False)
class LayerView:
    """One layer at one place of the execution, with its attentions in order (self, cross).

    `mlp`: the feed-forward part where it is one module, None where it is spread over the layer.
    `attention_ends`, `mlp_ends`: modules whose output is what is added to the residual.
    """

    index: int
    stack: str
    module: nn.Module
    attentions: tuple[AttentionView, ...]
    mlp: nn.Module | None = None
    attention_ends: tuple[nn.Module, ...] = field(default=(), repr=False)
    mlp_ends: tuple[nn.Module, ...] = field(default=(), repr=False)


@dataclass(frozen=True, eq=False)
class ModelView:
    """Where everything is. `attentions` and `layers` are in order of execution: stack by stack,
    layer by layer.

    `family`: the model type that its config states, or the class name. `final_norm`: what
    normalises the residual before the unembedding. `causal`: whether the stack that produces
    the output looks back only. `owners`: for each stack, the module that runs its layers.
    """

    model: nn.Module
    family: str
    attentions: tuple[AttentionView, ...]
    layers: tuple[LayerView, ...]
    width: int
    causal: bool
    stacks: tuple[str, ...]
    final_norm: nn.Module | None = None
    owners: dict[str, nn.Module] = field(default_factory=dict, repr=False)

    @property
    def embedding(self) -> Tensor | None:
        """Token embedding `(vocabulary, width)`, or None (vision, or a factorised embedding)."""
        getter = getattr(self.model, "get_input_embeddings", None)
        module = _asked(getter) if getter is not None else self._only_embedding()
        return self._table(module)

    @property
    def unembedding(self) -> Tensor | None:
        """Output embedding `(vocabulary, width)`, or None (no language head)."""
        getter = getattr(self.model, "get_output_embeddings", None)
        module = _asked(getter) if getter is not None else getattr(self.model, "lm_head", None)
        return self._table(module)

    def _only_embedding(self) -> nn.Module | None:
        found = [m for m in self.model.modules() if isinstance(m, nn.Embedding)]
        return found[0] if found else None

    def _table(self, module: Any) -> Tensor | None:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            return None
        table = features_first(module)
        return table if table.shape[1] == self.width else None

    def __repr__(self) -> str:
        heads = sum(a.heads for a in self.attentions)
        return (
            f"ModelView({type(self.model).__name__}, stacks={self.stacks}, "
            f"layers={len(self.layers)}, heads={heads}, width={self.width})"
        )


def _asked(getter: Any) -> nn.Module | None:
    """What a model answers, None where it raises because it has no such part."""
    try:
        answer = getter()
    except NotImplementedError:
        return None
    return answer if isinstance(answer, nn.Module) else None
