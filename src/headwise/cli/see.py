"""`headwise see`: load a model, measure its heads on texts, write the atlas and the report."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.cli.errors import Interrupted, UserError
from headwise.cli.sources import closest, model_source, output_folder, read_texts

if TYPE_CHECKING:
    from headwise.cli.loading import Loaded

ATLAS = "atlas.safetensors"
REPORT = "report.html"
PARTIAL = "partial"
# Of each text, unless --tokens says otherwise: enough for sinks, induction and distance to show,
# and seconds on a small model.
DEFAULT_TOKENS = 2048
DEFAULT_TEXTS = 4
# More than any tokenizer packs into a token on average, so that no text comes out short.
_CHARACTERS_PER_TOKEN = 8


def run(options: argparse.Namespace) -> int:
    """Measure, write both files, print what was found and where it is."""
    source = model_source(options.model, options.gguf_file)
    texts = read_texts(options.text) if options.text else None
    out = output_folder(options.out, source)
    check_output(out, options.resume, options.force)
    if options.instruments:
        check_instruments(options.instruments)
    _quiet_libraries(options.quiet)

    from headwise.cli.loading import load
    from headwise.cli.progress import Progress

    progress = Progress(quiet=options.quiet)
    try:
        with progress:
            progress.note(f"loading {source.name}")
            _set_threads(options.threads)
            loaded = load(
                source, options.dtype, options.device, options.trust_remote_code, options.revision
            )
            tokens = token_limit(options.tokens, loaded, source.name)
            if loaded.unset:
                progress.note(
                    f"{len(loaded.unset)} weights outside the layers are not in the "
                    f"files (such as {loaded.unset[0]}); they do not reach the heads"
                )
            if loaded.trained and tokens > loaded.trained:
                progress.note(
                    f"{tokens} tokens are more than the {loaded.trained} that "
                    f"{source.name} is made for"
                )
            named = texts or default_texts(tokens)
            atlas = measure(options, source.name, loaded, named, tokens, out, progress)
    except KeyboardInterrupt:
        raise Interrupted(_how_to_go_on(options, out)) from None
    return finish(atlas, out, options)


def measure(
    options: argparse.Namespace,
    name: str,
    loaded: "Loaded",
    texts: list[tuple[str, str]],
    tokens: int,
    out: Path,
    progress: Any,
) -> Any:
    from headwise.instruments import see

    return see(
        loaded.model,
        texts,
        instruments=options.instruments,
        tokens=tokens,
        batch_size=options.batch_size,
        seed=options.seed,
        out=out,
        resume=options.resume,
        progress=progress,
        tokenizer=loaded.tokenizer,
    )


def check_output(out: Path, resume: bool, force: bool) -> None:
    """Refuse to write over results that nobody gave up."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; expected a folder")
    found = [name for name in (ATLAS, REPORT, PARTIAL) if (out / name).exists()]
    if found and not (resume or force):
        unfinished = found == [PARTIAL]
        state = "an unfinished run" if unfinished else f"results ({', '.join(found)})"
        raise UserError(
            f"{out} holds {state}; choose another folder with --out, replace it with --force"
            + (", or go on with it with --resume" if PARTIAL in found else "")
        )


def check_instruments(asked: tuple[str, ...]) -> None:
    """Refuse names that no instrument has, with the nearest that one has."""
    from headwise.instruments import INSTRUMENTS

    for name in asked:
        if name not in INSTRUMENTS:
            raise UserError(closest(name, INSTRUMENTS, "instrument"))


def token_limit(asked: int | None, loaded: "Loaded", name: str) -> int:
    """Tokens taken from each text: what was asked for, or what the model has positions for."""
    if asked is None:
        known = [n for n in (loaded.positions, loaded.trained) if n is not None]
        return min([DEFAULT_TOKENS, *known])
    if loaded.positions is not None and asked > loaded.positions:
        raise UserError(
            f"--tokens {asked}, but {name} has positions for {loaded.positions} tokens, looked "
            f"up in a table that ends there; use --tokens {loaded.positions} or fewer"
        )
    return asked


def default_texts(tokens: int) -> list[tuple[str, str]]:
    """Several stretches of the default text, long enough for `tokens` each, fewer if it ends."""
    from headwise.models.default import default_text

    length = tokens * _CHARACTERS_PER_TOKEN
    for count in range(DEFAULT_TEXTS, 0, -1):
        try:
            text, name = default_text(count * length)
        except ValueError:
            continue
        return [
            (f"{name}, part {part + 1}", text[part * length : (part + 1) * length])
            for part in range(count)
        ]
    raise UserError(
        f"the default text is too short for --tokens {tokens}; name a text of your own with --text"
    )


def finish(atlas: Any, out: Path, options: argparse.Namespace) -> int:
    """Write the atlas and the report; print what was found, then where they are."""
    from headwise.cli.tables import kinds_found, measured_on
    from headwise.report import write

    atlas.provenance["command"] = shlex.join(["headwise", *options.argv])
    saved = atlas.save(out / ATLAS)
    page = write(atlas, out / REPORT)
    print(measured_on(atlas))
    print()
    print(kinds_found(atlas))
    print()
    print(f"atlas   {saved}")
    print(f"report  {page}")
    return 0


def _how_to_go_on(options: argparse.Namespace, out: Path) -> str:
    if not (out / PARTIAL).exists():
        return "interrupted before anything was finished; nothing was kept"
    again = [word for word in options.argv if word not in ("--resume", "--force")]
    return (
        f"interrupted; what was finished is kept in {out}. Go on with:\n"
        f"  {shlex.join(['headwise', *again, '--resume'])}"
    )


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _quiet_libraries(quiet: bool) -> None:
    """Bars of other libraries only where a person watches."""
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
