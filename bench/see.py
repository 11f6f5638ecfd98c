"""What it costs to see every head: `headwise.see` beside a plain forward pass and beside the same
statistics taken from `output_attentions=True`.

    python -m bench.see [--model small|default|PATH] [--lengths 512,...,32768] [--threads 2]

Seconds are medians, the sides interleaved in one process; peak memory is measured in a process of
its own for every side, above what the process held with the model loaded. The dense side ends at
`--dense-limit` tokens, where its memory does.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import measure

SIDES = ("plain", "logits", "see", "dense")


def small_model() -> nn.Module:
    """Llama-style, 4 layers of width 256 with 8 heads, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=2**20,
        )
    )


def load(name: str, device: str, dtype: str) -> nn.Module:
    """A model by name or path (a folder, or a GGUF file)."""
    from transformers import AutoModelForCausalLM

    from headwise.models.default import default_model_path

    kind = getattr(torch, dtype)
    if name == "small":
        model = small_model()
    else:
        path = default_model_path() if name == "default" else Path(name)
        gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        folder = path.parent if gguf else path
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=kind, **gguf)
    return model.to(device, kind).eval()


def tokens(model: Any, n: int) -> Tensor:
    """Random token ids in which words recur as in text (a Zipf distribution)."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    weights = 1.0 / torch.arange(1, vocabulary + 1)
    ids = torch.multinomial(weights, n, replacement=True, generator=generator)
    return ids[None].to(model.device)


def plain(model: Any, ids: Tensor) -> Callable[[], Any]:
    """The forward pass through all layers with SDPA, without the unembedding and without a
    cache: the least that any measurement has to pay."""
    model.set_attn_implementation("sdpa")
    return lambda: no_grad(model.base_model, input_ids=ids, use_cache=False)


def logits(model: Any, ids: Tensor) -> Callable[[], Any]:
    """The same with the logits of all tokens: the forward pass as users call it."""
    model.set_attn_implementation("sdpa")
    return lambda: no_grad(model, input_ids=ids, use_cache=False)


@torch.no_grad()
def no_grad(module: nn.Module, **inputs: Any) -> Any:
    return module(**inputs)


def see(model: Any, ids: Tensor, instruments: tuple[str, ...]) -> Callable[[], Any]:
    """The default instruments that read the text."""
    import headwise

    return lambda: headwise.see(model, ids, instruments=instruments)


def text_instruments() -> tuple[str, ...]:
    """Names of the default instruments whose stimulus is the text."""
    from headwise.instruments.catalog import chosen

    return tuple(kind.name for kind in chosen(None) if kind.stimulus == "text")


def dense(model: Any, ids: Tensor) -> Callable[[], Any]:
    """The same statistics from the matrices that the model returns."""

    @torch.no_grad()
    def work() -> list[dict[str, Tensor]]:
        model.set_attn_implementation("eager")
        out = model.base_model(input_ids=ids, use_cache=False, output_attentions=True)
        model.set_attn_implementation("sdpa")
        return [dense_statistics(p, ids) for p in out.attentions]

    return work


def dense_statistics(p: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Per-head numbers of a map `(1, heads, n, n)`, written as one would by hand."""
    n = p.shape[-1]
    i = torch.arange(n, device=p.device)
    distance = (i[:, None] - i).to(p.dtype)
    received = p.sum(-2)
    mean = (p * distance).sum(-1)
    variance = (p * distance.square()).sum(-1) - mean.square()
    seen_by = torch.arange(n, 0, -1, device=p.device)
    sinks = received / seen_by > 0.3
    same = (ids[0, :, None] == ids[0]) & (distance > 0)
    after = torch.zeros_like(same)
    after[:, 1:] = same[:, :-1]
    some = torch.linspace(0, n - 1, 32, device=p.device).long()
    rows = p[0, :, some]
    unit = rows / rows.norm(dim=-1, keepdim=True)
    return {
        "entropy": torch.special.entr(p).sum(-1).mean(-1),
        "effective_keys": torch.special.entr(p).sum(-1).exp().mean(-1),
        "max_weight": p.amax(-1).mean(-1),
        "mean_distance": mean.mean(-1),
        "distance_std": variance.clamp_min(0).mean(-1).sqrt(),
        "sink_mass": p[..., 0].mean(-1),
        "found_sink_mass": (received * sinks).sum(-1) / n,
        "received_concentration": received.sort(-1).values[..., -max(1, n // 100) :].sum(-1) / n,
        "self_mass": p.diagonal(dim1=-2, dim2=-1).mean(-1),
        "previous_mass": p.diagonal(-1, -2, -1).sum(-1) / n,
        "next_mass": p.diagonal(1, -2, -1).sum(-1) / n,
        "local_8": (p * (distance.abs() < 8)).sum((-1, -2)) / n,
        "local_64": (p * (distance.abs() < 64)).sum((-1, -2)) / n,
        "same_token": (p * same).sum((-1, -2)) / n,
        "induction_text": (p * after).sum((-1, -2)) / n,
        "similarity": torch.einsum("hrj,grj->hg", unit, unit) / len(some),
    }


def work_of(side: str, model: Any, ids: Tensor) -> Callable[[], Any]:
    if side == "see":
        return see(model, ids, text_instruments())
    return {"plain": plain, "logits": logits, "dense": dense}[side](model, ids)


def measure_memory(args: argparse.Namespace) -> None:
    """Child process: one side once; prints peak bytes above the loaded model."""
    torch.set_num_threads(args.threads)
    model = load(args.model, args.device, args.dtype)
    work_of(args.memory_of, model, tokens(model, 64))()  # imports and buffers are not the map's
    ids = tokens(model, args.tokens)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        measure.forget_peak()
        before = measure.peak_bytes()
    work_of(args.memory_of, model, ids)()
    cuda = args.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else measure.peak_bytes()
    print(json.dumps({"above": peak - before, "peak": peak}))


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    model = load(args.model, args.device, args.dtype)
    header = ["tokens", "plain", "with logits", "see", "see / plain", "see / with logits"]
    header += ["dense", "dense / see"]
    header += ["plain MiB", "see MiB", "whole process see / plain", "dense MiB", "dense / see MiB"]
    rows = []
    for n in (int(x) for x in args.lengths.split(",")):
        sides = [s for s in SIDES if s != "dense" or n <= args.dense_limit]
        ids = tokens(model, n)
        repeats = args.repeats if n <= 8192 else max(1, args.repeats // 4)
        times = measure.side_by_side(
            {side: work_of(side, model, ids) for side in sides}, repeats, warm=n <= 8192
        )
        middle = {side: measure.median(t) for side, t in times.items()}
        memory = {}
        for side in (s for s in sides if args.memory and s != "logits"):
            child = [f"--memory-of={side}", f"--tokens={n}", f"--model={args.model}"]
            child += [f"--threads={args.threads}", f"--device={args.device}"]
            memory[side] = measure.in_own_process(
                "bench.see", [*child, f"--dtype={args.dtype}"], limit=3600
            )
        rows.append(row(n, middle, times, memory))
        print(rows[-1], file=sys.stderr, flush=True)
    print(f"`python -m bench.see {' '.join(sys.argv[1:])}`: {measure.where()}, {args.dtype}")
    print("seconds: medians (half the range in percent); MiB: peak above the loaded model\n")
    print(measure.table(header, rows))


def row(
    n: int,
    middle: dict[str, float],
    times: dict[str, list[float]],
    memory: dict[str, dict[str, Any] | None],
) -> list[str]:
    """One line of the table; a dash where a side was not run or failed."""

    def time_of(side: str) -> str:
        if side not in middle:
            return "-"
        return f"{middle[side]:.3f} ({measure.spread(times[side])})"

    def above(side: str) -> float | None:
        found = memory.get(side)
        return found["above"] / 2**20 if found else None

    def ratio(a: float | None, b: float | None) -> str:
        return "-" if a is None or not b else f"{a / b:.2f}"

    whole = {side: (m or {}).get("peak") for side, m in memory.items()}
    mib = {side: above(side) for side in SIDES}
    shown = {side: "-" if m is None else f"{m:.0f}" for side, m in mib.items()}
    return [
        f"{n:,}",
        time_of("plain"),
        time_of("logits"),
        time_of("see"),
        ratio(middle["see"], middle["plain"]),
        ratio(middle["see"], middle["logits"]),
        time_of("dense"),
        ratio(middle.get("dense"), middle["see"]),
        shown["plain"],
        shown["see"],
        ratio(whole.get("see"), whole.get("plain")),
        shown["dense"],
        ratio(mib["dense"], mib["see"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="small")
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192,16384,32768")
    parser.add_argument("--dense-limit", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=4096, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        measure_memory(args)
    else:
        run(args)


if __name__ == "__main__":
    main()
