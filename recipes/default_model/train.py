"""Train the embedded default model.

    python -m recipes.default_model.train --work build/default_model

Run from the root of the repository. Stopped at any time, the same command goes on from the last
checkpoint, on the same rows it would have seen. The learning rate rises, stays, and falls to zero
over the last part of `--steps`; before the fall has begun, a resumed run may change `--steps`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.default_model import corpus
from recipes.default_model.mixture import IGNORED, Batch, batch

CONFIG: dict[str, Any] = {
    "vocab_size": corpus.VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": corpus.LONGEST,
    "tie_word_embeddings": True,
    "initializer_range": 0.04,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
WARMUP = 100
REPEATED_WEIGHT = 0.25
"""Weight of the mean loss on repeated rows beside that on text."""
TABLE_RATE = 0.3
"""Learning rate of embeddings and gains (AdamW) as a share of the matrices' (Muon)."""
FALL = 0.4
"""Share of the steps over which the learning rate falls to zero."""


def rate(step: int, steps: int) -> float:
    """Learning rate of a step as a share of its peak."""
    rise = (step + 1) / WARMUP
    fall = (steps - step) / (FALL * steps)
    return min(1.0, rise, fall)


def optimizers(model: LlamaForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and gains."""
    inside = [p for p in model.model.layers.parameters() if p.ndim == 2]
    tables = [model.model.embed_tokens.weight]  # the output table is the same
    gains = [p for p in model.parameters() if p.ndim == 1]
    adam = [{"params": tables, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    kinds: list[torch.optim.Optimizer] = [
        torch.optim.Muon(inside, lr=peak, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adam, lr=peak * TABLE_RATE, betas=(0.9, 0.95), fused=True),
    ]
    for kind in kinds:
        for group in kind.param_groups:
            group["initial_lr"] = group["lr"]
    return kinds


def _parts(losses: torch.Tensor, rows: Batch) -> torch.Tensor:
    """Sum of the losses and number of counted tokens, on text and on repeated rows: (2, 2)."""
    counted = rows.targets != IGNORED
    kinds = (~rows.repeated, rows.repeated)
    return torch.stack([torch.stack([losses[k].sum(), counted[k].sum()]) for k in kinds])


def save(path: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint beside its place first: a kill while writing leaves the old one."""
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def train(work: Path, steps: int, seed: int, peak: float, autocast: bool, stop: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    data = corpus.load(work)
    unigram = np.bincount(data.train, minlength=corpus.VOCABULARY) / len(data.train)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    kinds = optimizers(model, peak)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {data.facts}", flush=True)

    checkpoint, first, seconds = work / "checkpoint.pt", 0, 0.0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(kinds, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seconds = state["step"], state["seconds"]
        print(f"resumed at step {first}", flush=True)

    started = saved_at = time.monotonic()
    sums = torch.zeros(2, 2)  # of losses and counted tokens; on text, on repeated rows
    for step in range(first, stop):
        rows = batch(data.train, unigram, step, seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=rows.tokens, use_cache=False).logits
        losses = F.cross_entropy(
            logits.float().flatten(0, 1),
            rows.targets.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        ).view_as(rows.targets)
        parts = _parts(losses, rows)
        means = parts[:, 0] / parts[:, 1].clamp(min=1)  # the drill has no text
        (means[0] + REPEATED_WEIGHT * means[1]).backward()
        sums += parts.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in kinds:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()

        now, done = time.monotonic(), step + 1
        spent = seconds + now - started
        if done % 50 == 0 or done == stop:
            text, copied = (sums[:, 0] / sums[:, 1]).tolist()
            left = (now - started) / (done - first) * (steps - done)
            line = {
                "step": done,
                "text": None if math.isnan(text) else text,
                "repeated": copied,
                "seconds": spent,
            }
            with (work / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            shown = "-" if math.isnan(text) else f"{text:.3f}"
            print(
                f"step {done}/{steps}  text {shown}  repeated {copied:.3f} nats  "
                f"{spent:.0f} s, {left:.0f} s left",
                flush=True,
            )
            sums.zero_()
        if now - saved_at > 120 or done == stop:
            state = {"model": model.state_dict(), "step": done, "seconds": spent}
            state |= {"steps": steps, "seed": seed, "peak": peak, "autocast": autocast}
            state["optimizers"] = [optimizer.state_dict() for optimizer in kinds]
            save(checkpoint, state)
            saved_at = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("build/default_model"))
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--stop", type=int, help="end after this step, to go on later")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak", type=float, default=1e-2, help="highest learning rate")
    parser.add_argument("--autocast", action="store_true", help="matrix products in bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    stop = min(given.stop or given.steps, given.steps)
    train(given.work, given.steps, given.seed, given.peak, given.autocast, stop)


if __name__ == "__main__":
    main()
