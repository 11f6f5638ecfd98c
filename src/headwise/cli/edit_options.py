"""The options of `headwise edit`."""

import argparse
from pathlib import Path

from headwise.cli.options import add_loading, add_model, positive

METHODS = ("rome", "pmet")
ONLY_WITH_FACT = ("method", "layer", "prefixes", "statistics", "paraphrase", "text", "out")


def add_edit_options(edit: argparse.ArgumentParser) -> None:
    """A fact to be written, patches to be applied, and what is asked."""
    add_model(edit)
    edit.add_argument("--prompt", metavar="TEXT", help="it ends where the answer begins")
    edit.add_argument("--subject", metavar="TEXT", help="the part of the prompt that it is about")
    edit.add_argument("--target", metavar="TEXT", help="the answer that shall follow")
    edit.add_argument("--method", choices=METHODS, help="how the fact is written (default: rome)")
    edit.add_argument(
        "--layer",
        type=int,
        action="append",
        metavar="N",
        help="feed-forward layer to write into, from 0; several for pmet (default: found by "
        "causal tracing)",
    )
    edit.add_argument(
        "--prefixes",
        type=int,
        metavar="N",
        help="texts that the model writes before the prompt, to average over (default: 5)",
    )
    edit.add_argument(
        "--text",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="what the model shall go on to read as before: four fifths for the statistics of "
        "keys, the rest for its loss (default: text from the documentation of the installed "
        "Python)",
    )
    edit.add_argument(
        "--tokens",
        type=positive,
        default=20_000,
        metavar="N",
        help="at most so many tokens of the text (default: 20000)",
    )
    edit.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="statistics of keys: read if the file is there, else written (with --layer)",
    )
    edit.add_argument(
        "--paraphrase",
        action="append",
        default=[],
        metavar="TEXT",
        help="another prompt that the target should follow; may be given several times",
    )
    edit.add_argument(
        "--neighbour",
        action="append",
        default=[],
        metavar="TEXT",
        help="a prompt whose answer should stay; may be given several times",
    )
    edit.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    edit.add_argument("--out", type=Path, metavar="FILE", help="write the patch to FILE")
    edit.add_argument("--force", action="store_true", help="replace FILE")
    edit.add_argument(
        "--apply",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a patch to put in force first; several in their order",
    )
    edit.add_argument(
        "--ask",
        action="append",
        default=[],
        metavar="TEXT",
        help="go on from this text, without and with the patches; may be given several times",
    )
    edit.add_argument(
        "--new-tokens", type=positive, default=12, metavar="N", help="of an answer (default: 12)"
    )
    add_loading(edit)
