"""The options of `headwise cause`."""

import argparse
from pathlib import Path

from headwise.cli.options import add_loading, add_model, names, positive

METRICS = ("loss", "accuracy", "kl")
HOW = ("zero", "mean", "resample", "uniform")
WHAT = ("heads", "layers", "attention", "mlp")
ESTIMATES = ("gradient", "integrated")


def add_cause_options(cause: argparse.ArgumentParser) -> None:
    """What is taken out, by what its effect is measured, on what, and which atlas gets it."""
    add_model(cause)
    cause.add_argument(
        "--metric", choices=METRICS, default="loss", help="what changes (default: loss)"
    )
    cause.add_argument(
        "--how",
        choices=HOW,
        default="zero",
        help="what stands in the place: nothing, the mean over the examples, another example's, or "
        "(heads) what an even map gives (default: zero)",
    )
    cause.add_argument(
        "--what",
        type=names,
        default=("heads",),
        metavar="A,B",
        help=f"what is taken out, of {', '.join(WHAT)} (default: heads)",
    )
    cause.add_argument(
        "--text",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="text files; - is the standard input (default: text from the documentation of the "
        "installed Python)",
    )
    cause.add_argument(
        "--tokens", type=positive, default=256, metavar="N", help="of an example (default: 256)"
    )
    cause.add_argument(
        "--windows",
        type=positive,
        default=8,
        metavar="N",
        help="examples taken from each text, one after the other (default: 8)",
    )
    cause.add_argument(
        "--reference", nargs="+", metavar="FILE", help="with --how mean or resample: other texts"
    )
    cause.add_argument(
        "--frozen",
        action="store_true",
        help="keep all maps as they are, so that effects go through values alone",
    )
    cause.add_argument(
        "--estimate",
        type=names,
        default=(),
        metavar="A,B",
        help=f"also estimate the effects of heads from gradients: {', '.join(ESTIMATES)}",
    )
    cause.add_argument(
        "--no-exact", action="store_true", help="with --estimate: nothing but the estimates"
    )
    cause.add_argument(
        "--atlas",
        type=Path,
        metavar="DIR",
        help="the folder whose atlas gets the columns; where there is none, the heads are seen "
        "first (default: headwise-out/MODEL)",
    )
    existing = cause.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    existing.add_argument(
        "--force", action="store_true", help="replace effects that the atlas has already"
    )
    cause.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="examples at once (default: 8)"
    )
    cause.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)"
    )
    cause.add_argument("--top", type=positive, default=10, metavar="N", help="rows (default: 10)")
    add_loading(cause)
