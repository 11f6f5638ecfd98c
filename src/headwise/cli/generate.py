"""`headwise generate`: go on from a prompt with a model that was made smaller."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from headwise.cli.errors import UserError
from headwise.cli.progress import Progress


def run(options: argparse.Namespace) -> int:
    """Load, generate, print the text as it comes."""
    folder, curve = _found(options.folder.expanduser())
    if not 0 <= options.temperature < math.inf:
        raise UserError(f"--temperature {options.temperature}: expected 0 or more")
    prompt = sys.stdin.read() if options.prompt is None else options.prompt
    if not prompt.strip():
        raise UserError("the prompt is empty; give --prompt TEXT, or text on the standard input")
    from headwise.cli.loading import load_to_answer
    from headwise.cli.sources import model_source

    with Progress(quiet=options.quiet) as progress:
        loaded = load_to_answer(model_source(str(folder), options.gguf_file), options, progress)
        model, tokenizer = loaded.model, loaded.tokenizer
        if not (hasattr(model, "generate") and model.can_generate()):
            raise UserError(
                f"{folder} holds a {type(model).__name__}, which does not go on from a text; "
                "expected a model that generates"
            )
        cache = _cache(model, curve)
    import torch
    from transformers import TextStreamer

    torch.manual_seed(options.seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    length, room = inputs["input_ids"].shape[1], loaded.positions
    if room is not None and length + options.tokens > room:
        raise UserError(
            f"the prompt is {length} tokens and {options.tokens} are to follow, but {folder} has "
            f"positions for {room}; give a shorter prompt, or fewer --tokens"
        )
    sampling: dict[str, Any] = {"do_sample": options.temperature > 0}
    if options.temperature > 0:
        sampling["temperature"] = options.temperature
    with torch.no_grad():
        model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=options.tokens,
            past_key_values=cache,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            **sampling,
        )
    if cache is not None and not options.quiet:
        print(f"cache: {cache.nbytes() / 2**20:.2f} MiB", file=sys.stderr)
    return 0


def _found(folder: Path) -> tuple[Path, dict[str, Any]]:
    """(the folder with the weights, the curve of the search that left it, if there is one)"""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; expected what `headwise shrink --out DIR` left")
    curve: dict[str, Any] = {}
    for place in (folder, folder.parent):
        if (place / "curve.json").is_file():
            curve = json.loads((place / "curve.json").read_text("utf-8"))
            break
    if (folder / "config.json").is_file():
        return folder, curve
    inner = folder / "model"
    if not (inner / "config.json").is_file():
        state = "its search was interrupted: headwise shrink --resume" if curve else "it has none"
        raise UserError(f"{folder} holds no model ({state})")
    return inner, curve


def _cache(model: Any, curve: dict[str, Any]) -> Any:
    """The cache that the search found, None where it did not look for one."""
    settings = curve.get("cache")
    if not settings:
        return None
    from headwise.compress.search.cache_settings import cache_of

    return cache_of(model, settings)
