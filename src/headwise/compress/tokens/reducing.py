"""`reduce_tokens`: fewer tokens from some layers on, for a while or for good."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from headwise.compress.step import Step
from headwise.compress.tokens.encoder import VisionEncoder, vision_encoder
from headwise.compress.tokens.matching import Similarity
from headwise.compress.tokens.ranking import ClassAttention, Flow, Random, ReceivedMass
from headwise.compress.tokens.record import Record
from headwise.compress.tokens.reducer import PLACES, Count, Reducer
from headwise.compress.tokens.reduction import Reduction
from headwise.models import ModelView, view
from headwise.models.errors import UnsupportedModelError

WAYS: dict[str, type[Reduction]] = {
    "class": ClassAttention,
    "received": ReceivedMass,
    "similar": Similarity,
    "flow": Flow,
    "random": Random,
}
"""The ways that have names, which is what a saved model can remember."""

_REMEMBERED = "headwise_reducer"


@contextmanager
def reduce_tokens(
    model: nn.Module | ModelView,
    keep: float | None = None,
    schedule: Mapping[int, Count] | None = None,
    how: str | Reduction = "class",
    place: str | None = None,
    special: int | None = None,
) -> Iterator[Record]:
    """While this lasts, a vision encoder goes on with fewer tokens after some of its layers.

        with reduce_tokens(model, keep=0.7, how="similar") as record:
            logits = model(pixel_values).logits
        record.kept(11)  # (batch, patches): the token in which each patch ended, -1 for none

    `keep`: share of the patches that stay at each of three places, a quarter, half and three
    quarters of the way up (EViT, arXiv 2202.07800, section 4.1). `schedule`: layer (0-based) ->
    a count of patches, a share of those that are there, or None where the reduction chooses
    itself. `how`: class (attention of the class token, the rest fused into one token), received,
    similar (ToMe), flow (FlowCut), random (the control), or a Reduction. `place`: before, middle
    (between attention and MLP) or after the layer; by default the reduction's own.
    `special`: tokens in front that always stay; by default the class, distillation and register
    tokens that the model has.

    Tensors are really shorter from there on. Hugging Face encoders as they come (ViT, DeiT,
    DINOv2, CLIP, SigLIP ...) and our VisionPatches; gradients pass. Undone at the end, also after
    an exception. Raises ValueError for a schedule that makes no sense, UnsupportedModelError for a
    model whose layers ask where tokens stand, or whose parts were not found.
    """
    look = model if isinstance(model, ModelView) else view(model)
    encoder = vision_encoder(look, special)
    reduction = _reduction(how)
    reducer = _made(encoder, _schedule(encoder, keep, schedule), reduction, place)
    try:
        reducer.attach(encoder)
        yield reducer.record
    finally:
        reducer.detach()


@dataclass(frozen=True)
class ReduceTokens(Step):
    """The same for good: `take(model, ReduceTokens.of(model, keep=0.7))`.

    `schedule`: (layer, count or share or None) pairs; `how`: a name from `WAYS`; `settings`: its
    (name, value) pairs; `place` and `special` as in `reduce_tokens`, "" and -1 where they are not
    said. The model's weights stay as they are; a model has at most one such step.
    """

    schedule: tuple[tuple[int, Count], ...]
    how: str = "class"
    settings: tuple[tuple[str, Any], ...] = ()
    place: str = ""
    special: int = -1

    @classmethod
    def of(
        cls,
        model: nn.Module,
        keep: float | None = None,
        schedule: Mapping[int, Count] | None = None,
        how: str | Reduction = "class",
        place: str | None = None,
        special: int | None = None,
    ) -> Self:
        """The step that does what `reduce_tokens` with these arguments does; raises as it does,
        and ValueError for a reduction that has no name in `WAYS`."""
        reduction = _reduction(how)
        name = next((n for n, kind in WAYS.items() if type(reduction) is kind), None)
        if name is None:
            raise ValueError(
                f"{type(reduction).__name__} has no name in headwise.compress.tokens.reducing."
                "WAYS, so that a saved model could not remember it: use it in reduce_tokens"
            )
        encoder = vision_encoder(view(model), special)
        pairs = _schedule(encoder, keep, schedule)
        fields = dataclasses.fields(reduction)  # type: ignore[arg-type]
        settings = tuple((field.name, getattr(reduction, field.name)) for field in fields)
        return cls(
            tuple(pairs.items()), name, settings, place or "", -1 if special is None else special
        )

    def apply(self, model: nn.Module) -> None:
        if hasattr(model, _REMEMBERED):
            raise ValueError("this model's tokens are reduced already: one step says all layers")
        encoder = vision_encoder(view(model), None if self.special < 0 else self.special)
        if self.how not in WAYS:
            raise ValueError(f"how={self.how!r}: expected one of {', '.join(WAYS)}")
        reduction = WAYS[self.how](**dict(self.settings))
        schedule = _schedule(encoder, None, dict(self.schedule))
        reducer = _made(encoder, schedule, reduction, self.place or None)
        reducer.attach(encoder)
        setattr(model, _REMEMBERED, reducer)


def record_of(model: nn.Module) -> Record:
    """The record of a model whose tokens are reduced for good. Raises ValueError for others."""
    reducer = getattr(model, _REMEMBERED, None)
    if not isinstance(reducer, Reducer):
        raise ValueError(f"the tokens of this {type(model).__name__} are not reduced for good")
    return reducer.record


def stages(depth: int) -> tuple[int, ...]:
    """A quarter, half and three quarters of the way up: layers 3, 6 and 9 of 12."""
    return tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)}))


def _reduction(how: str | Reduction) -> Reduction:
    if isinstance(how, Reduction):
        return how
    if how not in WAYS:
        raise ValueError(f"how={how!r}: expected one of {', '.join(WAYS)}, or a Reduction")
    return WAYS[how]()


def _schedule(
    encoder: VisionEncoder, keep: float | None, schedule: Mapping[int, Count] | None
) -> dict[int, Count]:
    depth = len(encoder.layers)
    if (keep is None) == (schedule is None):
        raise ValueError(
            "say either keep= (a share, at three places) or schedule= ({layer: count or share})"
        )
    if schedule is not None:
        found: dict[int, Count] = dict(schedule)
    else:
        assert keep is not None
        found = dict.fromkeys(stages(depth), float(keep))
    if not found:
        raise ValueError("schedule={}: name a layer at least")
    for layer, wanted in found.items():
        if not 0 <= layer < depth:
            raise ValueError(f"schedule names layer {layer}; the encoder has 0 to {depth - 1}")
        count = isinstance(wanted, int) and not isinstance(wanted, bool) and wanted >= 1
        share = isinstance(wanted, float) and 0.0 < wanted <= 1.0
        if not (count or share or wanted is None):
            raise ValueError(
                f"layer {layer}: {wanted!r} is neither a count of patches (1, 2, ...) nor a share "
                "in (0.0, 1.0]"
            )
    return dict(sorted(found.items()))


def _made(
    encoder: VisionEncoder, schedule: dict[int, Count], reduction: Reduction, place: str | None
) -> Reducer:
    where = reduction.place if place is None else place
    if where not in PLACES:
        raise ValueError(f"place={where!r}: expected one of {', '.join(PLACES)}")
    if reduction.needs_class and not encoder.has_class:
        raise ValueError(
            f"{type(encoder.view.model).__name__} has no class token, whose attention "
            f"{type(reduction).__name__} goes by: take how='received' or 'similar'"
        )
    for layer in schedule:
        found = encoder.norm_before_mlp(layer) is not None and encoder.layers[layer].mlp_ends
        if where == "middle" and not found:
            raise UnsupportedModelError(
                f"layer {layer}: the place between attention and MLP was not found; use "
                "place='after'"
            )
        attention = encoder.attention(layer)
        if reduction.needs_map and isinstance(attention.projections, str):
            raise UnsupportedModelError(f"{attention.name}: {attention.projections}")
    return Reducer(encoder, schedule, reduction, where)
