"""Measure the exported model, hold it to its requirements, and write its card.

    python -m recipes.default_model.evaluate --work build/default_model

Exits with status 1, and leaves the card alone, where a requirement is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.default_model import corpus, measure
from recipes.default_model.card import card
from recipes.default_model.export import SHIPPED
from recipes.default_model.trigram import Trigram

REQUIRED = {"induction": 0.4, "previous_token": 0.4, "sink": 0.5}
"""The best head of the model has at least so much of each."""
MARGIN = 0.3
"""Nats by which the loss on held-out text has to lie under the trigram's."""
MEGABYTES = 8.0
WINDOW, HEAD_WINDOW, HEAD_ROWS, SPAN = 512, 256, 32, 64


def evaluate(folder: Path, data: corpus.Corpus, seed: int) -> dict[str, Any]:
    """All numbers of the card that come from the model in `folder`; losses in nats a token."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    begin = AutoTokenizer.from_pretrained(folder).bos_token_id
    vocabulary = model.config.vocab_size
    repeated = measure.repeated_rows(vocabulary, SPAN, HEAD_ROWS, begin, seed)
    every = len(data.held_out) // (HEAD_WINDOW * HEAD_ROWS)
    text = measure.windows(data.held_out, HEAD_WINDOW, begin)[::every][:HEAD_ROWS]
    numbers: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "megabytes": sum(f.stat().st_size for f in folder.iterdir()) / 1e6,
        "held_out_loss": measure.text_loss(model, measure.windows(data.held_out, WINDOW, begin)),
        "trigram_loss": Trigram(data.train, vocabulary).loss(data.held_out),
        "first_copy_loss": measure.text_loss(model, repeated[:, : SPAN + 1]),
        "second_copy_loss": measure.text_loss(model, repeated, skip=SPAN + 1),
        "induction": measure.induction(model, repeated).tolist(),
        "previous_token": measure.previous_token(model, text).tolist(),
        "sink": measure.sink(model, text).tolist(),
    }
    model.set_attn_implementation("sdpa")
    tokens = torch.from_numpy(data.held_out[: corpus.LONGEST].astype("int64"))[None]
    with torch.inference_mode():
        logits = model(input_ids=tokens, logits_to_keep=1).logits
    numbers["longest_run"] = tokens.shape[1]
    numbers["longest_is_finite"] = bool(logits.isfinite().all())
    return numbers


def missed(numbers: dict[str, Any]) -> list[str]:
    """The requirements that these numbers do not meet, each as a sentence."""
    faults = []
    if numbers["held_out_loss"] > numbers["trigram_loss"] - MARGIN:
        faults.append(
            f"held-out loss {numbers['held_out_loss']:.3f} is not {MARGIN} nats under the "
            f"trigram's {numbers['trigram_loss']:.3f}"
        )
    for name, least in REQUIRED.items():
        best = max(max(row) for row in numbers[name])
        if best <= least:
            faults.append(f"the best {name} score is {best:.2f}, required is above {least}")
    if numbers["megabytes"] > MEGABYTES:
        faults.append(f"{numbers['megabytes']:.1f} MB, at most {MEGABYTES} fit the package")
    if not numbers["longest_is_finite"]:
        faults.append(f"logits after {numbers['longest_run']} tokens are not finite")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the exported model and write its card")
    parser.add_argument("--work", type=Path, default=Path("build/default_model"))
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    data = corpus.load(given.work)
    numbers = evaluate(given.model, data, given.seed)
    (given.work / "evaluation.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(json.dumps(numbers))
    if faults := missed(numbers):
        sys.exit("\n".join(faults))
    training = json.loads((given.work / "training.json").read_text())
    (given.model / "README.md").write_text(card(data.facts, training, numbers))
    print(given.model / "README.md")


if __name__ == "__main__":
    main()
