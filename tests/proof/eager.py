"""What a model says itself, by its eager attention matrices, beside what headwise reads from it.

`differences` runs a model twice, once with `output_attentions=True` and once observed, and gives
the largest difference of every statistic, in float64 on the eager side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwise.models import AttentionReading, observe, view

ROW_STATISTICS = ("entropy", "max", "previous", "first", "mean_distance", "rows")
CLOSE = 1e-4
"""Allowed difference. float32 gives about 1e-5 on these models; the maps of other heads, 0.3."""

Where = tuple[str, str, int]
"""(stack, kind, layer)"""


def first_scores(output: Any) -> Tensor:
    """The first floating-point tensor of an output: logits, or what stands for them."""
    return next(t for t in output.to_tuple() if isinstance(t, Tensor) and t.is_floating_point())


def matrices(model: Any, inputs: dict[str, Any]) -> dict[Where, Tensor]:
    """Attention matrices `(batch, heads, n_q, n_k)` that the model returns."""
    kept = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    model.set_attn_implementation(kept)
    if "encoder_attentions" in output:
        named = {
            ("encoder", "self"): output.encoder_attentions,
            ("decoder", "self"): output.decoder_attentions,
            ("decoder", "cross"): output.cross_attentions,
        }
    else:
        named = {(view(model).stacks[0], "self"): output.attentions}
    return {
        (stack, kind, layer): matrix
        for (stack, kind), found in named.items()
        for layer, matrix in enumerate(found)
    }


def expected_stack(expected: dict[Where, Tensor]) -> str:
    """The stack that gives the output."""
    return (
        "decoder"
        if any(stack == "decoder" for stack, _, _ in expected)
        else next(iter(expected))[0]
    )


def where(reading: AttentionReading) -> Where:
    a = reading.attention
    return a.stack, a.kind, a.layer


def of_matrix(p: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """The statistics by their definitions, from a dense matrix `(batch, heads, n_q, n_k)`."""
    n_q, n_k = p.shape[-2:]
    i = torch.arange(n_q) + n_k - n_q
    distance = i[:, None] - torch.arange(n_k)
    mean = (p * distance).sum(-1)
    return {
        "entropy": -torch.xlogy(p, p).sum(-1),
        "max": p.amax(-1),
        "previous": (p * (distance == 1)).sum(-1),
        "first": p[..., 0],
        "mean_distance": mean,
        "distance_variance": (p * (distance - mean[..., None]) ** 2).sum(-1),
        "rows": p[:, :, rows],
    }


def of_map(reading: AttentionReading, rows: Tensor) -> dict[str, Tensor]:
    """The same from a map without its matrix. Where there are two ways, both are taken."""
    m, summary = reading.map, reading.map.summary()
    n_q, n_k = m.scores.n_q, m.scores.n_k
    i = torch.arange(n_q) + n_k - n_q
    return {
        "entropy": m.entropy(),
        "entropy (summary)": summary.entropy,
        "max": m.max(),
        "max (summary)": summary.max,
        "previous": m.mass_at(torch.where(i - 1 < n_k, i - 1, -1)),
        "first": m.mass_on(torch.arange(n_k) == 0),
        "mean_distance": m.mean_distance(),
        "mean_distance (summary)": summary.mean_distance,
        "distance_variance": m.distance_variance(),
        "rows": m.rows(rows),
    }


def differences(
    model: Any, inputs: dict[str, Any], real: dict[str, Tensor] | None = None, shift: int = 0
) -> dict[str, float]:
    """Largest absolute difference of each statistic over all attentions of a model.

    real: by stack, `(batch, n)` True where a token is no padding; only such queries count.
    Distances are in units of the number of keys (variances in its square), so that one bound
    fits all lengths; what a key receives is divided by the number of queries. "output" is the
    model's output observed against unobserved. shift: compare with the matrices of other heads,
    so many further on: a comparison that could not fail would be no proof.
    """
    expected = matrices(model, inputs)
    with torch.no_grad():
        output = first_scores(model(**inputs))
    worst: dict[str, float] = {}
    seen: set[Where] = set()

    def note(name: str, a: Tensor, b: Tensor) -> None:
        worst[name] = max(worst.get(name, 0.0), (a.double() - b).abs().max().item())

    def read(reading: AttentionReading) -> None:
        at = where(reading)
        seen.add(at)
        p = expected[at].double().roll(shift, 1)
        n_q, n_k = p.shape[-2:]
        rows = torch.linspace(0, n_q - 1, min(n_q, 7)).long()
        valid = None if real is None else real.get(at[0])
        queries = torch.ones(p.shape[0], n_q, dtype=torch.bool) if valid is None else valid
        right, mine = of_matrix(p, rows), of_map(reading, rows)
        for name, found in mine.items():
            plain = name.split(" ")[0]
            scale = {"mean_distance": n_k, "distance_variance": n_k**2}.get(plain, 1)
            kept = queries[:, None, rows, None] if plain == "rows" else queries[:, None]
            note(name, found * kept / scale, right[plain] * kept / scale)
        received = (p * queries[:, None, :, None]).sum(-2) / n_q
        if bool(queries.all()):
            note("received", reading.map.received() / n_q, received)
            note("received (summary)", reading.map.summary().received / n_q, received)
        note("received by real", reading.map.transpose_apply(queries[:, None]) / n_q, received)

    with observe(view(model), read=read), torch.no_grad():
        observed = first_scores(model(**inputs))
    assert seen == set(expected), f"seen {sorted(seen)}, the model returned {sorted(expected)}"
    spoken = None if real is None else real.get(expected_stack(expected))
    if spoken is not None and output.shape[:2] == spoken.shape:
        observed, output = observed[spoken], output[spoken]
    note("output", observed, output.double())
    return worst
