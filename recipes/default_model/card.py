"""The model card, filled with numbers that were measured."""

from __future__ import annotations

import math
from string import Template
from typing import Any

from headwise.models.default import EXCLUDED_FOLDERS, HELD_OUT_ONE_IN
from recipes.default_model.mixture import (
    DRILL,
    DRILL_LENGTH,
    DRILL_ROWS,
    LENGTHS,
    REPEATED_ONE_IN,
    TOKENS_PER_STEP,
    tokens_seen,
)
from recipes.default_model.train import CONFIG, FALL, REPEATED_WEIGHT, TABLE_RATE, WARMUP

TEMPLATE = Template("""\
---
license: apache-2.0
language: [en, code]
library_name: transformers
pipeline_tag: text-generation
---

# The embedded default model of headwise

A causal language model of $parameters parameters that is small enough to travel with the package
and trained far enough that its attention heads do recognisable things. It exists to be looked at:
`headwise see` without a model's name looks at this one. It is of no use for writing code or prose.

## Model

Llama architecture (`LlamaForCausalLM`): $layers layers of width $width, $heads query heads on
$kv_heads key-value heads of $head_dim dimensions, gated MLP of $mlp, rotary positions,
tied embeddings. Weights are stored in float16 and computed with in float32.
Byte-level BPE tokenizer with $vocabulary entries, which puts `<|begin|>` in front of every text.
Positions up to $longest tokens run; it was trained on rows of $shortest_row to $longest_row, so
quality beyond is not promised.

## Data

Sources and documentation topics of the standard library of $python, as installed.

| side | documents | bytes | tokens |
| --- | --- | --- | --- |
| training | $train_documents | $train_bytes | $train_tokens |
| held out | $held_out_documents | $held_out_bytes | $held_out_tokens |

Held out is one document in $one_in, by the SHA-256 of its name; neither the tokenizer nor the model
has seen them. Left out of both are files made for one machine and the folders $excluded.
The listing of all documents (name, bytes, SHA-256 of each) has the SHA-256
`$listing_sha256`.

Not all of the training is text: one row in $repeated_one_in holds random tokens instead, of which a
span of varying length is repeated from a varying offset on. Half of these rows draw uniformly from
the vocabulary, half by the frequencies of the text; only the tokens that can be known from the
first occurrence count, and their mean loss is added to that of the text with a weight of
$repeated_weight. Steps $drill_start to $drill_stop hold nothing else, in rows of $drill_length. In
all, $repeated_share % of the tokens were in repeated rows. They are there so that induction heads
form in a short training; the induction scores below should be read with that in mind. Every row
begins with `<|begin|>`.

## Training

    python -m recipes.default_model.train --steps $steps --seed $seed --peak $peak$autocast
    python -m recipes.default_model.export
    python -m recipes.default_model.evaluate

$steps_done steps of $tokens_per_step tokens ($drill_tokens in the drill; $tokens_seen in all), in
rows of $shortest_row to $longest_row. Muon for the matrices inside the layers, AdamW at $table_rate
of its learning rate for embeddings and gains; the rate rises over $warmup steps to $peak, stays,
and falls linearly to zero over the last $fall % of the steps; weight decay 0.1, gradient norm
clipped to 1; seed $seed for weights and rows. $precision It took
$minutes minutes on one thread of a machine with 2 CPU cores and no GPU, while other work ran beside
it, and was stopped and resumed on the way. The losses of its first hundred steps came out the same
when the command was run again from nothing.

## Measured

By `recipes/default_model/evaluate.py`, on the shipped weights. Losses are in nats a token.

| on text that was held out | loss | perplexity |
| --- | --- | --- |
| this model, windows of 512 tokens | $held_out_loss | $held_out_perplexity |
| trigram, interpolated modified Kneser-Ney, same tokens | $trigram_loss | $trigram_perplexity |

| on 64 random tokens, written twice | loss |
| --- | --- |
| first copy (a model of text expects text; a uniform guess costs $uniform) | $first_copy_loss |
| second copy | $second_copy_loss |

Scores are mean attention weights. Induction: on the random tokens above, from each token of the
second copy to the one that followed its first occurrence. Previous token and sink (the first
token): on held-out text in windows of 256.

$tables

The strongest: $strongest.

It ran $longest_run tokens in one piece with finite results.

## Licences

The weights are under the Apache-2.0 licence, like headwise. They were trained on files of the
Python standard library, which are under the Python Software Foundation License Version 2
(https://docs.python.org/3/license.html); no such file is contained in this folder.
""")

SCORES = {"induction": "Induction", "previous_token": "Previous token", "sink": "Sink"}


def card(facts: dict[str, str | int], training: dict[str, Any], numbers: dict[str, Any]) -> str:
    """The card in Markdown, from the corpus facts, the training record and the evaluation."""
    vocabulary = int(CONFIG["vocab_size"])
    repeated, seen = tokens_seen(training["step"])
    losses = ("held_out_loss", "trigram_loss", "first_copy_loss", "second_copy_loss")
    return TEMPLATE.substitute(
        {name: f"{value:,}" if isinstance(value, int) else value for name, value in facts.items()},
        parameters=f"{numbers['parameters']:,}",
        layers=CONFIG["num_hidden_layers"],
        width=CONFIG["hidden_size"],
        heads=CONFIG["num_attention_heads"],
        kv_heads=CONFIG["num_key_value_heads"],
        head_dim=CONFIG["head_dim"],
        mlp=CONFIG["intermediate_size"],
        vocabulary=f"{vocabulary:,}",
        longest=f"{CONFIG['max_position_embeddings']:,}",
        shortest_row=min(LENGTHS),
        longest_row=f"{max(LENGTHS):,}",
        excluded=", ".join(f"`{name}`" for name in sorted(EXCLUDED_FOLDERS)),
        one_in=HELD_OUT_ONE_IN,
        repeated_one_in=REPEATED_ONE_IN,
        repeated_share=f"{100 * repeated / seen:.0f}",
        drill_start=DRILL.start + 1,
        drill_stop=DRILL.stop,
        drill_length=DRILL_LENGTH,
        drill_tokens=f"{DRILL_LENGTH * DRILL_ROWS:,}",
        repeated_weight=REPEATED_WEIGHT,
        table_rate=TABLE_RATE,
        warmup=WARMUP,
        fall=f"{100 * FALL:.0f}",
        tokens_per_step=f"{TOKENS_PER_STEP:,}",
        tokens_seen=f"{seen / 1e6:.1f} million",
        steps=training["steps"],
        steps_done=_steps_done(training),
        seed=training["seed"],
        peak=training["peak"],
        minutes=training["minutes"],
        autocast=" --autocast" if training["autocast"] else "",
        precision="Matrix products in bfloat16, all else in float32."
        if training["autocast"]
        else "All in float32.",
        held_out_perplexity=f"{math.exp(numbers['held_out_loss']):.1f}",
        trigram_perplexity=f"{math.exp(numbers['trigram_loss']):.1f}",
        uniform=f"{math.log(vocabulary):.2f}",
        tables="\n\n".join(_table(title, numbers[name]) for name, title in SCORES.items()),
        strongest="; ".join(_best(title, numbers[name]) for name, title in SCORES.items()),
        longest_run=f"{numbers['longest_run']:,}",
        **{name: f"{numbers[name]:.3f}" for name in losses},
    )


def _steps_done(training: dict[str, Any]) -> str:
    if training["step"] == training["steps"]:
        return f"{training['steps']:,}"
    return f"So far {training['step']:,} of {training['steps']:,}"


def _table(title: str, scores: list[list[float]]) -> str:
    lines = [f"| {title} | " + " | ".join(f"head {h}" for h in range(len(scores[0]))) + " |"]
    lines.append("| --- " * (len(scores[0]) + 1) + "|")
    for layer, row in enumerate(scores):
        lines.append(f"| layer {layer} | " + " | ".join(f"{score:.2f}" for score in row) + " |")
    return "\n".join(lines)


def _best(title: str, scores: list[list[float]]) -> str:
    score, layer, head = max(
        (score, layer, head) for layer, row in enumerate(scores) for head, score in enumerate(row)
    )
    return f"{title.lower()} {score:.2f} in layer {layer} head {head}"
