"""`headwise shrink`: from a budget to a smaller model, its curve and a page about it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.cli.errors import UserError
from headwise.cli.progress import Progress
from headwise.cli.see import default_text
from headwise.cli.sources import ModelSource, model_source, output_folder, read_texts
from headwise.compress.search.targets import Keep, Limit

if TYPE_CHECKING:
    from headwise.compress.search.curve import Curve

REPORT = "report.html"


def run(options: argparse.Namespace) -> int:
    """Search, print the curve, leave the model and the page; 1 where the budget was not met."""
    target = Keep.read(options.keep)  # refused, if it has to be, before anything is loaded
    usual = (1024, 8) if target.what == "kv" else (256, 16)
    tokens, windows = options.tokens or usual[0], options.windows or usual[1]
    if options.quality is not None:
        Limit.read(options.quality)
    source = model_source(options.model, options.gguf_file)
    texts = read_texts(options.text) if options.text else None
    out = _folder(options, source)
    with Progress(quiet=options.quiet) as progress:
        from headwise.cli.loading import load_to_answer

        loaded = load_to_answer(source, options, progress)
        # After the load, which tells what it does before it imports torch.
        from headwise.compress.search.searching import shrink
        from headwise.instruments.provenance import command_line
        from headwise.report.shrink_page import write_shrink

        if texts is None:
            texts = [default_text(tokens * windows)]
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
                seed=options.seed,
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        write_shrink(curve, out / REPORT, source.name, command_line(options.argv))
    print(told(source.name, curve, out))
    return 0 if curve.met else 1


def told(name: str, curve: "Curve", out: Path) -> str:
    """The curve as a table, what came out, and where it is."""
    from headwise.cli.tables import table
    from headwise.report.shrink_page import sentence

    lines = [f"{name}: {sentence(curve)}", "", table(*curve.table()), ""]
    lines += [f"model, curve.json and {REPORT} in {out}", f"try it: headwise generate {out}"]
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
