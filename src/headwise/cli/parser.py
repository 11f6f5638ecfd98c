"""The commands and their options. Only argparse is imported: `headwise --help` must be quick."""

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from headwise import __version__
from headwise.cli.cause_options import add_cause_options
from headwise.cli.edit_options import add_edit_options
from headwise.cli.options import (
    add_explain_options,
    add_see_options,
    add_swap_options,
    names,
    positive,
)
from headwise.cli.papers_options import add_papers_commands
from headwise.cli.patch_options import add_patch_options
from headwise.cli.shrink_options import add_generate_options, add_shrink_options
from headwise.cli.train_options import add_train_options


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.prog}: error: {message} ({self.prog} --help lists the options)\n")
        raise SystemExit(2)


def build_parser() -> Parser:
    """The parser of the whole command line; `options.run` names the function of the command."""
    parser = Parser(
        prog="headwise",
        description="Make transformer attention legible, head by head.",
        epilog="`headwise see` without arguments measures the small model that comes with the "
        "package. `headwise COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"headwise {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    see = _command(
        commands,
        "see",
        "headwise.cli.see:run",
        "measure every head of a model on a text; writes an atlas and a report",
    )
    add_see_options(see)

    cause = _command(
        commands,
        "cause",
        "headwise.cli.cause:run",
        "take every head out, one at a time, and write what that does into an atlas",
    )
    add_cause_options(cause)

    swap = _command(
        commands,
        "swap",
        "headwise.cli.swap:run",
        "change what heads compute, and measure what happens to loss, next tokens and speed",
    )
    add_swap_options(swap)

    edit = _command(
        commands,
        "edit",
        "headwise.cli.edit:run",
        "write a fact into a model's weights as a patch file, or apply such patches and ask",
    )
    add_edit_options(edit)

    patch = _command(
        commands,
        "patch",
        "headwise.cli.patch:run",
        "put what one prompt's run computed into another's, and see what brings the answer along",
    )
    add_patch_options(patch)

    shrink = _command(
        commands,
        "shrink",
        "headwise.cli.shrink:run",
        "make a model smaller within a budget; leaves the model, the measured curve and a report",
    )
    add_shrink_options(shrink)

    generate = _command(
        commands,
        "generate",
        "headwise.cli.generate:run",
        "go on from a prompt with a model that was made smaller",
    )
    add_generate_options(generate)

    train = _command(
        commands,
        "train",
        "headwise.cli.train:run",
        "train a model out of parts on a task; goes on wherever it was interrupted",
    )
    add_train_options(train)

    compare = _command(
        commands,
        "compare",
        "headwise.cli.atlases:compare",
        "what changed between two atlases, by head",
    )
    compare.add_argument("first", metavar="A", type=Path, help="atlas file, or folder of a run")
    compare.add_argument("second", metavar="B", type=Path, help="the other one")
    compare.add_argument(
        "--rows", type=positive, default=20, metavar="N", help="largest changes (default: 20)"
    )
    compare.add_argument("--html", type=Path, metavar="FILE", help="write it as a page")
    compare.add_argument("--json", action="store_true", help="print it as JSON")

    report = _command(
        commands, "report", "headwise.cli.atlases:report", "write the HTML report of an atlas"
    )
    report.add_argument("atlas", metavar="ATLAS", type=Path, help="atlas file, or folder of a run")
    report.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (default: report.html beside the atlas)"
    )

    show = _command(
        commands, "show", "headwise.cli.atlases:show", "print the table of an atlas, a line a head"
    )
    show.add_argument("atlas", metavar="ATLAS", type=Path, help="atlas file, or folder of a run")
    show.add_argument("--sort", metavar="COLUMN", help="order by this column, largest first")
    show.add_argument("--ascending", action="store_true", help="with --sort: smallest first")
    show.add_argument("--kind", metavar="KIND", help="only heads of this kind")
    show.add_argument(
        "--columns", type=names, metavar="A,B", help="these columns (default: a choice)"
    )
    show.add_argument("--rows", type=positive, metavar="N", help="at most so many heads")
    show.add_argument("--layers", action="store_true", help="the table of layers instead of heads")
    form = show.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="all columns as JSON, a list of heads")
    form.add_argument("--csv", action="store_true", help="all columns as CSV")

    explain = _command(
        commands,
        "explain",
        "headwise.cli.reference:explain",
        "which kernel an attention of this shape is computed with, why, and what it costs",
    )
    add_explain_options(explain)

    papers = commands.add_parser(
        "papers",
        help="the catalog of papers: list, show, check, new",
        description="The catalog of papers, whose claims are run beside controls.",
    )
    add_papers_commands(papers, _command)

    _command(
        commands,
        "kinds",
        "headwise.cli.reference:kinds",
        "the kinds of heads and the thresholds that decide them",
    )
    instruments = _command(
        commands,
        "instruments",
        "headwise.cli.reference:instruments",
        "the instruments, their columns, units and sources",
    )
    instruments.add_argument("--json", action="store_true", help="print them as JSON")
    return parser


def _command(commands: Any, name: str, run: str, summary: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + "."
    )
    command.set_defaults(run=run)
    command.add_argument("--debug", action="store_true", help="show a traceback on errors")
    return command
