"""A patching sweep beside TransformerLens: same model, same prompts, a process of its own each.

    build/transformerlens/bin/python -m bench.cause_peers       (see tests/proof/transformerlens)
    build/transformerlens/bin/python -m bench.cause_peers --layers 6 --width 256 --sites heads

A GPT-2 of random weights; every layer and position of the residual, then of the attentions, the
MLPs, and every head. Printed: seconds of either (wall clock, and of the processor), their ratio,
what either took of memory at most beyond what stood before the sweep, and the largest difference.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SITES = ("residual", "attention", "mlp", "heads")
VOCABULARY = 50_257


def main() -> None:
    """Run both and print the table, or run one and print what it measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("layers", 12), ("width", 768), ("tokens", 16), ("examples", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sites", nargs="+", choices=SITES, default=list(SITES))
    parser.add_argument("--one", nargs=2, metavar=("WHO", "SITE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("\n" + json.dumps(measured(options, *options.one)))
        return
    print("| site | places | headwise s | TransformerLens s | times as fast | processor s | "
          "memory MiB | largest difference |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for site in options.sites:
        ours, theirs = (_apart(options, who, site) for who in ("headwise", "lens"))
        pairs = list(zip(ours["values"], theirs["values"], strict=False))
        off = max(abs(a - b) for a, b in pairs)
        print(
            f"| {site} | {len(pairs)} | {ours['seconds']:.2f} | {theirs['seconds']:.2f} | "
            f"{theirs['seconds'] / ours['seconds']:.1f} | "
            f"{ours['processor']:.2f}, {theirs['processor']:.2f} | "
            f"{ours['mib']:.0f}, {theirs['mib']:.0f} | {off:.0e} |",
            flush=True,
        )


def _apart(options: argparse.Namespace, who: str, site: str) -> dict[str, Any]:
    given = {k: v for k, v in vars(options).items() if k not in ("one", "sites")}
    more = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "bench.cause_peers", *more, "--one", who, site]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{who}, {site}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measured(options: argparse.Namespace, who: str, site: str) -> dict[str, Any]:
    """One library's sweep over one kind of site, the second of two."""
    import torch

    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    shape = (2, options.examples, options.tokens)
    clean, corrupted = torch.randint(1, options.vocabulary, shape, generator=generator)
    corrupted[:, : options.tokens // 2] = clean[:, : options.tokens // 2]
    answers = torch.randint(1, options.vocabulary, (2, options.examples), generator=generator)
    sweep = {"headwise": _ours, "lens": _theirs}[who](_model(options), clean, corrupted, answers)
    sweep(site, 1)  # what is loaded, compiled and allocated once
    before, began, worked = _restart(), time.perf_counter(), time.process_time()
    values = sweep(site, options.layers)
    return {
        "values": values,
        "seconds": time.perf_counter() - began,
        "processor": time.process_time() - worked,
        "mib": _peak() - before,
    }


def _model(options: argparse.Namespace) -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=options.vocabulary, n_embd=options.width, n_layer=options.layers,
        n_head=options.width // 64, n_positions=1024, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():  # large enough for places to differ
        for name, weights in model.named_parameters():
            if weights.dim() == 2 and "wte" not in name and "wpe" not in name:
                torch.nn.init.normal_(weights, std=1.5 * weights.shape[0] ** -0.5)
    return model.eval()


Sweep = Callable[[str, int], list[float]]


def _ours(model: Any, clean: Any, corrupted: Any, answers: Any) -> Sweep:
    from headwise.instruments.metrics import LogitDifference
    from headwise.instruments.patching import patch

    metric = LogitDifference(*answers)

    def sweep(site: str, layers: int) -> list[float]:
        table = patch(model, clean, corrupted, metric, site, layers=range(layers))
        values: list[float] = table.values.flatten().tolist()
        return values

    return sweep


def _theirs(model: Any, clean: Any, corrupted: Any, answers: Any) -> Sweep:
    import torch
    from transformer_lens import TransformerBridge, patching

    from tests.proof.lens import numerals

    words = numerals(model.config.vocab_size)
    lens = TransformerBridge.boot_transformers(
        "gpt2", hf_model=model, tokenizer=words, device="cpu"
    )
    rows = torch.arange(len(clean))
    sweeps = {
        "residual": patching.get_act_patch_resid_pre,
        "attention": patching.get_act_patch_attn_out,
        "mlp": patching.get_act_patch_mlp_out,
        "heads": patching.get_act_patch_attn_head_out_all_pos,
    }

    def metric(logits: Any) -> Any:
        last = logits[:, -1]
        return (last[rows, answers[0]] - last[rows, answers[1]]).mean()

    def sweep(site: str, layers: int) -> list[float]:
        with torch.no_grad():
            _, cache = lens.run_with_cache(clean)
            if layers == 1:
                return []
            values: list[float] = sweeps[site](lens, corrupted, cache, metric).flatten().tolist()
            return values

    return sweep


def _peak() -> float:
    """Most memory of the process since `_restart`, MiB."""
    return _status("VmHWM")


def _restart() -> float:
    """Forget the most, where the system can (Linux); what is taken now, MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
