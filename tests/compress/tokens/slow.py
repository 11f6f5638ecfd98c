"""A Hugging Face ViT computed token by token in float64, with tokens taken out by hand.

Written from the papers' formulas, independently of the room: no hooks, no scatter, plain loops
over images and tokens.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

Tokens = np.ndarray


def _weights(module: Any) -> tuple[np.ndarray, np.ndarray]:
    bias = module.bias
    weight = module.weight.detach().double().numpy()
    return weight, 0.0 if bias is None else bias.detach().double().numpy()


def _linear(module: Any, x: Tokens) -> Tokens:
    weight, bias = _weights(module)
    return x @ weight.T + bias


def _norm(module: Any, x: Tokens) -> Tokens:
    weight, bias = _weights(module)
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + module.eps) * weight + bias


def _gelu(x: Tokens) -> Tokens:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def maps_of(layer: Any, x: Tokens, sizes: np.ndarray) -> tuple[np.ndarray, Tokens, np.ndarray]:
    """(heads, n, n) map, attention output (n, width), and the keys (heads, n, d)."""
    attention = layer.attention
    normed = _norm(layer.layernorm_before, x)
    d = attention.head_dim
    q, k, v = (
        _linear(getattr(attention, f"{name}_proj"), normed).reshape(len(x), -1, d).swapaxes(0, 1)
        for name in "qkv"
    )
    probabilities = _softmax(q @ k.swapaxes(1, 2) / math.sqrt(d) + np.log(sizes))
    out = (probabilities @ v).swapaxes(0, 1).reshape(len(x), -1)
    return probabilities, _linear(attention.o_proj, out), k


def evit(x: Tokens, probabilities: np.ndarray, keep: float, fuse: bool) -> Tokens:
    """EViT's reorganisation of the tokens of one image, the class token first."""
    scores = probabilities[:, 0, 1:].mean(0)
    k = math.ceil(keep * len(scores))
    best = sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:k])
    rest = [i for i in range(len(scores)) if i not in best]
    rows = [x[0], *(x[1 + i] for i in best)]
    if fuse and rest:
        rows.append(sum(scores[i] * x[1 + i] for i in rest))
    return np.stack(rows)


def tome(x: Tokens, keys: np.ndarray, sizes: np.ndarray, gone: int) -> tuple[Tokens, np.ndarray]:
    """ToMe's merging of one image's tokens, the class token first and protected."""
    metric = keys.mean(0)
    metric = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    first, second = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    edges = []
    for a in first:
        if a == 0:
            continue
        scores = [metric[a] @ metric[b] for b in second]
        edges.append((max(scores), a, second[int(np.argmax(scores))]))
    members = {i: [i] for i in range(len(x))}
    for _, a, b in sorted(edges, reverse=True)[:gone]:
        members[b] += members.pop(a)
    order = sorted(members, key=lambda i: min(members[i]))
    made = [sum(sizes[j] * x[j] for j in members[i]) / sum(sizes[j] for j in members[i])
            for i in order]  # fmt: skip
    return np.stack(made), np.array([sum(sizes[j] for j in members[i]) for i in order])


@torch.no_grad()
def vit_logits(model: Any, pixels: Tensor, reduce: Any) -> np.ndarray:
    """Logits of a ViTForImageClassification; `reduce(layer, x, map, keys, sizes)` gives the tokens
    and sizes between attention and MLP."""
    answers = []
    for image in pixels:
        x = model.vit.embeddings(image[None])[0].double().numpy()
        sizes = np.ones(len(x))
        for number, layer in enumerate(model.vit.layers):
            probabilities, added, keys = maps_of(layer, x, sizes)
            x, sizes = reduce(number, x + added, probabilities, keys, sizes)
            hidden = _gelu(_linear(layer.mlp.fc1, _norm(layer.layernorm_after, x)))
            x = x + _linear(layer.mlp.fc2, hidden)
        answers.append(_linear(model.classifier, _norm(model.vit.layernorm, x)[:1])[0])
    return np.stack(answers)
