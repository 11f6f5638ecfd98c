"""What each statistic of a map costs, as a multiple of one flash pass over the same map.

python -m bench.maps [--lengths 1024,4096] [--threads 2] [--repeats 5]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch

from bench import measure
from headwise.maps import AttentionMap, Causal, Window, attend
from headwise.maps.summary import summarize


def statistics(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor, window: int
) -> dict[str, Callable[[], Any]]:
    """Every statistic from a fresh map, so that nothing is remembered between runs."""
    n = q.shape[2]
    generator = torch.Generator(q.device).manual_seed(1)
    ids = torch.randint(0, 2000, (1, n), generator=generator, device=q.device)
    keys = torch.rand(n, generator=generator, device=q.device) < 0.1
    previous = torch.arange(n, device=q.device) - 1
    rows = torch.linspace(0, n - 1, 32, device=q.device).long()

    def fresh(engine: str = "auto", known: torch.Tensor | None = lse) -> AttentionMap:
        return AttentionMap(q, k, Causal(), lse=known, engine=engine)

    def other() -> AttentionMap:
        return AttentionMap(q.flip(1), k, Causal())

    def one(name: str, engine: str, known: torch.Tensor | None) -> Callable[[], Any]:
        if name in ("inner", "kl"):
            return lambda: getattr(fresh(engine, known), name)(other())
        return lambda: getattr(fresh(engine, known), name)()

    sides: dict[str, Callable[[], Any]] = {
        "flash": lambda: attend(q, k, v, Causal(), backend="flash"),
        "attend, tiled": lambda: attend(q, k, v, Causal(), backend="tiled"),
        f"attend, window {window}": lambda: attend(q, k, v, Window(window)),
        f"attend, window {window}, tiled": lambda: attend(q, k, v, Window(window), backend="tiled"),
        "summary (all six in one)": lambda: summarize(fresh().scores, lse),
        "mass_at": lambda: fresh().mass_at(previous),
        "mass_within(8)": lambda: fresh().mass_within(8),
        "mass_within(64)": lambda: fresh().mass_within(64),
        "mass_matching (2,000 ids)": lambda: fresh().mass_matching(ids, ids),
        "rows (32)": lambda: fresh().rows(rows),
        "top(4)": lambda: fresh().top(4),
        "max": lambda: fresh().max(),
        "mass_on": lambda: fresh().mass_on(keys),
        "cosine": lambda: fresh(known=None).cosine(other()),
    }
    pairs = ("inner", "kl")
    for name in ("logsumexp", "entropy", "received", "collision", "distance_variance", *pairs):
        for engine in ("algebra", "tiles"):
            known = None if name in ("logsumexp", *pairs) else lse
            sides[f"{name}, {engine}"] = one(name, engine, known)
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="1024,4096,16384")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lengths = [int(n) for n in args.lengths.split(",")]
    results: dict[int, dict[str, list[float]]] = {}
    for n in lengths:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(1, heads, n, args.head_dim, generator=generator).to(
                args.device, getattr(torch, args.dtype)
            )
            for heads in (args.heads, args.kv_heads, args.kv_heads)
        )
        with torch.no_grad():
            lse = attend(q, k, v, Causal())[1]
            sides = statistics(q, k, v, lse, args.window)
            results[n] = measure.side_by_side(sides, args.repeats if n <= 8192 else 1, n <= 8192)
    print(f"`python -m bench.maps {' '.join(sys.argv[1:])}`: {measure.where()}")
    print(
        f"causal, batch 1, {args.heads} heads on {args.kv_heads} key-value heads of "
        f"{args.head_dim}, {args.dtype}; multiples of one flash pass, medians\n"
    )
    rows = []
    for name in next(iter(results.values())):
        row = [name]
        for n in lengths:
            mine, flash = (measure.median(results[n][x]) for x in (name, "flash"))
            row.append(f"{1e3 * mine:.1f} ms" if name == "flash" else f"{mine / flash:.2f}")
        rows.append(row)
    print(measure.table(["", *(f"{n:,}" for n in lengths)], rows))


if __name__ == "__main__":
    main()
