"""HeadCache beside kvpress: the same model, policy and share; the same tokens kept?

    python -m bench.shrink_peers --peer-python PATH [--model random|default|FOLDER]
        [--tokens 4096] [--decode 32] [--share 0.5] [--repeats 3] [--processes 3] [--threads 1]
        [--only POLICY] [--clock wall|cpu]

PATH: the interpreter of an environment with kvpress 0.5.5, which asks for transformers below 5.3
and so cannot live beside ours. Either side runs in processes of its own, in turn: the time of a
prefill of `--tokens` tokens, the median time of a decoded token (of `--processes` processes the
median), the bytes that the cache holds after the prefill, and, in one process more, the peak of
its memory beyond what it held with the model loaded (`measure.mapped` says what is special about
that one). What the peer kept is read off its keys and handed over in files; ours keeps the newest
token in any case.

"in pieces": the prompt is read 512 tokens at a time, and let go of after each. The peer can do so
only with a prompt that comes in one piece, which is what it is given.

"per head": kvpress' AdaKV over the same scores. Its split of the budget over heads (the best of
each head are safe, then all compete) is not that of the paper, which is ours: for the comparison
of tokens ours gets their numbers as a table, rounded up to a multiple of 16 (heads of one number
share memory and calls), so that all that they keep is kept; "per head, own split" is `Adaptive`,
where tokens need not be the same. "kept by both" is the share of the peer's entries that ours has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import cache_side, measure

HEADER = (
    *("policy", "kept by both", "prefill s", "kvpress", "token ms", "kvpress", "cache MiB"),
    *("kvpress", "peak MiB", "kvpress"),
)
SAFE = 0.2
"""The share of an even split of which AdaKV makes every head sure."""
PIECE = 512
Kept = list[list[list[int]]]
POLICIES = ("full", "key norm", "window", "observation", "key norm, per head",
            "observation, per head", "observation, per head, own split",
            "window, in pieces")  # fmt: skip


def cache_of(model: Any, policy: str, share: float, theirs: Kept | None) -> Any:
    """A HeadCache that keeps what kvpress' press of that name keeps, or, `full`, all."""
    from headwise.compress import (
        Adaptive,
        HeadCache,
        KeyNorm,
        ObservationWindow,
        PerHead,
        SinksAndWindow,
    )

    if policy == "full":
        return HeadCache(model)
    kind = policy.split(",")[0]
    made, sinks, window = {
        "key norm": (KeyNorm(), 0, 1),
        "window": (SinksAndWindow(), 4, 1),
        "observation": (ObservationWindow(64, 5), 0, 64),
    }[kind]
    budget: Any = share
    if policy.endswith("own split"):
        budget = Adaptive(share, SAFE)
    elif policy.endswith("per head"):
        assert theirs is not None
        budget = PerHead([[len(head) for head in layer] for layer in theirs])
    step = 16 if "per head" in policy else 1
    return HeadCache(model, budget, made, sinks=sinks, window=window, step=step)


@torch.no_grad()
def ours(arguments: list[str]) -> None:
    """One measurement of ours; the last line printed is JSON."""
    folder, exchange, policy, share, decode, repeats, threads, clock = arguments
    torch.set_num_threads(int(threads))
    model = cache_side.load(folder)
    ids = torch.load(Path(exchange) / "ids.pt")
    file = Path(exchange) / f"kept-{base_of(policy)}.pt"
    theirs: Kept | None = torch.load(file) if file.exists() else None

    piece = PIECE if policy.endswith("in pieces") else ids.shape[1]

    def prefill(some: Tensor) -> tuple[Any, Tensor]:
        cache = cache_of(model, policy, float(share), theirs)
        for part in some.split(piece, 1):
            logits = model(part, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        return cache, logits

    found, cache = cache_side.run(
        model,
        ids,
        int(decode),
        int(repeats),
        prefill,
        lambda cache: cache.nbytes(),
        cache_side.clock_of(clock),
    )
    if theirs is not None:
        found["same"] = same(theirs, [cache.kept(layer) for layer in range(len(theirs))])
    print(json.dumps(found))


def base_of(policy: str) -> str:
    """What the peer is asked for beside ours of this name."""
    return policy.removesuffix(", own split").removesuffix(", in pieces")


def same(theirs: Kept, mine: Kept) -> float:
    """Share of the peer's entries that ours has too."""
    pairs = [
        (set(a), set(b))
        for layer, other in zip(theirs, mine, strict=True)
        for a, b in zip(layer, other, strict=True)
    ]
    return sum(len(a & b) for a, b in pairs) / sum(len(a) for a, _ in pairs)


def prepared(name: str, folder: Path, tokens: int) -> str:
    """The folder of the model, and `ids.pt` beside it."""
    from headwise.models.default import default_model_path, default_text

    if name == "random":
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=1000, hidden_size=512, intermediate_size=1376,
                             num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
                             max_position_embeddings=32768)  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / "model")
        torch.save(torch.randint(1000, (1, tokens)), folder / "ids.pt")
        return str(folder / "model")
    from transformers import AutoTokenizer

    model = str(default_model_path()) if name == "default" else name
    text = default_text(12 * tokens)[0]
    ids = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt").input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise SystemExit(f"the text has {ids.shape[1]} tokens, fewer than {tokens}")
    torch.save(ids, folder / "ids.pt")
    return model


def started(
    python: str, module: str, arguments: list[str], mapped: bool = False
) -> dict[str, Any] | None:
    """What a process of its own found; None, with the end of what it said, where it failed."""
    around = measure.mapped() if mapped else None
    done = subprocess.run(
        [python, "-m", module, *arguments], capture_output=True, text=True, check=False, env=around
    )
    if done.returncode:
        print(f"{module} {' '.join(arguments)}: {done.stderr.strip()[-400:]}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


Side = tuple[str, str, list[str]]
"""An interpreter, a module, its arguments."""


def measured(sides: list[Side], given: argparse.Namespace) -> list[dict[str, Any] | None]:
    """Of each side: times from `--processes` processes in turn, the peak from one more."""
    numbers = [str(n) for n in (given.share, given.decode, given.repeats, given.threads)]
    once = [str(n) for n in (given.share, 2, 1, given.threads)]
    runs: list[list[dict[str, Any] | None]] = [[] for _ in sides]
    for _ in range(given.processes):
        for (python, module, asked), mine in zip(sides, runs, strict=True):
            mine.append(started(python, module, [*asked, *numbers, given.clock]))
    found: list[dict[str, Any] | None] = []
    for (python, module, asked), mine in zip(sides, runs, strict=True):
        there = [run for run in mine if run is not None]
        peak = started(python, module, [*asked, *once, given.clock], mapped=True)
        if not there or peak is None:
            found.append(None)
            continue
        times = {key: measure.median([run[key] for run in there]) for key in ("prefill", "token")}
        found.append({**there[-1], **times, "peak": peak["peak"]})
    return found


def row(policy: str, mine: dict[str, Any] | None, theirs: dict[str, Any] | None) -> list[str]:
    cells = [policy, "-" if mine is None or "same" not in mine else f"{100 * mine['same']:.2f} %"]
    for key, scale, digits in (("prefill", 1, 2), ("token", 1, 2), ("live", 2**20, 1),
                               ("peak", 2**20, 0)):  # fmt: skip
        for side in (mine, theirs):
            cells.append("-" if side is None else f"{side[key] / scale:.{digits}f}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--model", default="random")
    parser.add_argument("--only", choices=POLICIES)
    for name, default in (("tokens", 4096), ("decode", 32), ("repeats", 3),
                          ("processes", 3), ("threads", 1)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        model = prepared(given.model, Path(temporary), given.tokens)
        for policy in POLICIES if given.only is None else (given.only,):
            peer = (given.peer_python, "bench.kvpress_side", [model, temporary, base_of(policy)])
            here = (sys.executable, "bench.shrink_peers", ["side", model, temporary, policy])
            theirs, mine = measured([peer, here], given)
            rows.append(row(policy, mine, theirs))
            print(" | ".join(rows[-1]), flush=True)
    print(
        f"\n{given.model}, {given.tokens} tokens, share {given.share}, {given.clock} time, "
        f"{given.threads} threads; torch {torch.__version__}\n"
    )
    print(measure.table(HEADER, rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["side"]:
        ours(sys.argv[2:])
    else:
        main()
