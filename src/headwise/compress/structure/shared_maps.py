"""Layers that look through an earlier layer's attention map.

    similarity = map_similarity(model, texts, tokenizer=tokenizer)   # (layers, layers)
    share_attention(model, similar_block(similarity, size=4))        # {10: 9, 11: 9, 12: 9}

EchoAtt (arXiv 2409.14595, section 3): inner layers of large models look at the same tokens, so a
block of them can use the queries and keys of its first layer and keep only values of their own.
W_Q and W_K of the others are deleted, and decoding does not cache their keys. The map itself is
computed again in each layer, from the source's queries and keys: fused kernels never hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from headwise.compress.step import Step, take
from headwise.compress.structure.recalled import Recalled, RecalledFused, RecalledProject
from headwise.instruments.examples import model_view, read_examples
from headwise.instruments.run import evaluating
from headwise.maps import AttentionMap
from headwise.models import AttentionReading, ModelView, observe
from headwise.models.errors import UnsupportedModelError
from headwise.models.structure import AttentionView
from headwise.parts import Attention

NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_norm", "key_norm")
"""Children that stand between a projection and the product."""


@dataclass(frozen=True)
class ShareAttention(Step):
    """`sources`: (layer, the earlier layer whose queries and keys it uses), ..."""

    sources: tuple[tuple[int, int], ...]

    def apply(self, model: nn.Module) -> None:
        look = model_view(model)
        pairs = _checked(look, dict(self.sources))
        for mine, theirs in pairs:
            if isinstance(mine.module, Attention):
                assert isinstance(theirs.module, Attention)
                own, source = mine.module.project, theirs.module.project
                mine.module.project = RecalledProject(own, source)
            else:
                _recall(mine, theirs)
        if not isinstance(pairs[0][0].module, Attention):
            _hear(pairs)


def share_attention(model: nn.Module, sources: Mapping[int, int]) -> None:
    """Let layers use the attention map of an earlier one, in place: {layer: source layer}.

    W_Q and W_K of these layers are gone, and their keys are not cached (for transformers models:
    in DynamicCache and StaticCache, alone or beside an encoder's; another cache is refused when it
    is handed over). W_V and W_O
    stay. `headwise.save` keeps it. For models with separate projections (Llama and its kin), with
    a fused [queries | keys | values] one (GPT-2) and for attentions of `headwise.parts`. Other
    changes of these layers (pruned heads) come first: what is shared has one owner.

    Raises ValueError for layers that are not there, come after, share already or have another
    shape, window or scale than their source; UnsupportedModelError where projections were not
    found. Nothing is changed then.
    """
    take(model, ShareAttention(tuple(sorted(sources.items()))))


@torch.no_grad()
def map_similarity(
    model: nn.Module | ModelView,
    inputs: Any,
    tokenizer: Any | None = None,
    tokens: int | None = None,
    windows: int | None = None,
    batch_size: int = 4,
) -> Tensor:
    """Mean cosine `(layers, layers)` of two layers' attention rows, head by head, mean over heads,
    queries and examples (EchoAtt, figure 2). NaN where the numbers of heads differ.

    `inputs` as `headwise.see` takes them. Keeps the queries and keys of all layers of a batch, and
    never a map. Padded rows count.
    """
    look = model_view(model)
    stack = _stack(look)
    total = torch.zeros(len(stack), len(stack), dtype=torch.float64)
    count = 0
    maps: dict[int, AttentionMap] = {}
    number = {id(a.module): place for place, a in enumerate(stack)}

    def read(seen: AttentionReading) -> None:
        if id(seen.attention.module) in number:
            maps[number[id(seen.attention.module)]] = seen.map

    with evaluating(look.model), observe(look, read):
        for batch in read_examples(
            look.model, inputs, tokenizer, None, tokens, windows, batch_size
        ):
            look.model(**batch.given)
            for a in range(len(stack)):
                for b in range(a, len(stack)):
                    alike = torch.tensor(torch.nan)
                    if maps[a].scores.q.shape == maps[b].scores.q.shape:
                        alike = maps[a].cosine(maps[b])[:, :, 1:].mean()  # row 0 sees one key
                    total[a, b] += float(alike) * len(batch)
            count += len(batch)
            maps.clear()
    return (total + total.triu(1).T) / count


def similar_block(similarity: Tensor, size: int, ends: int = 1) -> dict[int, int]:
    """The `size` neighbouring layers that look most alike, as {layer: first layer of the block}:
    the greatest mean similarity of the first to the others. The `ends` first and last layers are
    left alone. Raises ValueError for a block that does not fit between them."""
    last = len(similarity) - ends - size
    if size < 2 or last < ends:
        raise ValueError(
            f"a block of {size} layers does not fit into {len(similarity)} layers without the "
            f"{ends} first and last: give a size of 2 or more, or fewer ends"
        )
    alike = {a: float(similarity[a, a + 1 : a + size].mean()) for a in range(ends, last + 1)}
    first = max(alike, key=lambda a: alike[a])
    return dict.fromkeys(range(first + 1, first + size), first)


# -- how it is done -------------------------------------------------------------------------------


def _stack(look: ModelView) -> list[AttentionView]:
    """The self-attentions of the stack that gives the output, one a layer."""
    stack = next((s for s in ("decoder", "text") if s in look.stacks), look.stacks[-1])
    return [a for a in look.attentions if a.stack == stack and a.kind == "self"]


def _checked(look: ModelView, sources: dict[int, int]) -> list[tuple[AttentionView, AttentionView]]:
    by_layer = {a.layer: a for a in _stack(look)}
    if not sources:
        raise ValueError("sources= is empty: say which layer uses which, such as {5: 4, 6: 4}")
    found = []
    for layer, source in sources.items():
        absent = [n for n in (layer, source) if n not in by_layer]
        if absent:
            raise ValueError(f"there is no layer {absent[0]}; attention is in {sorted(by_layer)}")
        if source >= layer:
            raise ValueError(f"layer {layer} cannot use layer {source}, which runs after it")
        if source in sources or _shares(by_layer[source]):
            raise ValueError(
                f"layer {layer}: layer {source} has no map of its own, name its source"
            )
        if _shares(by_layer[layer]):
            raise ValueError(f"layer {layer} shares a map already")
        _alike(by_layer[layer], by_layer[source])
        found.append((by_layer[layer], by_layer[source]))
    return found


def _shares(attention: AttentionView) -> bool:
    return any(
        isinstance(m, Recalled | RecalledFused | RecalledProject)
        for m in attention.module.modules()
    )


def _alike(mine: AttentionView, theirs: AttentionView) -> None:
    for what in ("heads", "kv_heads", "head_dim"):
        a, b = getattr(mine, what), getattr(theirs, what)
        if a != b:
            raise ValueError(f"layer {mine.layer} has {what} {a}, layer {theirs.layer} has {b}")
    for name in ("sliding_window", "scaling", "is_causal"):
        a, b = (getattr(one.module, name, None) for one in (mine, theirs))
        if a != b:
            raise ValueError(f"layer {mine.layer} has {name} {a}, layer {theirs.layer} has {b}")
    for one in (mine, theirs):
        if isinstance(one.projections, str):
            raise UnsupportedModelError(f"{one.name}: {one.projections}")
        query, value = one.projections.query, one.projections.value
        if query.by_head is not None:
            raise UnsupportedModelError(
                f"{one.name}: its fused projection has queries, keys and values head by head; "
                "known is [queries | keys | values]"
            )
        fused = query.module is value.module
        if fused != (one.projections.key.module is value.module):
            raise UnsupportedModelError(f"{one.name}: only two of its projections are fused")


def _recall(mine: AttentionView, theirs: AttentionView) -> None:
    """Put the recalling modules in place of the projections of a transformers attention."""
    assert not isinstance(mine.projections, str)
    assert not isinstance(theirs.projections, str)
    own, source = mine.projections, theirs.projections
    if own.query.module is own.value.module:
        new = RecalledFused(own.query.module, source.query.module, own.value.start)
        _put(mine.module, own.query.module, new)
        return
    _put(mine.module, own.query.module, Recalled(source.query.module))
    _put(mine.module, own.key.module, Recalled(source.key.module))
    for name in NORMS:
        norm = mine.module._modules.get(name)
        if norm is not None and not isinstance(norm, nn.Identity):
            setattr(mine.module, name, Recalled(cast(nn.Module, getattr(theirs.module, name))))


def _put(owner: nn.Module, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, module in owner.named_modules() if module is old)
    owner.set_submodule(name, new)


def _hear(pairs: list[tuple[AttentionView, AttentionView]]) -> None:
    """Keys of the past, by hooks on the attentions."""
    from headwise.compress.structure.shared_keys import Heard

    heard: dict[int, Heard] = {}
    for mine, theirs in pairs:
        if id(theirs.module) not in heard:
            one = heard[id(theirs.module)] = Heard()
            theirs.module.register_forward_pre_hook(one.at_source, with_kwargs=True)
        one = heard[id(theirs.module)]
        one.readers += 1
        mine.module.register_forward_pre_hook(one.at_sharer, with_kwargs=True)
