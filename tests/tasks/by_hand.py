"""The models of `tasks.circuits` as plain matrices, and what one path of one step is worth."""

from typing import Any

import torch
from torch import Tensor

from headwise.tasks.circuits import KnownCircuit, KnownEdge

Inputs = dict[str, Tensor]


@torch.no_grad()
def components(known: KnownCircuit, inputs: Inputs) -> dict[str, Tensor]:
    """What each component adds to the residual stream `(batch, n, width)`, in float64."""
    return _run(known, inputs, None, None)[0]


@torch.no_grad()
def by_hand(
    known: KnownCircuit,
    inputs: Inputs,
    edge: KnownEdge | None = None,
    instead: Tensor | None = None,
) -> Tensor:
    """The model's answer in float64. On its way to the receiver of `edge`, and only there, what
    the sender adds is left out, or `instead` stands in its place."""
    return _run(known, inputs, edge, instead)[1]


def _run(
    known: KnownCircuit, inputs: Inputs, edge: KnownEdge | None, instead: Tensor | None
) -> tuple[dict[str, Tensor], Tensor]:
    model: Any = known.model
    vision = "pixel_values" in inputs
    start = model.embed(**inputs)[0] if vision else model.embed(inputs["input_ids"])
    added = {"embed": start.double()}

    def read(receiver: str) -> Tensor:
        total = torch.zeros_like(added["embed"])
        for sender, value in added.items():
            if edge is None or edge != (sender, receiver):
                total = total + value
            elif instead is not None:
                total = total + instead
        return total

    n = start.shape[1]
    for layer, module in enumerate(model.stack.mixers):
        width = module.size.head_dim
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1) & bool(module.causal)
        table = module.position.table[:n].double() if module.causal else 0.0
        matrices = {
            "q": module.project.query, "k": module.project.key, "v": module.project.value
        }  # fmt: skip
        new = {}
        for head in range(module.size.heads):
            own = slice(head * width, (head + 1) * width)
            q, k, v = (
                (read(f"L{layer}H{head}.{name}") + table) @ matrix.weight[own].double().T
                for name, matrix in matrices.items()
            )
            scores = (q @ k.transpose(1, 2) / width**0.5).masked_fill(hidden, -torch.inf)
            out = module.merge.linear.weight[:, own].double()
            new[f"L{layer}H{head}"] = scores.softmax(-1) @ v @ out.T
        added |= new
        if model.stack.fed[layer]:
            feed = model.stack.feeds[layer].double()
            added[f"L{layer} mlp"] = feed(read(f"L{layer} mlp"))
            feed.float()
    end = read("logits")[:, 0] if vision else read("logits")
    linear = model.head.linear
    logits = end @ linear.weight.double().T
    return added, logits if linear.bias is None else logits + linear.bias.double()


def all_edges(known: KnownCircuit) -> list[KnownEdge]:
    """Every sender to every receiver that comes later."""
    model: Any = known.model
    senders = ["embed"]
    found: list[KnownEdge] = []
    for layer, module in enumerate(model.stack.mixers):
        heads = [f"L{layer}H{head}" for head in range(module.size.heads)]
        found += [KnownEdge(s, f"{head}.{x}") for s in senders for head in heads for x in "qkv"]
        senders += heads
        if model.stack.fed[layer]:
            found += [KnownEdge(s, f"L{layer} mlp") for s in senders]
            senders.append(f"L{layer} mlp")
    return found + [KnownEdge(s, "logits") for s in senders]
