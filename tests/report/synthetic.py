"""Atlases as `see` would make them, without a model: heads with roles, drawn as real maps are.

Each head gets a small map from its role (a sink with some noise, a diagonal, the token after an
earlier occurrence ...). Similarities are cosines of these maps, and most columns are read off
them, so that the numbers of a head agree with its tile.
"""

import re
from typing import Any

import numpy as np

from headwise.instruments.atlas import Atlas
from headwise.instruments.columns import HEAD_COLUMNS, LAYER_COLUMNS
from headwise.instruments.kinds import label_all

TEXT = """First Citizen:
Before we proceed any further, hear me speak.

All:
Speak, speak.

First Citizen:
You are all resolved rather to die than to famish?

All:
Resolved. resolved.
"""
TOKENS = re.findall(r" ?\w+|[^\w\s]|\n", TEXT)[:48]

ROLES = (
    "sink", "sink", "sink", "previous-token", "induction", "duplicate", "retrieval", "local",
    "broad", "positional", "delimiter", "mixed",
)  # fmt: skip


def decoder(layers: int, heads: int, seed: int = 0, tokens: int = 48, texts: int = 3) -> Atlas:
    """A causal model; one text gives no standard errors."""
    return _atlas([("decoder", "self", layers)], heads, seed, tokens, texts)


def encoder_decoder(layers: int = 4, heads: int = 6, seed: int = 0) -> Atlas:
    """Three panels: encoder self, decoder self, decoder cross, with one layer table for both."""
    panels = [
        ("encoder", "self", layers),
        ("decoder", "self", layers),
        ("decoder", "cross", layers),
    ]
    return _atlas(panels, heads, seed, 24, 3)


def role_map(role: str, rng: np.random.Generator, tokens: list[str], causal: bool) -> np.ndarray:
    """A (t, t) map of a head with this role, rows sum to 1."""
    t = len(tokens)
    i, j = np.arange(t)[:, None], np.arange(t)[None, :]
    logits = rng.gumbel(0, 0.7, (t, t))
    same = np.array([[a == b for b in tokens] for a in tokens])
    before = same & (j < i)
    after = np.roll(before, 1, axis=1) & (j <= i) & (j > 0)
    marks = np.array([not any(c.isalnum() for c in token) for token in tokens])[None, :]
    strength = rng.uniform(3.5, 7)
    logits += {
        "sink": strength * (j == 0),
        "previous-token": (strength + 1) * (i - j == 1),
        "induction": strength * after + 3.0 * (j == 0),
        "duplicate": strength * before + 2.5 * (j == 0),
        "retrieval": strength * (rng.random((1, t)) < 0.06) + 2.5 * (j == 0),
        "local": -rng.uniform(0.2, 0.6) * np.abs(i - j),
        "broad": -0.6 * logits,
        "positional": strength * (i - j == rng.integers(2, 6)),
        "delimiter": strength * marks,
        "mixed": 1.5 * (j == 0) + 1.2 * marks - 0.05 * np.abs(i - j),
    }[role]
    if causal:
        logits = np.where(j <= i, logits, -np.inf)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def _atlas(
    panels: list[tuple[str, str, int]], heads: int, seed: int, tokens: int, texts: int
) -> Atlas:
    rng = np.random.default_rng(seed)
    words = [TOKENS[i % len(TOKENS)] for i in range(tokens)]
    rows: list[dict[str, Any]] = []
    maps = []
    for stack, attention, layers in panels:
        for layer in range(layers):
            for head in range(heads):
                role = _role(layer / max(layers - 1, 1), rng)
                causal = (stack, attention) == ("decoder", "self")
                weights = role_map(role, rng, words, causal)
                depth = layer / max(layers - 1, 1)
                rows.append({"layer": layer, "head": head, "stack": stack, "attention": attention}
                            | _numbers(role, weights, words, rng, depth))  # fmt: skip
                maps.append(weights)
    similarity = np.clip(_cosines(np.stack(maps).reshape(len(maps), -1)), 0, 1)
    np.fill_diagonal(similarity, -1)
    known = [c.name for c in HEAD_COLUMNS if c.name in rows[0]]
    table = {name: np.array([row[name] for row in rows]) for name in known}
    table["similarity"] = similarity.max(1)
    table["similar_to"] = similarity.argmax(1)
    np.fill_diagonal(similarity, 1)
    rest = np.clip(_cosines(np.stack(maps)[:, :, 1:].reshape(len(maps), -1)), 0, 1)
    if len(panels) == 1:
        del table["stack"], table["attention"]
    kinds, reasons = label_all(table)
    table["kind"] = np.array(kinds)
    spread = {
        name: np.abs(values) * rng.uniform(0.01, 0.08, len(rows))
        for name, values in table.items()
        if values.dtype.kind == "f"
    }
    return Atlas(
        heads=table,
        layers=_layers(panels, rng),
        pairs={
            "similarity": similarity,
            "similarity_se": similarity * 0.02,
            "similarity_rest": rest,
        },
        spread=spread if texts > 1 else {},
        reasons=reasons,
        tiles=[
            {
                "head": row,
                "start": 200,
                "positions": [0, *range(200, 199 + tokens)],
                "tokens": words,
                "weights": weights.astype(np.float16),
            }
            | ({"keys": words} if rows[row]["attention"] == "cross" else {})
            for row, weights in enumerate(maps)
        ],
        provenance=_provenance(len(rows), texts),
    )


def _cosines(flat: np.ndarray) -> np.ndarray:
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    return unit @ unit.T


def _role(depth: float, rng: np.random.Generator) -> str:
    early, late = ("previous-token", "local", "positional", "broad"), ("sink", "sink", "retrieval")
    pool = ROLES + (early * 2 if depth < 0.3 else ()) + (late * 2 if depth > 0.5 else ())
    return str(rng.choice(pool))


def _numbers(
    role: str, weights: np.ndarray, tokens: list[str], rng: np.random.Generator, depth: float
) -> dict[str, float]:
    t = len(tokens)
    i, j = np.arange(t)[:, None], np.arange(t)[None, :]
    gap = i - j
    p = np.where(weights > 0, weights, 1.0)
    entropy = -(weights * np.log(p)).sum(1)
    mean = (weights * gap).sum(1)
    received = weights.sum(0) / weights.sum()
    same = np.array([[a == b for b in tokens] for a in tokens]) & (j < i)
    after = np.roll(same, 1, axis=1) & (j <= i) & (j > 0)
    marks = np.array([not any(c.isalnum() for c in token) for token in tokens])
    scored = {"induction": 0.45, "previous-token": 0.5, "duplicate": 0.45, "retrieval": 0.12}

    def score(name: str) -> float:
        low = scored[name] if role == name else 0.0
        return float(np.clip(low + rng.beta(2, 4) * (0.5 if role == name else 0.2), 0, 1))

    sink = float(weights[:, 0].mean())
    return {
        "sink_mass": sink,
        "found_sink_mass": min(1.0, sink * 1.05),
        "received_concentration": float((received**2).sum()),
        "entropy": float(entropy.mean()),
        "entropy_share": float(entropy[1:].sum() / np.log(np.arange(2, t + 1)).sum()),
        "effective_keys": float(np.exp(entropy).mean()),
        "max_weight": float(weights.max(1).mean()),
        "mean_distance": float(mean.mean()) * 40,
        "distance_std": float(np.sqrt((weights * (gap - mean[:, None]) ** 2).sum(1)).mean()) * 40,
        "self_mass": float(np.trace(weights) / t),
        "previous_mass": float(np.trace(weights, -1) / t),
        "next_mass": float(np.trace(weights, 1) / t),
        "local_8": float((weights * (np.abs(gap) < 8)).sum() / t) * 0.6,
        "local_64": float((weights * (np.abs(gap) < 64)).sum() / t) * 0.9,
        "delimiter_mass": float(weights[:, marks].sum() / t) * (1 if role == "delimiter" else 0.6),
        "same_token": float((weights * same).sum() / t),
        "induction_text": float((weights * after).sum() / t),
        "positional": float(rng.uniform(0, 0.5) + 0.5 * (role == "positional")),
        "positional_random": np.nan,
        "induction_score": score("induction"),
        "previous_token_score": score("previous-token"),
        "duplicate_token_score": score("duplicate"),
        "retrieval_score": score("retrieval") if role == "retrieval" else 0.04 * rng.random(),
        "dormant_share": float(np.clip(sink * 1.6 - 0.4, 0, 1)),
        "value_drain": float(rng.lognormal(-2.5, 0.5)) if sink > 0.4 else float("nan"),
        "residual_share": float(rng.lognormal(-3, 0.6) * (1.2 - sink) * (1.3 - depth)),
        "ov_copying": float(np.tanh(rng.normal(0.2, 0.5))),
        "qk_matching": float(np.tanh(rng.normal(0, 0.3))),
        "output_norm": float(rng.lognormal(1.5, 0.3)),
    }  # fmt: skip


def _layers(panels: list[tuple[str, str, int]], rng: np.random.Generator) -> dict[str, np.ndarray]:
    stacks = {stack: layers for stack, _, layers in panels}
    layer = np.concatenate([np.arange(n) for n in stacks.values()])
    count = len(layer)
    last = np.concatenate([np.arange(n) == n - 1 for n in stacks.values()])
    table = {
        "layer": layer,
        "stack": np.repeat(list(stacks), list(stacks.values())),
        "residual_norm": 12 * np.exp(0.08 * layer) * rng.uniform(0.95, 1.05, count),
        "residual_peak": np.where(layer > 1, 900.0, 8.0) * rng.uniform(0.9, 1.1, count),
        "residual_peak_ratio": np.where(layer > 1, 2200.0, 20.0) * rng.uniform(0.9, 1.1, count),
        "attention_share": rng.uniform(0.25, 0.6, count),
        "update_share": 0.2 + 0.6 / (1 + layer) * rng.uniform(0.9, 1.1, count),
        "next_similarity": np.where(last, np.nan, rng.uniform(0.5, 0.95, count)),
    }
    assert set(table) <= {c.name for c in LAYER_COLUMNS}
    if len(stacks) == 1:
        del table["stack"]
    return table


def _provenance(heads: int, texts: int) -> dict[str, Any]:
    return {
        "model": "examples/synthetic-135M",
        "model_class": "LlamaForCausalLM",
        "revision": None,
        "weights_hash": "sha256:" + "5af0" * 16,
        "texts": [
            {"name": f"play, part {n + 1}", "sha256": f"{n:x}c91" * 16, "tokens": 2048}
            for n in range(texts)
        ],
        "dtype": "float32",
        "device": "cpu",
        "versions": {"python": "3.11.2", "headwise": "0.1.0", "torch": "2.13.0+cpu"},
        "seconds": 41.3 * heads / 270,
        "peak_memory_bytes": 1_420_000_000,
        "command": "headwise see examples/synthetic-135M --text play.txt --tokens 2048",
        "date": "2025-01-31T12:00:00+00:00",
        "threads": 2,
        "platform": "Linux x86_64",
        "settings": {"seed": 0, "batch_size": 1, "rows_sampled": 128},
    }
