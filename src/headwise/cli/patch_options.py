"""The options of `headwise patch`."""

import argparse
from pathlib import Path

from headwise.cli.options import add_loading, add_model, positive

SITES = ("residual", "attention", "mlp", "neurons", "heads", "queries", "keys", "values")


def add_patch_options(patch: argparse.ArgumentParser) -> None:
    """Two prompts or a file of pairs, the answers, and what is patched."""
    add_model(patch)
    patch.add_argument("--clean", metavar="TEXT", help="a prompt that ends where the answer begins")
    patch.add_argument(
        "--corrupted", metavar="TEXT", help="the same with another answer, of as many tokens"
    )
    patch.add_argument(
        "--answer",
        metavar="TEXT",
        help="what follows the clean prompt, with the space before it, such as ' Mary'; its first "
        "token counts",
    )
    patch.add_argument("--wrong", metavar="TEXT", help="what follows the corrupted one")
    patch.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="many pairs: JSON lines, each with clean, corrupted, answer and wrong",
    )
    patch.add_argument(
        "--site", choices=SITES, default="residual", help="what is patched (default: residual)"
    )
    patch.add_argument(
        "--positions",
        choices=("all", "together", "end"),
        help="each position on its own, all at once, or the last alone (default: all; of heads, "
        "queries, keys and values together)",
    )
    patch.add_argument(
        "--direction",
        choices=("denoise", "noise"),
        default="denoise",
        help="clean values into the corrupted run, or the other way (default: denoise)",
    )
    patch.add_argument(
        "--method",
        choices=("exact", "gradient", "integrated"),
        default="exact",
        help="run the model for each place, or estimate from gradients (default: exact)",
    )
    patch.add_argument(
        "--circuit",
        type=float,
        metavar="SHARE",
        help="also find the circuit: the paths that carry at least this share of the answer, such "
        "as 0.1 (much longer than a table)",
    )
    patch.add_argument("--top", type=positive, default=10, metavar="N", help="rows (default: 10)")
    patch.add_argument("--out", type=Path, metavar="DIR", help="write patch.json and pictures")
    patch.add_argument("--force", action="store_true", help="replace files in DIR")
    add_loading(patch)
