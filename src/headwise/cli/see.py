"""`headwise see`: load a model, measure its heads on texts, write the atlas and the report."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.cli.errors import Interrupted, UserError
from headwise.cli.progress import Progress
from headwise.cli.sources import ModelSource, closest, model_source, output_folder, read_texts

if TYPE_CHECKING:
    from headwise.cli.loading import Loaded
    from headwise.instruments import Atlas

ATLAS = "atlas.safetensors"
REPORT = "report.html"
# Where `headwise.see` keeps finished samples until the atlas is whole.
PARTIAL = "partial"
# Samples taken from the default text; of a text of the user's own, one.
DEFAULT_WINDOWS = 4
# Few tokenizers pack more than this into a token on average; a text that ends early only means
# fewer samples.
_CHARACTERS_PER_TOKEN = 6
# What a command may differ in and still be the same run.
_NOT_OF_THE_RUN = {"--resume", "--force", "--quiet", "--debug"}


def run(options: argparse.Namespace) -> int:
    """Measure, write both files, print what was found and where it is."""
    source = model_source(options.model, options.gguf_file)
    texts = read_texts(options.text) if options.text else None
    out = output_folder(options.out, source)
    finished = check_output(out, options)
    if finished is not None:
        return tell(finished, out)
    if options.instruments:
        check_instruments(options.instruments)
    _quiet_libraries(options.quiet)
    try:
        with Progress(quiet=options.quiet) as progress:
            atlas = measure(options, source, texts, out, progress)
    except KeyboardInterrupt:
        raise Interrupted(how_to_go_on(options, out)) from None
    return tell(atlas, out)


def measure(
    options: argparse.Namespace,
    source: ModelSource,
    texts: list[tuple[str, str]] | None,
    out: Path,
    progress: Progress,
) -> "Atlas":
    """Load the model and measure it; the atlas is in the folder when this returns."""
    from headwise.cli.loading import load_as_told

    loaded = load_as_told(source, options, progress)

    # After the load, which tells what it does before it imports torch.
    from headwise.instruments import see

    if loaded.unset:
        progress.warn(
            f"{len(loaded.unset)} weights outside the layers are not in the files (such as "
            f"{loaded.unset[0]}); what the heads do does not depend on them"
        )
    check_tokens(options.tokens, loaded, source.name, progress)
    windows = options.windows or (1 if texts else DEFAULT_WINDOWS)
    return see(
        loaded.model,
        texts or [default_text((options.tokens or 2048) * windows)],
        instruments=options.instruments,
        tokens=options.tokens,
        windows=windows,
        batch_size=options.batch_size,
        seed=options.seed,
        out=out,
        resume=options.resume,
        progress=progress.step,
        tokenizer=loaded.tokenizer,
        name=source.name,
        revision=options.revision,
        command=command(options),
    )


def check_output(out: Path, options: argparse.Namespace) -> "Atlas | None":
    """Refuse to write over results that nobody gave up.

    Returns the atlas where `--resume` finds that its run is finished already.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; expected a folder")
    unfinished = finished_samples(out) > 0
    found = [name for name in (ATLAS, REPORT) if (out / name).exists()]
    if options.force or (options.resume and (unfinished or not found)):
        return None
    if options.resume and ATLAS in found:
        from headwise.cli.atlases import load_atlas

        atlas = load_atlas(out)
        if atlas.provenance.get("command") == command(options):
            return atlas
        raise UserError(
            f"{out} holds finished results of another command "
            f"({atlas.provenance.get('command') or 'not a command'}); there is nothing to resume: "
            "choose another folder with --out, or replace them with --force"
        )
    if found or unfinished:
        holds = f"results ({', '.join(found)})" if found else "an unfinished run"
        resume = ", or go on with the unfinished run with --resume" if unfinished else ""
        raise UserError(
            f"{out} holds {holds}; choose another folder with --out, replace them with "
            f"--force{resume}"
        )
    return None


def check_instruments(asked: tuple[str, ...]) -> None:
    """Refuse names that no instrument has, with the nearest that one has."""
    from headwise.instruments.catalog import INSTRUMENTS

    for name in asked:
        if name not in INSTRUMENTS:
            raise UserError(closest(name, INSTRUMENTS, "instrument"))


def check_tokens(tokens: int | None, loaded: "Loaded", name: str, progress: Progress) -> None:
    """Refuse more tokens than can run; warn of more than the model is made for."""
    if tokens is None:
        return
    if loaded.positions is not None and tokens > loaded.positions:
        raise UserError(
            f"--tokens {tokens}, but {name} has positions for {loaded.positions} tokens, looked "
            f"up in a table that ends there; use --tokens {loaded.positions} or fewer"
        )
    if loaded.trained is not None and tokens > loaded.trained:
        progress.warn(f"{tokens} tokens are more than the {loaded.trained} that {name} is made for")


def default_text(tokens: int) -> tuple[str, str]:
    """Name and content of the default text, long enough for so many tokens or all there is."""
    from headwise.models.default import default_text as held_out

    characters = tokens * _CHARACTERS_PER_TOKEN
    while characters > 1000:
        try:
            text, name = held_out(characters)
        except ValueError:  # this Python has less
            characters = characters * 3 // 4
        else:
            return name, text
    raise UserError("this Python comes without its documentation; name a text with --text")


def tell(atlas: "Atlas", out: Path) -> int:
    """Write the report; print what was found, then where it is."""
    from headwise.cli.tables import kinds_found, measured_on
    from headwise.report import write

    page = write(atlas, out / REPORT)
    print(measured_on(atlas))
    print()
    print(kinds_found(atlas))
    print()
    print(f"atlas   {out / ATLAS}")
    print(f"report  {page}")
    return 0


def finished_samples(out: Path) -> int:
    """How many samples an unfinished run has left to go on with."""
    return len(list((out / PARTIAL).glob("*.safetensors")))


def command(options: argparse.Namespace) -> str:
    """The command that measures this anew, quoted for a shell."""
    words = [word for word in options.argv if word not in _NOT_OF_THE_RUN]
    return shlex.join(["headwise", *words])


def how_to_go_on(options: argparse.Namespace, out: Path) -> str:
    """What an interrupted run leaves, and the command that goes on with it."""
    done = finished_samples(out)
    if not done:
        return "interrupted before the first sample was finished; nothing was kept"
    return (
        f"interrupted; {done} finished samples are kept in {out}. Go on with:\n"
        f"  {command(options)} --resume"
    )


def _quiet_libraries(quiet: bool) -> None:
    """Bars of other libraries only where a person watches."""
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
