"""`headwise edit`: write a fact into a model as a patch, or apply patches and ask."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.cli.edit_options import ONLY_WITH_FACT
from headwise.cli.errors import UserError
from headwise.cli.progress import Progress
from headwise.cli.sources import model_source, read_texts

if TYPE_CHECKING:
    from headwise.cli.loading import Loaded
    from headwise.edits import EditEffects, Patch

_STATISTICS_SHARE = 0.8  # of the text; the loss is measured on the rest


def run(options: argparse.Namespace) -> int:
    """Make or apply patches; print what they do."""
    writing = _checked(options)
    source = model_source(options.model, options.gguf_file)
    texts = read_texts(options.text) if options.text else None
    with Progress(quiet=options.quiet) as progress:
        from headwise.cli.loading import load_to_answer

        loaded = load_to_answer(source, options, progress)

        # After the load, which tells what it does before it imports torch.
        from headwise.edits import Patch

        before = _answers(loaded, options)
        for file in options.apply:
            Patch.load(file, loaded.model).apply()
        patch, effects = None, None
        if writing:
            patch, effects = _write(options, loaded, texts, progress)
            patch.apply()
        after = _answers(loaded, options)
    for file in options.apply:
        print(f"applied  {file}")
    if patch is not None:
        layers = ", ".join(str(n) for n in patch.record["layers"])
        print(f"{patch.record['method']}     layer {layers} of {source.name}: "
              f"{options.prompt} -> {options.target}\n")  # fmt: skip
        print(effects)
    for asked, was, now in zip(_asked(options), before, after, strict=True):
        print(f"\nasked    {asked}\nbefore  {was}\nafter   {now}")
    if patch is not None and options.out is not None:
        patch.save(options.out)
        print(f"\npatch    {options.out}")
    return 0


def _checked(options: argparse.Namespace) -> bool:
    """Whether a fact is to be written; raises UserError for what does not go together."""
    parts = {name: getattr(options, name) for name in ("prompt", "subject", "target")}
    given = [name for name, value in parts.items() if value]
    if given and len(given) < 3:
        missing = ", ".join(f"--{name}" for name in parts if name not in given)
        raise UserError(f"a fact is written with --prompt, --subject and --target; give {missing}")
    if not given:
        if not options.apply:
            raise UserError(
                "nothing to do: give --prompt, --subject and --target to write a fact, or "
                "--apply FILE with --ask TEXT"
            )
        extra = [f"--{name}" for name in ONLY_WITH_FACT if getattr(options, name)]
        if extra:
            raise UserError(f"{', '.join(extra)} goes with --prompt, --subject and --target")
        if not options.ask:
            raise UserError("--apply alone changes no file; say what to ask with --ask TEXT")
    for file in options.apply:
        if not file.is_file():
            raise UserError(f"no patch file {file}")
    out: Path | None = options.out
    if out is not None and out.is_dir():
        raise UserError(f"--out {out} is a folder; expected a file for the patch")
    if out is not None and out.exists() and not options.force:
        raise UserError(f"{out} is there already; choose another file, or --force")
    if options.statistics is not None and not options.layer and not options.statistics.exists():
        raise UserError("--statistics FILE to be written needs --layer N, whose keys it keeps")
    return bool(given)


def _write(
    options: argparse.Namespace,
    loaded: "Loaded",
    texts: list[tuple[str, str]] | None,
    progress: Progress,
) -> "tuple[Patch, EditEffects]":
    from headwise.cli.see import default_text
    from headwise.edits import edit_fact, measure_edit
    from headwise.edits.fact_prompts import encode

    given = texts or [default_text(options.tokens)]
    words = "\n\n".join(content for _, content in given)
    ids = _tensor(encode(loaded.tokenizer, words)[: options.tokens])
    cut = int(len(ids) * _STATISTICS_SHARE)
    if cut < 1 or len(ids) - cut < 2:
        raise UserError(f"the text has {len(ids)} tokens; expected at least 10")
    patch = edit_fact(
        loaded.model,
        options.prompt,
        options.subject,
        options.target,
        tokenizer=loaded.tokenizer,
        method=options.method or "rome",
        layers=options.layer,
        statistics=_statistics(options, loaded, ids[:cut], progress),
        prefixes=options.prefixes,
        seed=options.seed,
        progress=progress.step,
    )
    progress.note("measuring the edit")
    effects = measure_edit(
        patch,
        loaded.tokenizer,
        paraphrases=options.paraphrase,
        neighbours=options.neighbour,
        text=ids[cut:],
        window=_window(loaded),
    )
    return patch, effects


def _statistics(options: argparse.Namespace, loaded: "Loaded", ids: Any, progress: Progress) -> Any:
    """Read from, or collected into, the file that was named."""
    from headwise.edits import KeyStatistics, collect_key_statistics

    if options.statistics is not None and options.statistics.is_file():
        return KeyStatistics.load(options.statistics)
    window = _window(loaded)
    if options.statistics is None:
        return list(ids.split(window))
    found = collect_key_statistics(
        loaded.model, ids, options.layer, window=window, progress=progress.step
    )
    found.save(options.statistics)
    return found


def _window(loaded: "Loaded", most: int = 256) -> int:
    return min(most, loaded.positions or most)


def _asked(options: argparse.Namespace) -> list[str]:
    return [*([options.prompt] if options.prompt else []), *options.ask]


def _answers(loaded: "Loaded", options: argparse.Namespace) -> list[str]:
    """What the model goes on with, token by token the likeliest."""
    import torch

    from headwise.edits.fact_prompts import read_wording
    from headwise.models.prefix import logits_of

    found = []
    for text in _asked(options):
        ids = read_wording(text, text, loaded.tokenizer).ids.tolist()
        start = len(ids)
        with torch.no_grad():
            for _ in range(options.new_tokens):
                line = torch.tensor([ids[-loaded.positions :] if loaded.positions else ids])
                out = logits_of(loaded.model(input_ids=line.to(loaded.model.device)))
                ids.append(int(out[0, -1].argmax()))
        found.append(repr(loaded.tokenizer.decode(ids[start:])))
    return found


def _tensor(ids: list[int]) -> Any:
    import torch

    return torch.tensor(ids, dtype=torch.long)
