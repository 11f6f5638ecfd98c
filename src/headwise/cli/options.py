"""The options of the larger commands, and the types that check them before anything is loaded."""

import argparse
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")


def positive(text: str) -> int:
    """A whole number of at least one."""
    try:
        number = int(text.replace("_", "").replace(",", ""))
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"expected names separated by commas, got {text!r}")
    return found


def add_see_options(see: argparse.ArgumentParser) -> None:
    """What is measured, on what, how, and where the result goes."""
    _add_model_and_texts(see)
    see.add_argument(
        "--instruments",
        type=names,
        metavar="A,B",
        help="only these (default: all; `headwise instruments` lists them)",
    )
    see.add_argument("--out", type=Path, metavar="DIR", help="default: headwise-out/MODEL")
    existing = see.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="go on with an interrupted run in DIR"
    )
    existing.add_argument("--force", action="store_true", help="replace the results in DIR")
    see.add_argument(
        "--batch-size", type=positive, default=1, metavar="N", help="texts at once (default: 1)"
    )
    see.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the random sequences (default: 0)"
    )
    add_loading(see)


def add_swap_options(swap: argparse.ArgumentParser) -> None:
    """What is changed, on what it is measured, and where the numbers go."""
    _add_model_and_texts(swap)
    swap.add_argument(
        "--change",
        action="append",
        required=True,
        metavar="HEADS=CHANGE",
        help="such as 'L0H1,L2=window(64)', 'all=temperature(1.2)', or with --atlas "
        "\"kind == 'local'=window(128)\"; may be given several times",
    )
    swap.add_argument(
        "--atlas", type=Path, metavar="FILE", help="where conditions in --change are looked up"
    )
    swap.add_argument(
        "--repeats",
        type=positive,
        default=5,
        metavar="N",
        help="timed passes of either model, in turns (default: 5)",
    )
    swap.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    swap.add_argument("--force", action="store_true", help="replace FILE")
    add_loading(swap)


def _add_model_and_texts(command: argparse.ArgumentParser) -> None:
    add_model(command)
    command.add_argument(
        "--text",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="text files; - is the standard input (default: text from the "
        "documentation of the installed Python)",
    )
    command.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="tokens taken from each text (default: 2048, or what the model has positions for)",
    )
    command.add_argument(
        "--windows",
        type=positive,
        metavar="N",
        help="samples of --tokens taken from each text, one after the other (default: 1; 4 of the "
        "default text)",
    )


def add_model(command: argparse.ArgumentParser) -> None:
    """Which model a command takes."""
    command.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder with config.json and safetensors, a .gguf file, or a name on the Hugging "
        "Face hub (default: the small model that comes with headwise)",
    )


def add_loading(command: argparse.ArgumentParser) -> None:
    """How a model is loaded, and how much is told: of every command that takes a model."""
    command.add_argument(
        "--dtype",
        choices=(*DTYPES, "auto"),
        help="type of the weights; auto: as they are stored (default: float32 on the CPU, auto "
        "on a GPU)",
    )
    command.add_argument(
        "--device", choices=("cpu", "cuda", "auto"), default="auto", help="default: auto"
    )
    command.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all)")
    command.add_argument(
        "--gguf-file", metavar="NAME", help="which GGUF file of MODEL holds the model"
    )
    command.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    command.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model (never without this)",
    )
    command.add_argument("--quiet", action="store_true", help="no progress; only the result")


def add_explain_options(explain: argparse.ArgumentParser) -> None:
    """A shape of attention, without any weights."""
    explain.add_argument("--tokens", type=positive, required=True, metavar="N", help="keys")
    explain.add_argument("--queries", type=positive, metavar="N", help="default: as many as keys")
    explain.add_argument("--heads", type=positive, default=8, metavar="N", help="default: 8")
    explain.add_argument(
        "--kv-heads", type=positive, metavar="N", help="key-value heads (default: as many as heads)"
    )
    explain.add_argument("--head-dim", type=positive, default=64, metavar="N", help="default: 64")
    explain.add_argument("--batch", type=positive, default=1, metavar="N", help="default: 1")
    explain.add_argument(
        "--full", action="store_true", help="queries see all keys, not only earlier ones"
    )
    explain.add_argument(
        "--window", type=positive, metavar="N", help="queries see only the last N keys"
    )
    explain.add_argument(
        "--sinks", type=positive, metavar="N", help="with --window: and always the first N keys"
    )
    explain.add_argument("--softcap", type=float, metavar="X", help="scores capped at X")
    explain.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    explain.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    explain.add_argument("--backend", metavar="NAME", help="force this backend")
