"""`headwise generate`: go on from a prompt with a model that was made smaller."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from headwise.cli.errors import UserError
from headwise.cli.progress import Progress

MANIFEST = "headwise.json"


def run(options: argparse.Namespace) -> int:
    """Load, generate, print the text as it comes."""
    folder, curve = _found(options.folder.expanduser())
    if options.temperature < 0:
        raise UserError(f"--temperature {options.temperature}: expected 0 or more")
    prompt = sys.stdin.read() if options.prompt is None else options.prompt
    if not prompt.strip():
        raise UserError("the prompt is empty; give --prompt TEXT, or text on the standard input")
    with Progress(quiet=options.quiet) as progress:
        model, tokenizer = _loaded(folder, options, progress)
        cache = _cache(model, curve)
    import torch
    from transformers import TextStreamer

    torch.manual_seed(options.seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
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


def _loaded(folder: Path, options: argparse.Namespace, progress: Progress) -> tuple[Any, Any]:
    from headwise.cli.loading import chosen_device, load_as_told, quiet_transformers
    from headwise.cli.sources import model_source

    if not (folder / MANIFEST).is_file():
        found = load_as_told(model_source(str(folder), options.gguf_file), options, progress)
        return found.model, found.tokenizer
    progress.note(f"loading {folder}")
    transformers = quiet_transformers()
    import torch

    from headwise.compress.saving import load

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = chosen_device(options.device)
    dtype = getattr(torch, options.dtype) if options.dtype not in (None, "auto") else None
    try:
        model = load(folder, device=device, dtype=dtype).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be loaded: {error}") from error
    return model, tokenizer


def _cache(model: Any, curve: dict[str, Any]) -> Any:
    """The cache that the search found, None where it did not look for one."""
    settings = curve.get("cache")
    if not settings:
        return None
    from headwise.compress.search.cache_settings import cache_of

    return cache_of(model, settings)
