"""`headwise swap`: change heads of a model, and print what happens to loss, agreement and speed."""

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.cli.errors import UserError
from headwise.cli.progress import Progress
from headwise.cli.sources import model_source, read_texts

if TYPE_CHECKING:
    from headwise.edits import Effect
    from headwise.edits.effects import Figure

_DEFAULT_WINDOWS = 4  # of the default text; of a user's own text, one
# an = that no comparison has: not in ==, !=, <=, >=
_ASSIGNS = re.compile(r"(?<![=!<>])=(?!=)")
_CONDITION = re.compile(r"[<>=!]|\bin\b")


def run(options: argparse.Namespace) -> int:
    """Measure both models in turns; print a table, write the numbers where asked."""
    source = model_source(options.model, options.gguf_file)
    texts = read_texts(options.text) if options.text else None
    out = _checked_out(options)
    asked = [split(text) for text in options.change]
    from headwise.edits.notation import read_changes

    changes = [(_heads(heads, options), read_changes(change)) for heads, change in asked]
    with Progress(quiet=options.quiet) as progress:
        found, sources, tokens = _measure(options, source, texts, changes, progress)
    report = {
        "model": source.name,
        "texts": [one.entry for one in sources],
        "window_tokens": tokens,
        "threads": options.threads,
        "command": _command(options),
        **found.as_dict(),
    }
    print(told(source.name, found))
    if out is not None:
        from headwise.instruments.atomic import write_atomically

        write_atomically(out, (json.dumps(report, indent=2) + "\n").encode())
        print(f"\nnumbers  {out}")
    return 0


def split(text: str) -> tuple[str, str]:
    """`HEADS=CHANGE` at the first = outside of parentheses and quotes that is no comparison."""
    depth, quote = 0, ""
    places = {match.start() for match in _ASSIGNS.finditer(text)}
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "()":
            depth += 1 if letter == "(" else -1
        elif at in places and depth == 0:
            heads, change = text[:at].strip(), text[at + 1 :].strip()
            if heads and change:
                return heads, change
            break
    raise UserError(
        f"--change {text!r} is no HEADS=CHANGE; expected e.g. --change 'L0H1,L2=window(64)'"
    )


def _heads(text: str, options: argparse.Namespace) -> Any:
    """A name of heads as it stands, or the heads that meet a condition in the atlas."""
    if not _CONDITION.search(text):
        return text
    if options.atlas is None:
        raise UserError(
            f"--change {text!r} is a condition on measured columns; name the atlas with --atlas "
            "FILE (`headwise see` writes one)"
        )
    from headwise.cli.atlases import load_atlas

    atlas = load_atlas(options.atlas)
    found = atlas.where(text)
    if not found:
        raise UserError(f"no head of {options.atlas} meets {text!r}")
    return found


def _measure(
    options: argparse.Namespace,
    source: Any,
    texts: list[tuple[str, str]] | None,
    changes: list[tuple[Any, Any]],
    progress: Progress,
) -> tuple["Effect", list[Any], int]:
    """(what the changes do, the texts as they were read, tokens of the longest window)"""
    from headwise.cli.loading import load_as_told
    from headwise.cli.see import check_tokens, default_text

    loaded = load_as_told(source, options, progress)

    # After the load, which tells what it does before it imports torch.
    from headwise.edits import effect, swap
    from headwise.instruments.inputs import read_inputs
    from headwise.instruments.tokens import Tokens

    check_tokens(options.tokens, loaded, source.name, progress)
    changed = swap(loaded.model, changes)
    windows = options.windows or (1 if texts else _DEFAULT_WINDOWS)
    given = texts or [default_text((options.tokens or 2048) * windows)]
    words = Tokens(loaded.tokenizer, loaded.model.config)
    sources = read_inputs(loaded.model, given, words, None, options.tokens, windows)
    ids = [sample.inputs["input_ids"][0] for one in sources for sample in one.samples]
    ids.sort(key=len, reverse=True)  # what is timed is the longest
    found = effect(changed.view, changed, ids, options.repeats, progress.step)
    return found, sources, len(ids[0])


def told(name: str, found: "Effect") -> str:
    """What was changed, and the table."""
    from headwise.cli.tables import table

    windows = f"{found.windows} window{'s' * (found.windows != 1)}"
    head = f"{name}: {found.tokens:,} tokens in {windows}"
    changed = [f"changed  {_short(entry['heads'])}: {entry['change']}" for entry in found.record]
    a, b = found.seconds_before, found.seconds_after
    rows: list[Sequence[str]] = [
        (
            "loss (nats per token)",
            f"{found.loss_before.mean:.4f}",
            f"{found.loss_after.mean:.4f}",
            _figure(found.loss_change, "+.4f"),
        ),
        ("next token the same", "", "", _figure(found.agreement, ".4f")),
        ("KL(original || changed) (nats)", "", "", _figure(found.divergence, ".4f")),
        ("forward pass (ms)", f"{1e3 * a:.1f}", f"{1e3 * b:.1f}", f"{found.speed:.2f} x as fast"),
    ]
    note = "+/-: standard error over windows" if found.windows > 1 else ""
    text = table(("", "original", "changed", "difference"), rows)
    return "\n".join([head, *changed, "", text, *([note] if note else [])])


def _figure(value: "Figure", form: str) -> str:
    if math.isnan(value.error):
        return f"{value.mean:{form}}"
    return f"{value.mean:{form}} +/- {value.error:{form.lstrip('+')}}"


def _short(heads: list[str], most: int = 12) -> str:
    more = f" and {len(heads) - most} more" if len(heads) > most else ""
    return ", ".join(heads[:most]) + more


def _checked_out(options: argparse.Namespace) -> Path | None:
    if options.out is None:
        return None
    out: Path = options.out.expanduser()
    if out.is_dir():
        raise UserError(f"--out {options.out} is a folder; expected a file for the numbers")
    if out.exists() and not options.force:
        raise UserError(f"{options.out} is there already; choose another file, or --force")
    return out


def _command(options: argparse.Namespace) -> str:
    from headwise.instruments.provenance import command_line

    return command_line(options.argv)
