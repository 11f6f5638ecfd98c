"""Ablation the slow way: one whole forward pass for each part, by hooks on modules named here."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# model type -> (path of an output projection, its number of heads, stack, kind) by layer
PROJECTIONS: dict[str, list[tuple[str, str, str]]] = {
    "llama": [("model.layers.{}.self_attn.o_proj", "decoder", "self")],
    "mistral": [("model.layers.{}.self_attn.o_proj", "decoder", "self")],
    "gpt_oss": [("model.layers.{}.self_attn.o_proj", "decoder", "self")],
    "gpt2": [("transformer.h.{}.attn.c_proj", "decoder", "self")],
    "bert": [("bert.encoder.layer.{}.attention.output.dense", "encoder", "self")],
    "vit": [("vit.layers.{}.attention.o_proj", "vision", "self")],
    "bart": [
        ("model.encoder.layers.{}.self_attn.out_proj", "encoder", "self"),
        ("model.decoder.layers.{}.self_attn.out_proj", "decoder", "self"),
        ("model.decoder.layers.{}.encoder_attn.out_proj", "decoder", "cross"),
    ],
}


def loss(logits: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """`(batch,)`: nats a token, by plain loops in float64."""
    found = []
    for row in range(len(ids)):
        total, count = 0.0, 0
        for t in range(ids.shape[1] - 1):
            if mask is not None and not mask[row, t + 1]:
                continue
            logs = logits[row, t].double().log_softmax(-1)
            total, count = total - logs[ids[row, t + 1]].item(), count + 1
        found.append(total / max(count, 1))
    return torch.tensor(found, dtype=torch.float64)


@torch.no_grad()
def effects(
    model: nn.Module,
    inputs: dict[str, Tensor],
    projection: nn.Module,
    heads: int,
    score: Callable[[Tensor], Tensor],
    instead: Callable[[Tensor, int], Tensor] = lambda z, head: torch.zeros_like(z[..., head, :]),
) -> Tensor:
    """`(heads, batch)`: the score without each head of one projection minus the score with it.
    instead: what stands in the place of z[..., head, :], of z `(batch, n, heads, value_dim)`."""
    before = score(answer(model, inputs))
    rows = []
    for head in range(heads):

        def exchange(module: nn.Module, args: Any, head: int = head) -> Any:
            z = args[0].unflatten(-1, (heads, -1)).clone()
            z[..., head, :] = instead(z, head)
            return (z.flatten(-2), *args[1:])

        handle = projection.register_forward_pre_hook(exchange)
        rows.append(score(answer(model, inputs)) - before)
        handle.remove()
    return torch.stack(rows)


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, Tensor], projection: nn.Module) -> Tensor:
    """What goes into a projection, `(batch, n, heads * value_dim)`."""
    kept: list[Tensor] = []
    handle = projection.register_forward_pre_hook(lambda m, args: kept.append(args[0]))
    answer(model, inputs)
    handle.remove()
    return kept[0]


@torch.no_grad()
def answer(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    given = model(**inputs)
    return given.logits if hasattr(given, "logits") else given


def projections(model: Any) -> list[tuple[nn.Module, str, str, int]]:
    """Every output projection with stack, kind and layer, in order of execution."""
    found = []
    for stack in ("vision", "encoder", "decoder"):
        mine = [one for one in PROJECTIONS[model.config.model_type] if one[1] == stack]
        for layer in range(2):
            found += [(model.get_submodule(p.format(layer)), s, k, layer) for p, s, k in mine]
    return found


LAYERS = {
    "llama": [("model.layers.{}", "mlp")],
    "gpt_oss": [("model.layers.{}", "mlp")],
    "gpt2": [("transformer.h.{}", "mlp")],
    "bert": [("bert.encoder.layer.{}", "output.dense")],
    "vit": [("vit.layers.{}", "mlp")],
    "bart": [("model.encoder.layers.{}", "fc2"), ("model.decoder.layers.{}", "fc2")],
}
"""model type -> (path of a layer, path in it of what its feed-forward part ends with)."""


def layers(model: Any) -> list[tuple[str, str]]:
    """(path, end of the feed-forward part) of every layer."""
    kinds = LAYERS[model.config.model_type]
    return [(path.format(layer), last) for path, last in kinds for layer in range(2)]


def stack_of(model: Any, path: str) -> str:
    known = [(p, stack) for p, stack, _ in PROJECTIONS[model.config.model_type]]
    return next(stack for p, stack in known if p.startswith(path.rpartition(".")[0]))


def with_clean_maps(model: Any, inputs: dict[str, Tensor], run: Callable[[], Any]) -> Any:
    """`run()` while every attention weighs as it did on the inputs before: the softmax of the
    model's own eager code gives, call by call, what it gave then."""
    kept: list[Tensor] = []
    softmax = nn.functional.softmax
    before = model.config._attn_implementation
    calls = 0

    def keep(*args: Any, **kwargs: Any) -> Tensor:
        kept.append(softmax(*args, **kwargs))
        return kept[-1]

    def repeat(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        softmax(*args, **kwargs)
        calls += 1
        return kept[(calls - 1) % len(kept)]

    model.set_attn_implementation("eager")
    try:
        nn.functional.softmax = keep
        answer(model, inputs)
        nn.functional.softmax = repeat
        return run()
    finally:
        nn.functional.softmax = softmax
        model.set_attn_implementation(before)
