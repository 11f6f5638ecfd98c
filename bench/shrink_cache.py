"""What a smaller cache of keys and values is worth: decode time and memory.

    python -m bench.shrink_cache [--tokens 32768] [--layers 4] [--heads 8] [--kv-heads 8]
        [--ratios 1,0.5,0.25,0.1] [--steps 40] [--prefill 4096] [--threads 1]

A random Llama-like model (head dimension 64) decodes one sequence after so many tokens. The caches
are filled with random keys and values, layer by layer, as a prefill would fill them: times do not
depend on what is in them. "per-head" keeps three times the ratio in a quarter of the heads and what
is left of the mean in the others (in kvpress 0.5.5 such budgets free nothing).

Times are seconds of the processor, medians over steps, all sides in turns in one process. The
attention part is the step less the same step after 16 tokens; evictions come once in many tokens,
so that one is timed by itself and its share of a token added. Bytes promise 1 / ratio. Memory is
what a process of its own has resident after the fill beyond what it had before.

The second table is a real prefill of `--prefill` tokens in one step, and in chunks, in processes of
their own: the largest resident memory beyond what was there before (see `measure.mapped`).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from bench import measure
from headwise.compress import HeadCache
from headwise.compress.cache.block_attention import Query
from headwise.compress.cache.policies.key_norm import KeyNorm

DIM = 64
SHORT = 16
"""Tokens after which attention costs nothing worth speaking of."""


def model_of(layers: int, heads: int, kv_heads: int, tokens: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=heads * DIM,
        intermediate_size=heads * DIM * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2 * tokens,
    )
    return LlamaForCausalLM(config).eval()


def per_head(ratio: float, layers: int, kv_heads: int) -> torch.Tensor:
    """Budgets of mean `ratio`: three times as much for every fourth head, at most all of it."""
    table = torch.zeros(layers, kv_heads)
    table[:, ::4] = much = min(1.0, 3 * ratio)
    few = len(range(0, kv_heads, 4))
    if kv_heads > few:
        table[table == 0] = (ratio * kv_heads - few * much) / (kv_heads - few)
    return table


def budget_of(name: str, layers: int, kv_heads: int) -> Any:
    kind, _, ratio = name.partition(" ")
    return per_head(float(ratio), layers, kv_heads) if kind == "per-head" else float(ratio)


def filled(model: Any, name: str, tokens: int) -> Any:
    """A cache with `tokens` random entries of every head, or what the budget leaves of them."""
    config = model.config
    layers, kv_heads = config.num_hidden_layers, config.num_key_value_heads
    shape = (1, kv_heads, tokens, DIM)
    if name == "DynamicCache":
        dynamic = DynamicCache(config=config)
        for layer in range(layers):
            dynamic.update(torch.randn(shape), torch.randn(shape), layer)
        return dynamic
    cache = HeadCache(model, budget_of(name, layers, kv_heads), KeyNorm())
    places = torch.arange(tokens, dtype=torch.int32).expand(kv_heads, tokens)
    group = config.num_attention_heads // kv_heads
    asked = Query(torch.zeros(kv_heads, group, tokens, 1), places, DIM**-0.5)
    for held in cache.layers:
        held.held.begin(torch.randn(shape), torch.randn(shape), asked, None)
        held.held.let_go(first=True, wait=False)
        held.is_initialized = True
    return cache


@torch.no_grad()
def step(model: Any, cache: Any) -> float:
    """Processor seconds of one decoded token."""
    start = time.process_time()
    model(torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    return time.process_time() - start


def eviction(cache: Any) -> float:
    """Seconds a token that evictions cost: one of all layers, over the tokens between two."""
    if not isinstance(cache, HeadCache) or len(cache.kept(0)[-1]) == cache.get_seq_length():
        return 0.0
    held = [layer.held for layer in cache.layers]
    patience = held[0].rules.patience(max(block.length for block in held[0].blocks))
    for layer in held:
        shape = (1, layer.kv_heads, patience, DIM)
        at = torch.arange(layer.length, layer.length + patience, dtype=torch.int32)
        places = at.expand(layer.kv_heads, patience)
        asked = Query(torch.zeros(layer.kv_heads, 1, patience, 1), places, DIM**-0.5)
        layer.append(torch.randn(shape), torch.randn(shape), asked, None)
    start = time.process_time()
    for layer in held:
        layer.evict()
    return (time.process_time() - start) / patience


def times(
    model: Any, names: Sequence[str], tokens: int, steps: int
) -> tuple[dict[str, tuple[float, float]], float]:
    """Side -> (seconds a token, of them for evictions); and the seconds of a step without
    context."""
    sides = {name: filled(model, name, tokens) for name in names}
    short = filled(model, "DynamicCache", SHORT)
    taken: dict[str, list[float]] = {name: [] for name in (*names, "short")}
    for turn in range(steps + 2):
        for name, cache in (*sides.items(), ("short", short)):
            seconds = step(model, cache)
            if turn >= 2:  # buffers have grown by then
                taken[name].append(seconds)
    usual = {name: statistics.median(found) for name, found in taken.items()}
    evictions = {name: eviction(cache) for name, cache in sides.items()}
    return {name: (usual[name] + evictions[name], evictions[name]) for name in names}, usual[
        "short"
    ]


# -- memory, in processes of their own -------------------------------------------------------


def resident() -> int:
    """Bytes that this process has resident now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def child(arguments: argparse.Namespace) -> dict[str, int]:
    model = model_of(arguments.layers, arguments.heads, arguments.kv_heads, arguments.tokens)
    with torch.no_grad():
        model(torch.zeros(1, SHORT).long())  # what a first pass leaves behind
    gc.collect()
    if not arguments.chunk:
        before = resident()
        cache = filled(model, arguments.child, arguments.tokens)
        gc.collect()
        return {"resident": resident() - before, "held": bytes_of(cache)}
    ids = torch.randint(1000, (1, arguments.tokens))
    before = resident()
    if arguments.child == "DynamicCache":
        made: Any = DynamicCache(config=model.config)
    else:
        budget = budget_of(arguments.child, arguments.layers, arguments.kv_heads)
        made = HeadCache(model, budget, KeyNorm())
    measure.forget_peak()
    start = time.process_time()
    with torch.no_grad():
        for part in ids.split(arguments.chunk, 1):
            model(part, past_key_values=made, logits_to_keep=1)
    taken = time.process_time() - start
    peak = measure.peak_bytes() - before
    return {"peak": peak, "held": bytes_of(made), "ms": round(1000 * taken)}


def bytes_of(cache: Any) -> int:
    if isinstance(cache, HeadCache):
        return cache.nbytes()
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))


def run_child(arguments: argparse.Namespace, name: str, tokens: int, chunk: int) -> dict[str, int]:
    given = {"child": name, "tokens": tokens, "chunk": chunk, "layers": arguments.layers}
    given |= {"heads": arguments.heads, "kv-heads": arguments.kv_heads}
    given["threads"] = arguments.threads
    flat = [str(part) for key, value in given.items() for part in (f"--{key}", value)]
    around = measure.mapped() if chunk else None
    return measure.in_own_process("bench.shrink_cache", flat, 600, around) or {}


# -- tables ----------------------------------------------------------------------------------


def decoding(arguments: argparse.Namespace) -> str:
    ratios = [float(ratio) for ratio in arguments.ratios.split(",")]
    names = ["DynamicCache", *(f"ratio {ratio:g}" for ratio in ratios)]
    names += [f"per-head {ratio:g}" for ratio in ratios if ratio < 1]
    model = model_of(arguments.layers, arguments.heads, arguments.kv_heads, arguments.tokens)
    found, short = times(model, names, arguments.tokens, arguments.steps)
    full = found[next(name for name in names if name != "DynamicCache")][0] - short
    rows = []
    for name in names:
        seconds, evicting = found[name]
        attention = max(seconds - short, 1e-9)
        ratio = 1.0 if name == "DynamicCache" else float(name.split()[1])
        memory = run_child(arguments, name, arguments.tokens, 0)
        dynamic = found["DynamicCache"][0] - short
        figures = (
            *(1000 * seconds, 1000 * attention, 100 * attention / seconds, 1000 * evicting),
            *(dynamic / attention, full / attention, 1 / ratio, full / attention * ratio),
        )
        told = [f"{figure:.2f}" for figure in figures]
        sizes = [megabytes(memory.get(what)) for what in ("held", "resident")]
        rows.append((name, *told, *sizes))
    header = (
        *("cache", "ms a token", "attention ms", "% of the step", "of it evictions"),
        *(
            "attention, times DynamicCache",
            "times ratio 1",
            "bytes promise",
            "of what they promise",
        ),
        *("MB held", "MB resident"),
    )
    return measure.table(header, rows)


def prefilling(arguments: argparse.Namespace, tokens: int) -> str:
    rows = []
    for chunk in (tokens, tokens // 8):
        for name in ("DynamicCache", "ratio 0.25", "ratio 0.1", "per-head 0.25"):
            got = run_child(arguments, name, tokens, chunk)
            sizes = (megabytes(got.get(what)) for what in ("held", "peak"))
            rows.append((name, tokens, chunk, *sizes, got.get("ms", "failed")))
    return measure.table(("cache", "tokens", "in steps of", "MB held", "MB peak", "ms"), rows)


def megabytes(count: int | None) -> str:
    return "failed" if count is None else f"{count / 1e6:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers: dict[str, int] = {"tokens": 32768, "layers": 4, "heads": 8, "kv-heads": 8}
    numbers |= {"steps": 40, "threads": 1, "chunk": 0, "prefill": 4096}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ratios", default="1,0.5,0.25,0.1")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        print(json.dumps(child(arguments)))
        return
    print(measure.where())
    sizes = (
        f"{arguments.layers} layers, {arguments.heads} heads, {arguments.kv_heads} key-value heads"
    )
    print(f"{sizes} of {DIM}, decoding after {arguments.tokens} tokens\n")
    if arguments.steps:
        print(decoding(arguments) + "\n", flush=True)
    if arguments.prefill:
        print(prefilling(arguments, arguments.prefill), flush=True)


if __name__ == "__main__":
    main()
