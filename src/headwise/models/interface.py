"""Our attention function, as transformers' attention interface calls it.

Both functions, attention and mask, are registered under one name at first use. Without the mask
function transformers would hand over no mask at all, and causality, padding and windows would
vanish without a word.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from headwise.maps import Bias, Causal, Full, Pattern, Window, attend
from headwise.models.cached import CachedKeys
from headwise.models.errors import UnknownAttentionArgumentError
from headwise.models.implementation import implementation, serves_caches
from headwise.models.masks import PatternMask, mask_function, pattern_of
from headwise.models.places import Places

NAME = "headwise"

INERT = frozenset(
    {
        "cache_position",
        "deterministic",  # of a flash kernel's backward pass
        "encoder_hidden_states",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_ids",
        "return_dict",
        "sliding_window",  # for flash kernels; the mask says it to everybody else
        "use_cache",
    }
)
"""Arguments that do not change what an attention with a mask computes."""

PACKING = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})
"""Lengths of packed sequences: flash kernels obey them, everybody else looks at the mask."""


class Terms(NamedTuple):
    """What shapes the map, beside queries and keys."""

    pattern: Pattern
    scale: float | None
    bias: Tensor | Bias | None
    sinks: Tensor | None
    softcap: float | None
    keys: Tensor | None
    places: Places


class Checker(Protocol):
    """Who has to be sure that the terms are what the model means."""

    def check(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        terms: Terms,
        given: dict[str, Any],
        before: str,
    ) -> None:
        """Raise where `terms` are not what the model's own function, named `before`, computes
        from what it is `given`."""
        ...


class Attended(NamedTuple):
    """What an attention computed. `query` ... `terms` are those of all heads together, and may
    be left out where nobody asked for them."""

    out: Tensor
    lse: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    terms: Terms


class Editor(Checker, Protocol):
    """Who changes what an attention computes."""

    def active(self, module: nn.Module) -> bool:
        """Whether the call that is coming is to be changed."""
        ...

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, terms: Terms, whole: bool
    ) -> Attended:
        """The changed attention; `whole`: its map is wanted, beside its output."""
        ...


class Observer(Checker, Protocol):
    """Who wants to see the attentions of a model while it runs."""

    def seen(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor | None,
        terms: Terms,
    ) -> None: ...


OBSERVERS: dict[int, Observer] = {}
"""id of an attention module -> who observes it now."""

EDITORS: dict[int, Editor] = {}
"""id of an attention module -> who edits it now, or might."""


def register() -> None:
    """Make the name known to transformers: the attention and, always with it, the mask."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **given: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query `(batch, heads, n_q, d)`, key and value with
    their own number of heads, to `(batch, n_q, heads, d_v)`."""
    observer, editor = OBSERVERS.get(id(module)), EDITORS.get(id(module))
    if observer is None and editor is None and not serves_caches(module):
        raise RuntimeError(
            f"{type(module).__name__} is set to the attention {NAME!r}, which works only inside "
            "`with headwise.models.observe(view, ...)` or `with headwise.swap(model, ...)` and for "
            "the modules that the model had then: begin anew if modules were exchanged; "
            "model.set_attn_implementation(...) leaves it"
        )
    before = implementation(module)
    edits = editor is not None and editor.active(module)
    if isinstance(key, CachedKeys):
        if observer is not None or edits:
            raise ValueError(
                f"{type(module).__name__} reads a HeadCache, which computes its attention by "
                "itself: it cannot be observed or edited at the same time; use another cache"
            )
        given = {**given, "scaling": scaling, "dropout": dropout}
        return key.layer.attend(module, query, value, attention_mask, given, before), None
    if observer is None and not edits:
        theirs = original(module, before)
        if theirs is not None:
            given = {**given, "scaling": scaling, "dropout": dropout}
            return unchanged(theirs, module, query, key, value, attention_mask, given)
    if dropout and module.training:
        raise ValueError(
            f"{type(module).__name__} drops out attention weights (it is in training mode), so "
            "its map changes from call to call: call model.eval() first"
        )
    if query.shape[0] != key.shape[0]:  # learned queries may be one for the whole batch
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (t.expand(batch, -1, -1, -1) for t in (query, key, value))
    terms = interpret(module, query, key, attention_mask, scaling, given, before)
    given = {**given, "scaling": scaling}
    if key.dtype != query.dtype:
        key = key.to(query.dtype)
    checker: Checker | None = observer or editor
    assert checker is not None
    checker.check(module, query, key, value, terms, given, before)
    if edits and editor is not None:
        done = editor.attend(query, key, value, terms, observer is not None)
    else:
        out, lse = attend(
            query, key, value, terms.pattern, terms.scale, terms.bias, terms.sinks, terms.softcap
        )
        done = Attended(out, lse, query, key, value, terms)
    if observer is not None:
        observer.seen(module, done.query, done.key, done.value, done.out, done.lse, done.terms)
    return done.out.transpose(1, 2).contiguous().to(value.dtype), None


def unchanged(
    theirs: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    given: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """What the model would have computed by itself, from the mask that it would have had."""
    if isinstance(attention_mask, PatternMask):
        pattern, attention_mask = attention_mask.pattern, attention_mask.theirs()
        # a model may have said that it is not causal because it saw a mask (Moonshine does)
        misled = attention_mask is None and given.get("is_causal") is False
        if misled and query.shape[2] > 1 and not isinstance(pattern, Full):
            given["is_causal"] = True
    out, weights = theirs(module, query, key, value, attention_mask, **given)
    return out, weights


def interpret(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    given: dict[str, Any],
    before: str,
) -> Terms:
    """What a call means, given the implementation that the model had `before`.

    Raises UnknownAttentionArgumentError for an argument (other than None) that is not known.
    """
    given = dict(given)
    is_causal = given.pop("is_causal", None)
    softcap, sinks = given.pop("softcap", None), given.pop("s_aux", None)
    bias = given.pop("position_bias", None)
    known = INERT if "flash" in before else INERT | PACKING
    unknown = sorted(name for name in given if given[name] is not None and name not in known)
    if unknown:
        raise UnknownAttentionArgumentError(
            f"{type(module).__name__} hands {', '.join(unknown)} to its attention. What that does "
            "to the result is not known here, so it is not observed; known are "
            "is_causal, position_bias, s_aux, softcap and what changes nothing"
        )
    n_q, n_k = query.shape[2], key.shape[2]
    keys: Tensor | None = None
    pattern: Pattern
    places = getattr(attention_mask, "places", None) or Places.at_the_end(n_q, n_k)
    if attention_mask is not None:
        pattern, extra, keys = pattern_of(attention_mask, n_q, n_k)
        if extra is not None:
            bias = extra if bias is None else bias + extra
    else:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        # eager functions add the mask they are given and nothing else; all others go by
        # is_causal, which SDPA aligns at the first key
        pattern = Full()
        if is_causal and n_q > 1 and before != "eager":
            pattern = Window(None, n_q - n_k) if before == "sdpa" and n_q != n_k else Causal()
    if bias is not None and not bool(torch.any(bias)):
        bias = None  # T5 adds zeros to its cross-attention; without them a kernel can take it
    if sinks is not None:
        sinks = sinks.reshape(-1)
    return Terms(pattern, scaling, bias, sinks, softcap, keys, places)


def original(module: nn.Module, before: str) -> Callable[..., Any] | None:
    """The function that the module would call under the implementation `before`, if known."""
    from transformers import AttentionInterface

    if before == "eager":
        scope = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
        found: Callable[..., Any] | None = scope.get("eager_attention_forward")
        return found
    return AttentionInterface().get(before, None)
