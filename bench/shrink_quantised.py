"""The cache in few bits: HeadCache beside transformers' QuantizedCache and DynamicCache.

    python -m bench.shrink_quantised [--tokens 4096] [--decode 24] [--repeats 3] [--clock cpu]

Two tables. The first, on a random Llama-like model of 4 layers (8 key-value heads of 64), has for
each cache, in a process of its own: bytes that it holds after the prefill, the largest memory that
prefill and decoding took beyond the model, and the time of a decoded token. The second, on the
model that headwise carries and text that it was not trained on, has what the bits cost: tokens are
decoded one by one after a prefill, and their predictions compared with those of DynamicCache
(relative error of the logits, KL in nats a token, next tokens that are the same).

All caches quantise what is older than a window of the newest tokens; quanto's window is 128 by
transformers' default, ours 32, and both are also run with the other's.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor

from bench import cache_side, measure

PEERS = ("dynamic", "fp8", "quanto 4", "quanto 4 window 32", "quanto 2", "quanto 2 window 32")
MINE = ("headwise 8", "headwise 4", "headwise 4 window 128", "headwise 8 4", "headwise 4 rotated",
        "headwise 2", "headwise 2 window 128", "headwise 2 outliers")  # fmt: skip
SIDES = (*PEERS, *MINE)


def make(side: str, model: Any) -> Any:
    """The cache that a side's name says."""
    from transformers import DynamicCache, QuantizedCache

    name, *words = side.split()
    if name == "dynamic":
        return DynamicCache(config=model.config)
    if name == "fp8":
        return QuantizedCache("fp8", model.config)
    numbers = [int(word) for word in words if word.isdigit()]
    window = numbers.pop() if "window" in words else None
    if name == "quanto":
        return QuantizedCache(
            "quanto", model.config, nbits=numbers[0], residual_length=window or 128
        )
    from headwise.compress import Coding, HeadCache

    coding = Coding(
        numbers[0],
        numbers[-1],
        residual=window or 32,
        rotated="rotated" in words,
        outliers=1 if "outliers" in words else 0,
    )
    return HeadCache(model, bits=coding)


def held(thing: Any) -> int:
    """Bytes of every tensor that a cache holds, each storage once."""
    if hasattr(thing, "nbytes") and callable(thing.nbytes):
        return int(thing.nbytes())
    found: dict[int, int] = {}
    seen: set[int] = set()

    def visit(x: Any) -> None:
        if id(x) in seen:
            return
        seen.add(id(x))
        if isinstance(x, Tensor) and hasattr(x, "__tensor_flatten__"):
            for name in x.__tensor_flatten__()[0]:
                visit(getattr(x, name))
        elif isinstance(x, Tensor):
            storage = x.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(x, dict):
            for one in x.values():
                visit(one)
        elif isinstance(x, list | tuple):
            for one in x:
                visit(one)

    for layer in thing.layers:
        visit(vars(layer))
    return sum(found.values())


def random_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=65536,
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval()


def one_side(options: argparse.Namespace) -> dict[str, Any]:
    model = random_model()
    ids = torch.randint(1000, (1, options.tokens), generator=torch.Generator().manual_seed(1))

    def prefill(given: Tensor) -> tuple[Any, Tensor]:
        cache = make(options.side, model)
        logits = model(given, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        return cache, logits

    clock = cache_side.clock_of(options.clock)
    found, _ = cache_side.run(model, ids, options.decode, options.repeats, prefill, held, clock)
    return found


@torch.no_grad()
def decoded(model: Any, ids: Tensor, prefill: int, cache: Any) -> Tensor:
    """Logits `(tokens, vocabulary)` of what comes one by one after the prefill."""
    model(ids[:, :prefill], past_key_values=cache, logits_to_keep=1)
    steps = [model(part, past_key_values=cache).logits[0] for part in ids[:, prefill:].split(1, 1)]
    return torch.cat(steps).float()


def quality(prefill: int, steps: int, texts: int) -> dict[str, list[str]]:
    from transformers import AutoTokenizer

    from headwise.models.default import default_model_path, default_text

    folder = str(default_model_path())
    model, tokenizer = cache_side.load(folder), AutoTokenizer.from_pretrained(folder)
    words = tokenizer(default_text(40 * texts * (prefill + steps))[0], return_tensors="pt")
    ids = words["input_ids"][0, : texts * (prefill + steps)].view(texts, 1, -1)
    rows: dict[str, list[str]] = {}
    exact: list[Tensor] = []
    for side in SIDES:
        found = [decoded(model, text, prefill, make(side, model)) for text in ids]
        exact = exact or found
        wrong, size, kl, same = 0.0, 0.0, [], []
        for a, b in zip(exact, found, strict=True):
            wrong += float((b - a).square().sum())
            size += float(a.square().sum())
            p, q = a.log_softmax(-1), b.log_softmax(-1)
            kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
            same.append(float((a.argmax(-1) == b.argmax(-1)).float().mean()))
        rows[side] = [f"{(wrong / size) ** 0.5:.4f}", f"{sum(kl) / texts:.5f}",
                      f"{100 * sum(same) / texts:.1f} %"]  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--decode", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--prefill", type=int, default=448, help="of the second table")
    parser.add_argument("--texts", type=int, default=4, help="of the second table")
    parser.add_argument("--side", help="measure one and print JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.side:
        print(json.dumps(one_side(options)))
        return
    print(f"{measure.where()}, {options.clock} time\n\n{options.tokens} tokens, float32\n")
    rows, plain = [], None
    for side in SIDES:
        arguments = ["--side", side] + [
            f"--{name}={getattr(options, name)}"
            for name in ("tokens", "decode", "repeats", "threads", "clock")
        ]
        found = measure.in_own_process("bench.shrink_quantised", arguments, 900)
        if found is None:
            continue
        plain = plain or found
        rows.append([
            side, f"{found['live'] / 2**20:.1f}", f"{plain['live'] / found['live']:.2f}",
            f"{found['peak'] / 2**20:.0f}", f"{found['prefill']:.2f}", f"{found['token']:.1f}",
        ])  # fmt: skip
    header = ["cache", "MiB held", "times less", "peak MiB", "prefill s", "ms a token"]
    print(measure.table(header, rows))
    print(f"\nThe model of headwise, {options.texts} texts, 64 tokens after {options.prefill}\n")
    answers = quality(options.prefill, 64, options.texts)
    print(measure.table(["cache", "error of logits", "KL, nats", "same next token"],
                        [[side, *cells] for side, cells in answers.items()]))  # fmt: skip


if __name__ == "__main__":
    main()
