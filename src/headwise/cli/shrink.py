"""`headwise shrink`: from a budget to a smaller model, its curve and a page about it."""

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.cli.errors import Interrupted, UserError
from headwise.cli.progress import Progress
from headwise.cli.see import check_tokens, default_text
from headwise.cli.sources import ModelSource, model_source, output_folder, read_texts
from headwise.compress.search.targets import Keep, Limit

if TYPE_CHECKING:
    from headwise.compress.search.curve import Curve

REPORT = "report.html"


def run(options: argparse.Namespace) -> int:
    """Search, print the curve, leave the model and the page; 1 where the budget was not met."""
    if len(options.keep) > 1:
        raise UserError(
            f"{len(options.keep)} budgets were given ({', '.join(options.keep)}); expected one "
            "--keep: shrink the result again for the next"
        )
    target = Keep.read(options.keep[0])  # refused, if it has to be, before anything is loaded
    if options.quality is not None:
        Limit.read(options.quality)
    source = model_source(options.model, options.gguf_file)
    texts = read_texts(options.text) if options.text else None
    out = _folder(options, source)
    try:
        with Progress(quiet=options.quiet) as progress:
            curve = _searched(options, source, texts, target, out, progress)
    except KeyboardInterrupt:
        raise Interrupted(_how_to_go_on(options, out)) from None
    print(told(source.name, curve, out))
    return 0 if curve.met else 1


def _searched(
    options: argparse.Namespace,
    source: ModelSource,
    texts: list[tuple[str, str]] | None,
    target: Keep,
    out: Path,
    progress: Progress,
) -> "Curve":
    """The curve; model, curve and page are in the folder when this returns."""
    from headwise.cli.loading import load_to_answer

    loaded = load_to_answer(source, options, progress)
    check_tokens(options.tokens, loaded, source.name, progress)
    usual = (1024, 8) if target.what == "kv" else (256, 16)
    most = min(usual[0], loaded.positions or usual[0])
    tokens, windows = options.tokens or most, options.windows or usual[1]
    # After the load, which tells what it does before it imports torch.
    from headwise.compress.search.searching import shrink
    from headwise.instruments.provenance import command_line
    from headwise.report.shrink_page import write_shrink

    if texts is None:
        texts = [default_text(tokens * windows)]
    new = _made(out)
    try:
        curve = shrink(
            loaded.model,
            target,
            [text for _, text in texts],
            quality=options.quality,
            kinds=options.kinds,
            rounds=options.rounds,
            recover=not options.no_recover,
            distil=options.distil,
            tokens=tokens,
            windows=windows,
            repeats=options.repeats,
            tokenizer=loaded.tokenizer,
            out=out,
            resume=options.resume,
            tell=progress.note,
            step=progress.step,
            seed=options.seed,
        )
    except ValueError as error:
        if new and not any(out.iterdir()):
            out.rmdir()
        raise UserError(str(error)) from error
    write_shrink(curve, out / REPORT, source.name, command_line(options.argv))
    return curve


def _made(out: Path) -> bool:
    """Whether the folder is new. Refused before hours are spent where nothing can be written."""
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to {out} ({error.strerror}); choose another folder with --out"
        ) from error
    return new


def _how_to_go_on(options: argparse.Namespace, out: Path) -> str:
    """What an interrupted search leaves, and the command that goes on with it."""
    from headwise.instruments.provenance import command_line

    if not (out / "curve.json").exists():
        return "interrupted before anything was measured; nothing was kept"
    words = [word for word in options.argv if word not in ("--resume", "--debug")]
    return (
        f"interrupted; what was measured before is kept in {out}. Go on with:\n"
        f"  {command_line(words)} --resume"
    )


def told(name: str, curve: "Curve", out: Path) -> str:
    """The curve as a table, what came out, and where it is."""
    from headwise.cli.tables import table
    from headwise.report.shrink_page import sentence

    lines = [f"{name}: {sentence(curve)}", "", table(*curve.table()), ""]
    lines += [f"model, curve.json and {REPORT} in {out}"]
    if curve.model is not None and getattr(curve.model, "can_generate", lambda: False)():
        lines += [f"try it: headwise generate {out}"]
    return "\n".join(lines)


def _folder(options: argparse.Namespace, source: ModelSource) -> Path:
    if options.out is not None:
        out: Path = options.out.expanduser()
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {options.out} is a file; expected a folder")
    else:
        usual = output_folder(None, source)
        out = usual.with_name(f"{usual.name}-small")
    if (out / "curve.json").exists() and not options.resume:
        raise UserError(
            f"{out / 'curve.json'} is there already; go on with --resume, or choose another folder"
        )
    return out
