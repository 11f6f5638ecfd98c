"""The options of `headwise shrink` and `headwise generate`."""

import argparse
from pathlib import Path

from headwise.cli.options import add_loading, add_model, names, positive

_KINDS = ("heads", "channels", "attention", "mlp", "layers")


def add_shrink_options(shrink: argparse.ArgumentParser) -> None:
    """The budget, what may go, on what it is measured, and where the result goes."""
    add_model(shrink)
    shrink.add_argument(
        "--keep",
        required=True,
        action="append",
        metavar="WHAT=SHARE",
        help="params=0.7, time=0.6 (of a forward pass) or kv=0.25 (bytes of the key-value cache): "
        "the share of the original that may be left",
    )
    shrink.add_argument(
        "--quality",
        metavar="BOUND",
        help="such as 'loss<=+0.05' (a rise in nats), 'agreement>=0.9' or 'kl<=0.1'; the search "
        "ends where a step would break it",
    )
    shrink.add_argument(
        "--kinds",
        type=names,
        default=_KINDS,
        metavar="A,B",
        help=f"what may go, of {', '.join(_KINDS)} (default: all)",
    )
    shrink.add_argument(
        "--rounds",
        type=positive,
        default=12,
        metavar="N",
        help="in how many steps, with new prices each (default: 12)",
    )
    shrink.add_argument(
        "--no-recover",
        action="store_true",
        help="do not fit the weights that stay to the original's outputs",
    )
    shrink.add_argument(
        "--distil",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="then train on the original's answers for so long (default: 0)",
    )
    shrink.add_argument(
        "--text",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="text files; - is the standard input (default: text from the documentation of the "
        "installed Python); half of the windows are held out to judge by",
    )
    shrink.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="of a window (default: 256; 1,024 for kv, of which half is the prompt)",
    )
    shrink.add_argument(
        "--windows",
        type=positive,
        metavar="N",
        help="windows taken from each text (default: 16; 8 for kv)",
    )
    shrink.add_argument(
        "--repeats",
        type=positive,
        default=7,
        metavar="N",
        help="timed passes of either model, in turns (default: 7)",
    )
    shrink.add_argument("--out", type=Path, metavar="DIR", help="default: headwise-out/MODEL-small")
    shrink.add_argument(
        "--resume", action="store_true", help="go on with an interrupted search in DIR"
    )
    shrink.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    add_loading(shrink)


def add_generate_options(generate: argparse.ArgumentParser) -> None:
    """A folder, a prompt, how much and how."""
    generate.add_argument(
        "folder",
        metavar="DIR",
        type=Path,
        help="what `headwise shrink` or headwise.save left, or any model folder",
    )
    generate.add_argument(
        "--prompt",
        metavar="TEXT",
        default=None,
        help="what to go on from (default: standard input)",
    )
    generate.add_argument(
        "--tokens", type=positive, default=100, metavar="N", help="at most so many (default: 100)"
    )
    generate.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token each time (default: 0)",
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    add_loading(generate)
