"""Exact ablation of every head of a 12-layer model, against one whole forward pass a head.

    python -m bench.cause [--sizes small,gpt2] [--threads 2] [--repeats 3] [--share 0.25]

The other side is what a person writes by hand: a hook that empties one head before the output
projection, a whole forward pass, the metric; nothing else. With `--share` it runs on that share of
the heads, evenly over layers, and is scaled up. Both sides give the same numbers (the largest
difference is printed). The columns: what is measured on how much text; seconds for all 144 heads;
how many times faster; and the same with one head a pass, which leaves the late start alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import measure

LAYERS = HEADS = 12
SIZES = {"small": (192, 2000), "gpt2": (768, 50257)}  # width, vocabulary
TEXTS = ((1, 16), (8, 16), (1, 128), (1, 512))  # examples, tokens of each
METRICS = ("logit difference", "loss")


def model_of(size: str, device: str) -> Any:
    """GPT-2's shape, random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    width, vocabulary = SIZES[size]
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=width,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = GPT2LMHeadModel(config)
    return model.to(device).eval()


def metric_of(name: str) -> Any:
    from headwise.instruments.metrics import LogitDifference, Loss

    return LogitDifference(3, 4) if name == "logit difference" else Loss()


@torch.no_grad()
def by_hand(model: Any, ids: Tensor, metric: Any, heads: list[tuple[int, int]]) -> Tensor:
    """`(heads,)`: one whole pass each."""
    inputs = {"input_ids": ids}
    clean = model(ids, use_cache=False).logits
    before = metric.score(clean, inputs).double().mean()
    size = model.config.n_embd // HEADS
    found = []
    for layer, head in heads:

        def empty(module: Any, args: Any, head: int = head) -> Any:
            joined = args[0].clone()
            joined[..., head * size : (head + 1) * size] = 0
            return (joined,)

        handle = model.transformer.h[layer].attn.c_proj.register_forward_pre_hook(empty)
        after = metric.score(model(ids, use_cache=False).logits, inputs)
        handle.remove()
        found.append(after.double().mean() - before)
    return torch.stack(found).cpu()


def by_headwise(model: Any, ids: Tensor, metric: Any, copies: int | None) -> Tensor:
    """`(heads,)`, all of them; without the Atlas around it, as the other side."""
    from headwise.instruments.ablated_parts import parts_of
    from headwise.instruments.examples import read_examples
    from headwise.instruments.part_effects import Measurement
    from headwise.instruments.replacements import Zero
    from headwise.models import view

    look = view(model)
    (batch,) = read_examples(model, ids, batch_size=len(ids))
    run = Measurement(look, parts_of(look, "heads"), metric, Zero(), copies=copies)
    with torch.no_grad():
        return torch.from_numpy(run.effects(batch, run.clean(batch)).mean(1))


def compared(
    model: Any, ids: Tensor, metric: Any, repeats: int, share: float
) -> dict[str, float | str]:
    """Seconds of either side for all heads, their largest difference, and the ratios."""
    every = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    step = max(1, round(1 / share))
    some = every[:: step + (step % 2 == 0)]  # an odd step meets every head of some layer
    found: dict[str, Tensor] = {}

    def side(name: str, work: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            found[name] = work()

        return run

    times = measure.side_by_side(
        {
            "hand": side("hand", lambda: by_hand(model, ids, metric, some)),
            "headwise": side("headwise", lambda: by_headwise(model, ids, metric, None)),
            "alone": side("alone", lambda: by_headwise(model, ids, metric, 1)),
        },
        repeats,
        warm=repeats > 1,
    )
    at = [every.index(head) for head in some]
    gap = (found["headwise"][at] - found["hand"]).abs().max() / found["hand"].abs().max()
    hand = measure.median(times["hand"]) * len(every) / len(some)
    mine, alone = measure.median(times["headwise"]), measure.median(times["alone"])
    return {
        "hand": hand, "headwise": mine, "alone": alone, "difference": float(gap),
        "spread": measure.spread(times["headwise"]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", default="small,gpt2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.25, help="of the heads, by hand")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{measure.where()}\n")
    rows = []
    for size in options.sizes.split(","):
        model = model_of(size, options.device)
        for examples, tokens in TEXTS:
            torch.manual_seed(1)
            ids = torch.randint(SIZES[size][1], (examples, tokens), device=options.device)
            for name in METRICS:
                found = compared(model, ids, metric_of(name), options.repeats, options.share)
                ratio, alone = (
                    float(found["hand"]) / float(found[k]) for k in ("headwise", "alone")
                )
                rows.append([
                    size, f"{examples} x {tokens}", name, f"{found['hand']:.2f}",
                    f"{found['headwise']:.2f}", f"{ratio:.1f}", f"{alone:.1f}",
                    f"{found['difference']:.0e}", found["spread"],
                ])  # fmt: skip
                print(" ".join(map(str, rows[-1])), flush=True)
    header = [
        "model", "examples x tokens", "metric", "by hand, s", "headwise, s", "times faster",
        "one head a pass", "relative difference", "spread",
    ]  # fmt: skip
    print("\n" + measure.table(header, rows))


if __name__ == "__main__":
    main()
