"""The matrices of a feed-forward part, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from headwise.compress.structure.slicing import check_sliceable
from headwise.models.errors import UnsupportedModelError
from headwise.models.projections import child, features_first, is_projection
from headwise.models.spots import down_projection
from headwise.models.structure import LayerView, ModelView

UP = (
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "c_fc",
    "dense_h_to_4h",
    "fc1",
    "fc_in",
    "wi",
    "wi_0",
    "wi_1",
    "Wi",
    "w1",
    "w3",
    "lin1",
    "linear1",
    "intermediate.dense",
    "ffn",
    "gate",
    "up",
)
"""Children that project the residual to the channels."""

_COUNTS = ("intermediate_size", "ffn_dim", "hidden", "hidden_features", "hidden_dim")


@dataclass(frozen=True, eq=False)
class FeedForward:
    """`down` reads `channels` features; each of `ups` gives them once, or twice in two blocks
    (a gate and what it multiplies, in one matrix)."""

    layer: LayerView
    ups: tuple[nn.Module, ...]
    down: nn.Module
    channels: int

    @property
    def thresholds(self) -> nn.Module | None:
        """What holds a threshold for every channel, as `threshold_activations` makes it."""
        found = self.layer.mlp
        return found if isinstance(getattr(found, "thresholds", None), Tensor) else None

    def check_sliceable(self) -> None:
        """Raises UnsupportedModelError for matrices that cannot be cut."""
        for module in (*self.ups, self.down):
            check_sliceable(module, f"layer {self.layer.index}")

    def rows(self, up: nn.Module, kept: list[int]) -> list[int]:
        """The output features of `up` that belong to some channels."""
        blocks = features_first(up).shape[0] // self.channels
        return [block * self.channels + c for block in range(blocks) for c in kept]

    def say_count(self, channels: int) -> None:
        for module in (self.layer.mlp, self.layer.module):
            for name in _COUNTS:
                if getattr(module, name, None) == self.channels:
                    setattr(module, name, channels)


def feed_forward(layer: LayerView) -> FeedForward:
    """Raises UnsupportedModelError where the matrices were not found, where there are several
    (experts), and where something beside them has a number for every channel (a norm inside)."""
    down = down_projection(layer)
    owner = layer.mlp if layer.mlp is not None else layer.module
    channels = features_first(down).shape[1]
    ups = []
    for name in UP:
        found = child(owner, name)
        if found is None or found is down or not is_projection(found):
            continue
        if features_first(found).shape[0] in (channels, 2 * channels):
            ups.append(found)
    what = type(layer.mlp or layer.module).__name__
    if not ups:
        raise UnsupportedModelError(
            f"layer {layer.index}: the matrices that feed the {channels} channels of {what} were "
            f"not found among its children ({', '.join(n for n, _ in owner.named_children())})"
        )
    known = {id(p) for module in (*ups, down) for p in module.parameters()}
    known |= {id(p) for attention in layer.attentions for p in attention.module.parameters()}
    for path, tensor in owner.named_parameters():
        by_channel = bool(tensor.dim()) and tensor.shape[-1] in (channels, 2 * channels)
        inside = layer.mlp is not None or channels not in (0, features_first(down).shape[0])
        if id(tensor) not in known and by_channel and inside:
            raise UnsupportedModelError(
                f"layer {layer.index}: {path} {tuple(tensor.shape)} of {what} may hold something "
                f"for each of the {channels} channels, and how it changes when some go is not known"
            )
    return FeedForward(layer, tuple(ups), down, channels)


def layers_of(look: ModelView, stack: str | None) -> list[LayerView]:
    """The layers of a stack, which has to be named where there are several.

    Raises ValueError for a stack that the model does not have.
    """
    if stack is None and len(look.stacks) > 1:
        raise ValueError(f"the model has the stacks {', '.join(look.stacks)}; say stack= which")
    if stack is not None and stack not in look.stacks:
        raise ValueError(f"stack={stack!r}: the model has the stacks {', '.join(look.stacks)}")
    return [one for one in look.layers if one.stack == (stack or look.stacks[0])]
