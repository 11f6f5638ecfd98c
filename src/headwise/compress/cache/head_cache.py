"""HeadCache: a cache of keys and values with a budget for every head."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, get_layer_types_and_kwargs

from headwise.compress.cache.budgets import Amount, Budget, Shape, as_budget
from headwise.compress.cache.layer import HeadLayer
from headwise.compress.cache.makers import Bits, makers_of
from headwise.compress.cache.policy import Policy
from headwise.compress.cache.rules import Rules
from headwise.compress.cache.silent import SilentLayer
from headwise.compress.structure.nothing import NoAttention
from headwise.models import view
from headwise.models.errors import UnsupportedModelError
from headwise.models.implementation import implementation
from headwise.models.interface import original
from headwise.models.structure import AttentionView
from headwise.models.switching import hold

SLIDING = ("sliding_attention", "reference_sliding_attention")
"""What transformers calls a layer with a sliding window that is all it has."""


class HeadCache(Cache):
    """A cache for `model.generate(..., past_key_values=HeadCache(model, budget=0.25))`.

    `budget`: what each row (a key-value head of a sequence) keeps: a share of the tokens seen
    (float), a number of tokens (int), a table (layers, kv_heads) of either, or a `Budget`.
    `policy`: which entries those are; `ObservationWindow()` (SnapKV) where none is given. `bits`:
    8, 4 or 2 to store keys and values quantised, (8, 4) for keys and values, a `Coding`, or a list
    with one of them (or None) for each layer, or `LayerBits`. `sinks`, `window`: so many first and
    newest entries of a row stay in any case. `step`: rows keep a multiple of so many, which lets
    them share memory and calls. `slack`: tokens decoded between two evictions, by which rows may
    exceed their budget (None: 64, or a 32nd of the longest row); a prefill, or each longer chunk
    of it, is cut to the budget layer by layer while it runs.

    What is kept is ragged: rows that hold as many entries are stacked in a block, and a layer
    attends to its blocks by itself, with positions and validity of its own. So the model's
    attention is ours as long as the cache lives: until `close()`, the end of a `with` block, or
    the cache's end. Meanwhile the model computes what it did before wherever this cache is not
    involved. Positions are those of the tokens in the whole sequence.

    Serves batches with padding, grouped heads, sliding windows, learned sinks, soft-capped
    scores, beams, chunked prefill, several tokens in a step, and copies (`copy.deepcopy`), from
    which several continuations of a prefix can start. For an encoder-decoder:
    `EncoderDecoderCache(HeadCache(model, ...), DynamicCache())`.

    Raises UnsupportedModelError for a model whose attention cannot be exchanged or whose layers
    hold something else than keys and values, ValueError for a budget that does not fit it.
    """

    layers: list[HeadLayer]  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        budget: Amount | Budget | Tensor = 1.0,
        policy: Policy | None = None,
        bits: Bits = None,
        sinks: int = 4,
        window: int = 32,
        step: int = 16,
        slack: int | None = None,
    ) -> None:
        for name, number, least in (
            ("sinks", sinks, 0),
            ("window", window, 1),
            ("step", step, 1),
            ("slack", slack, 1),
        ):
            if number is not None and number < least:
                raise ValueError(f"HeadCache({name}={number}): at least {least} is expected")
        windows = _windows(model)
        attentions = _attentions(model, len(windows))
        by_layer = {attention.layer: attention for attention in attentions}
        there = [by_layer.get(layer) for layer in range(len(windows))]
        shape = Shape(
            tuple(0 if one is None else one.heads for one in there),
            tuple(0 if one is None else one.cached_heads for one in there),
            tuple(() if one is None else one.key_value_of for one in there),
        )
        if policy is None:
            from headwise.compress.cache.policies.observation_window import ObservationWindow

            policy = ObservationWindow()
        rules = Rules(
            policy,
            as_budget(budget).fitted(shape),
            sinks,
            window,
            step,
            slack,
            makers_of(bits, len(windows)),
        )
        kinds = [SilentLayer if one is None else HeadLayer for one in there]
        layers: list[Any] = [
            kind(i, w, rules) for i, (kind, w) in enumerate(zip(kinds, windows, strict=True))
        ]
        super().__init__(layers=layers)
        self._hold(model, attentions)

    def _hold(self, model: nn.Module, attentions: Sequence[AttentionView]) -> None:
        self._model = weakref.ref(model)
        self._attentions = [weakref.ref(attention.module) for attention in attentions]
        release = hold(model, attentions, cache=True)
        self._release = weakref.finalize(self, release)

    # -- transformers ------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """New keys and values of a layer `(batch, kv_heads, m, d)`; the keys returned are for the
        attention of the model that this cache was made for, which computes over all entries."""
        if not self._release.alive:
            raise RuntimeError("this HeadCache is closed: the model's attention is its own again")
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 where there are none yet."""
        return max(len(layer.held.real) for layer in self.layers) or -1

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadCache:
        model = self._model()
        if model is None:
            raise RuntimeError("the model of this HeadCache is gone")
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        made.layers = [layer.copied() for layer in self.layers]
        made._hold(model, _attentions(model, len(self.layers)))
        return made

    # -- the model's attention ---------------------------------------------------------------

    def close(self) -> None:
        """Give the model its attention back. The entries stay, but cannot be attended to."""
        self._release()

    def __enter__(self) -> HeadCache:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    # -- what is held ------------------------------------------------------------------------

    def nbytes(self) -> int:
        """Bytes of every tensor held: keys, values, positions, what the policy notes, the newest
        queries where it wants them, and room to spare."""
        return sum(layer.held.nbytes() for layer in self.layers)

    def kept(self, layer: int) -> list[list[int]]:
        """For every row of a layer (sequence * kv_heads + head) the places of its entries in the
        sequence, ascending; padding is not among them."""
        return self.layers[layer].held.kept()

    def summary(self) -> str:
        """A line for each layer: entries of its rows, blocks, bytes."""
        lines = [f"{self.get_seq_length()} tokens seen, {self.nbytes():,} bytes held"]
        for layer in self.layers:
            counts = [len(places) for places in layer.held.kept()] or [0]
            kind = f", window {layer.sliding_window}" if layer.is_sliding else ""
            mean = sum(counts) / len(counts)
            lines.append(
                f"layer {layer.index}: {min(counts)} to {max(counts)} entries a row, mean "
                f"{mean:.0f}, {len(layer.held.blocks)} blocks, {layer.held.nbytes():,} bytes{kind}"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        rules: Rules = self.layers[0].rules
        return (
            f"HeadCache({rules.budget!r}, {rules.policy!r}, {len(self.layers)} layers, "
            f"{self.get_seq_length()} tokens seen, {self.nbytes():,} bytes)"
        )


def _windows(model: nn.Module) -> list[int | None]:
    """The sliding window of each layer, None where it has none."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no transformers model, which is what a HeadCache is for"
        )
    kinds, settings = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    for layer, kind in enumerate(kinds):
        if kind not in ("full_attention", *SLIDING):
            raise UnsupportedModelError(
                f"layer {layer} of {type(model).__name__} is of the kind {kind!r}. A HeadCache "
                "holds keys and values of full and sliding-window attention"
            )
    return [more.get("sliding_window") for more in settings]


def _attentions(model: nn.Module, layers: int) -> list[AttentionView]:
    """The self-attention of each layer that has a cache; none of a layer that has lost its own."""
    found = [a for a in view(model).attentions if a.kind == "self" and a.causal]
    lost = {m.layer_idx for m in model.modules() if isinstance(m, NoAttention) and m.cached}
    stacks = list(dict.fromkeys(attention.stack for attention in found))
    for stack in stacks:
        mine = [attention for attention in found if attention.stack == stack]
        if [attention.layer for attention in mine] == [n for n in range(layers) if n not in lost]:
            return [_checked(attention) for attention in mine]
    raise UnsupportedModelError(
        f"{type(model).__name__} has {layers} layers with a cache, and causal self-attentions were "
        f"found in {len(found)}: one is expected in each"
    )


def _checked(attention: AttentionView) -> AttentionView:
    before = implementation(attention.module)
    reason = attention.observable
    if reason is None and original(attention.module, before) is None:
        reason = f"its attention {before!r} was not found"
    if reason is not None:
        raise UnsupportedModelError(f"a HeadCache cannot serve {attention.name}: {reason}")
    return attention
