"""What a model costs: counted, not measured, and cheap enough to be asked in a search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.compress.structure.low_rank import LowRank
from headwise.compress.structure.nothing import NoAttention
from headwise.compress.structure.recalled import Recalled, RecalledFused
from headwise.instruments.examples import model_view
from headwise.models import ModelView
from headwise.models.backbones.stack import Stack
from headwise.models.projections import child, features_first, is_projection
from headwise.models.structure import AttentionView, LayerView
from headwise.parts import Mixer
from headwise.parts.feed.base import Feed

_ONE_ROW = ("pooler", "classifier", "score", "visual_projection", "text_projection")
"""Modules outside of the layers that read one token of a sequence."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Cost:
    """What one forward pass over `batch` sequences takes.

    parameters: numbers that are learned, those that several modules share counted once. bytes:
    of them and of what else a checkpoint holds, packed weights as they are packed. flops:
    multiplications and additions in matrix products and attention, as
    `torch.utils.flop_counter` counts them (every score of the map, also those that a mask hides).
    cache_bytes_per_token: what one more token of one sequence adds to the cache of keys and
    values, as long as no sliding window is full.
    """

    parameters: int
    bytes: int
    flops: int
    cache_bytes_per_token: int


def cost(model: nn.Module | ModelView, tokens: int = 1024, batch: int = 1) -> Cost:
    """The costs of a model as it is, on any device, "meta" included.

    tokens: length of a sequence, in an encoder-decoder of both; images and spectrograms have as
    many as the model's position table says. Raises ValueError for less than one token.
    """
    if tokens < 1 or batch < 1:
        raise ValueError(f"tokens={tokens}, batch={batch}: expected 1 or more")
    look = model_view(model)
    weights = list({id(p): p for p in look.model.parameters()}.values())
    held = {id(t): t for t in look.model.state_dict(keep_vars=True).values()}
    return Cost(
        parameters=sum(p.numel() for p in weights),
        bytes=sum(_nbytes(t) for t in held.values() if isinstance(t, Tensor)),
        flops=batch * _flops(look, tokens),
        cache_bytes_per_token=_cache(look),
    )


def _nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor, of a packed one those of what it consists of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.numel() * tensor.element_size()
    return sum(_nbytes(getattr(tensor, name)) for name in flatten()[0])


def _flops(look: ModelView, tokens: int) -> int:
    """Of one sequence."""
    lengths = {stack: _length(look, stack, tokens) for stack in look.stacks}
    inside: set[int] = set()
    total = 0
    for layer in look.layers:  # a layer that runs several times counts each time
        owner = look.owners[layer.stack]
        if isinstance(owner, Stack):
            total += _own(owner, layer, lengths)
            for part in owner.modules():
                inside.add(id(part))
            continue
        total += _layer(look, layer, lengths)
        inside.update(id(part) for part in layer.module.modules())
    # what stands between nested lists of layers runs with its stack (ALBERT's mapping does not)
    output = look.stacks[-1] if len(look.stacks) == 1 else _output(look)
    single = "TokenClassification" not in type(look.model).__name__
    for name, module in look.model.named_modules():
        if id(module) in inside:
            continue
        size = _products(module)
        alone = single and any(part in name.split(".") for part in _ONE_ROW)
        if size:
            total += size * (1 if alone else lengths[output])
        elif isinstance(module, _CONVOLUTIONS):
            total += _convolution(look, name, module, lengths)
    return total


def _output(look: ModelView) -> str:
    return next((s for s in ("decoder", "text") if s in look.stacks), look.stacks[-1])


def _length(look: ModelView, stack: str, tokens: int) -> int:
    """Tokens of a stack: as asked for, or as its table of positions says for images and sound."""
    owner = look.owners[stack]
    around = [m for m in look.model.modules() if any(one is owner for one in m.modules())]
    config: Any = next((m.config for m in reversed(around) if hasattr(m, "config")), None)
    pictures = hasattr(config, "patch_size") and hasattr(config, "image_size")
    sound = hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins")
    if sound:
        return int(config.max_source_positions) if stack == "encoder" else tokens
    if not pictures:
        return tokens
    for part in reversed(around):
        for module in part.modules():
            for name in ("position_embeddings", "position_embedding"):
                table = getattr(module, name, None)
                table = table.weight if isinstance(table, nn.Embedding) else table
                if isinstance(table, Tensor):
                    return table.shape[-2]
    return tokens


def _layer(look: ModelView, layer: LayerView, lengths: dict[str, int]) -> int:
    n = lengths[layer.stack]
    # keys and values of cross-attention come from the encoder
    other = next((s for s in look.stacks if s != layer.stack), layer.stack)
    read = lengths[other]
    rows: dict[int, int] = {}
    total = 0
    for a in layer.attentions:
        keys = read if a.kind == "cross" else n
        total += _map(a, n, keys)
        if a.kind == "cross" and not isinstance(a.projections, str):
            for part in (a.projections.key, a.projections.value):
                rows |= {id(one): keys for one in part.module.modules()}
    for module in layer.module.modules():
        size = _products(module)
        total += size * rows.get(id(module), n)
        if not size:
            total += _experts(module) * n
    return total


def _map(a: AttentionView, n_q: int, n_k: int) -> int:
    wide = a.head_dim
    if not isinstance(a.projections, str):
        wide = a.projections.value.head_dim
    return 2 * n_q * n_k * a.heads * (a.head_dim + wide)


def _products(module: nn.Module) -> int:
    """FLOPs of a linear map for one row."""
    if isinstance(module, LowRank | Recalled | RecalledFused):
        return 0  # its weight is a product, or another layer's; what is its own stands inside
    for wide, high in (("in_features", "out_features"), ("nx", "nf")):
        size = getattr(module, wide, None), getattr(module, high, None)
        if all(isinstance(s, int) for s in size):
            return 2 * int(size[0] or 0) * int(size[1] or 0)
    if is_projection(module) and not isinstance(module, nn.Embedding):
        return 2 * features_first(module).numel()  # a router's, for one
    return 0


def length_of(look: ModelView, tokens: int) -> int:
    """Tokens of a model's only stack: as asked for, or as many as its images have patches."""
    return _length(look, look.stacks[0], tokens)


def row_flops(module: nn.Module) -> int:
    """FLOPs of the matrix products of a part for one token, of experts those that run."""
    return sum(_products(one) or _experts(one) for one in module.modules())


def _experts(module: nn.Module) -> int:
    """FLOPs for one row of a module that holds the matrices of several experts."""
    stacked = [p for p in module._parameters.values() if p is not None and p.dim() == 3]
    if not stacked:
        return 0
    config = getattr(module, "config", None)
    for source in (module, config):
        for name in ("top_k", "num_experts_per_tok", "experts_per_token", "active"):
            active = getattr(source, name, None)
            if isinstance(active, int):
                return sum(2 * active * p.shape[1] * p.shape[2] for p in stacked)
    return sum(2 * p.numel() for p in stacked)  # nobody says how many run: all of them


def _own(stack: Stack, layer: LayerView, lengths: dict[str, int]) -> int:
    """One layer of our own stacks, whose parts count for themselves."""
    n = lengths[layer.stack]
    block = stack.weights[layer.index]
    total = 0
    for modules in (stack.mixers, stack.crosses):
        if len(modules):
            mixer = modules[block]
            assert isinstance(mixer, Mixer)
            total += mixer.flops(n) - n * _saved(mixer)
    feed = stack.feeds[block]
    if isinstance(feed, Feed):
        return total + feed.flops(n) - n * _saved(feed)
    return total + n * sum(_products(part) for part in feed.modules())


def _saved(part: nn.Module) -> int:
    """What two thin matrices save of the whole ones, for one row: our parts count whole ones."""
    thin = [one for one in part.modules() if isinstance(one, LowRank)]
    return sum(2 * one.in_features * one.out_features for one in thin) - sum(
        2 * one.rank * (one.in_features + one.out_features) for one in thin
    )


def _convolution(look: ModelView, name: str, module: Any, lengths: dict[str, int]) -> int:
    weight = module.weight
    one = 2 * weight.numel()  # one place of the output
    if isinstance(module, nn.Conv2d):
        path = name
        while path:  # the image's size stands in a config around it
            path = path.rpartition(".")[0]
            config = getattr(look.model.get_submodule(path), "config", None)
            size = getattr(config, "image_size", None)
            if size is not None:
                high, wide = (size, size) if isinstance(size, int) else size
                places = (high // module.stride[0]) * (wide // module.stride[1])
                return int(one * places)
        return 0
    stack = "encoder" if "encoder" in lengths else look.stacks[0]
    return int(one * lengths[stack] * (2 if module.stride[0] == 1 else 1))


def _cache(look: ModelView) -> int:
    total = 0
    for a in look.attentions:
        if a.kind != "self" or not a.causal:
            continue
        total += _entry(a) * _itemsize(a.module)
    for part in _nothings(look):
        total += 2 * _itemsize(look.model) if part.cached and look.causal else 0
    return total


def _entry(a: AttentionView) -> int:
    """Numbers that one token leaves in the cache."""
    if isinstance(a.module, Mixer):
        project: Any = child(a.module, "project")
        return int(project.width())
    if isinstance(a.projections, str):
        return 2 * a.kv_heads * a.head_dim
    key, value = a.projections.key, a.projections.value
    shared = isinstance(key.module, Recalled | RecalledFused)  # the source's keys serve it
    return (0 if shared else key.heads * key.head_dim) + value.heads * value.head_dim


def _itemsize(module: nn.Module) -> int:
    found = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return found.itemsize


def _nothings(look: ModelView) -> Iterator[NoAttention]:
    return (m for m in look.model.modules() if isinstance(m, NoAttention))
