"""What it saves, really, to take heads, channels and layers out: time against the work left.

    python -m bench.shrink_structure [--what both,heads,channels,layers,unequal] [--tokens 1024]
        [--device cpu] [--dtype float32] [--threads 1] [--clock process] [--memory]

A Llama of random weights is pruned by 0.25, 0.5 and 0.75; "time / work" is its share of the whole
model's time over its share of the floating-point operations (`headwise.compress.cost`), so 1.00 is
all that can be had. Medians of one run, sides interleaved. `--clock process` counts processor
seconds (with one thread) instead of those on the wall. `--memory` adds the peak of a process of its
own that loads the saved model and runs it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import measure
from headwise import load, save
from headwise.compress import cost, drop_layers, prune_channels, prune_heads

FRACTIONS = (0.25, 0.5, 0.75)
HEADER = ("removed", "of", "parameters", "work", "time", "time / work", "spread", "cache/token")


def whole(args: argparse.Namespace) -> Any:
    """A Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.dim,
        intermediate_size=args.channels,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=max(2048, args.tokens),
    )
    model = LlamaForCausalLM(config).eval()
    return model.to(args.device, getattr(torch, args.dtype))


def pruned(model: Any, what: str, fraction: float, args: argparse.Namespace) -> Any:
    """A copy with `fraction` of something gone; "both" is heads and channels."""
    model = copy.deepcopy(model)
    group = args.heads // args.kv_heads
    layers = range(args.layers)
    if what == "layers":
        drop_layers(model, range(round(fraction * args.layers)))
        return model
    if what == "unequal":  # any heads, so that groups differ
        gone = random.Random(0).sample(range(args.heads), round(fraction * args.heads))
        prune_heads(model, [(layer, h) for layer in layers for h in gone])
    if what in ("both", "heads"):
        gone = list(range(round(fraction * args.kv_heads) * group))
        prune_heads(model, [(layer, h) for layer in layers for h in gone])
    if what in ("both", "channels"):
        count = round(fraction * args.channels)
        prune_channels(model, {layer: range(count) for layer in layers})
    return model


def side_by_side(
    sides: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """As `measure.side_by_side`, by another clock."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for work in sides.values():
        work()
    for _ in range(repeats):
        for name, work in sides.items():
            gc.collect()
            measure.synchronize()
            start = clock()
            work()
            measure.synchronize()
            times[name].append(clock() - start)
    return times


def run(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    def work() -> None:
        with torch.no_grad():
            model(ids, use_cache=False, logits_to_keep=1)

    return work


def peak(model: Any, args: argparse.Namespace) -> float | None:
    """Peak bytes of a process that loads the model from a folder and runs it, above those of one
    that has imported everything."""
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "model")
        told = ["--peak", str(Path(folder) / "model"), "--tokens", str(args.tokens)]
        found = measure.in_own_process("bench.shrink_structure", told, 600)
    return None if found is None else float(found["bytes"])


def report_peak(place: str, tokens: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    import headwise.compress.saving  # noqa: F401  (what is imported is not the model's)

    small = LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1, vocab_size=8)
    LlamaForCausalLM(small)(torch.zeros(1, 2, dtype=torch.long))
    before = measure.peak_bytes()
    model = load(place)
    model(torch.arange(tokens)[None] % 100, use_cache=False, logits_to_keep=1)
    print(json.dumps({"bytes": measure.peak_bytes() - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", default="both,heads,channels,layers,unequal")
    for name, default in (
        *(("--tokens", 1024), ("--dim", 768), ("--layers", 8), ("--heads", 12)),
        *(("--kv-heads", 4), ("--channels", 2048), ("--vocabulary", 8192)),
        *(("--threads", 1), ("--repeats", 7)),
    ):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    if args.peak:
        report_peak(args.peak, args.tokens)
        return
    clock = time.process_time if args.clock == "process" else time.perf_counter
    model = whole(args)
    ids = torch.randint(0, args.vocabulary, (1, args.tokens), device=args.device)
    print(f"`python -m bench.shrink_structure {' '.join(sys.argv[1:])}`: {measure.where()}")
    print(
        f"{args.layers} layers of {args.dim}, {args.heads} heads on {args.kv_heads}, "
        f"{args.channels} channels, {args.tokens} tokens, {args.dtype}, {args.clock} seconds\n"
    )
    header = [*HEADER, *(["peak"] if args.memory else [])]
    rows = []
    base, all_of_it = cost(model, args.tokens), peak(model, args) if args.memory else None
    for what in args.what.split(","):
        models = {f: pruned(model, what, f, args) for f in FRACTIONS}
        sides = {"whole": run(model, ids), **{str(f): run(m, ids) for f, m in models.items()}}
        times = side_by_side(sides, args.repeats, clock)
        for f, smaller in models.items():
            now = cost(smaller, args.tokens)
            # the last logits alone are computed
            head = 2 * (args.tokens - 1) * args.dim * args.vocabulary
            work = (now.flops - head) / (base.flops - head)
            # run by run, so that drift falls out
            pairs = [a / b for a, b in zip(times[str(f)], times["whole"], strict=True)]
            share = statistics.median(pairs)
            row = [
                f"{f:.2f}",
                what,
                f"{now.parameters / base.parameters:.3f}",
                f"{work:.3f}",
                f"{share:.3f}",
                f"{share / work:.2f}",
                measure.spread(pairs),
                f"{now.cache_bytes_per_token:,} B",
            ]
            if args.memory:
                there = peak(smaller, args)
                row.append("-" if not there or not all_of_it else f"{there / all_of_it:.3f}")
            rows.append(row)
    print(measure.table(header, rows))


if __name__ == "__main__":
    main()
