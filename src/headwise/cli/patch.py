"""`headwise patch`: what of one prompt's run, put into another's, brings its answer along."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.cli.errors import UserError
from headwise.cli.progress import Progress
from headwise.cli.sources import model_source

if TYPE_CHECKING:
    from headwise.instruments.circuit import Circuit
    from headwise.instruments.patch_table import PatchTable

FIELDS = ("clean", "corrupted", "answer", "wrong")
FILES = ("patch.json", "patch.svg", "circuit.svg")


def run(options: argparse.Namespace) -> int:
    """Measure, print the strongest places, leave the numbers and pictures."""
    source = model_source(options.model, options.gguf_file)
    prompts = read_prompts(options)
    out = _checked_out(options)
    if options.circuit is not None and not options.circuit > 0:
        raise UserError(f"--circuit {options.circuit}: expected a share above 0, such as 0.1")
    with Progress(quiet=options.quiet) as progress:
        from headwise.cli.loading import load_to_answer

        loaded = load_to_answer(source, options, progress)
        table, circuit, labels = _measure(options, loaded, prompts, progress)
    print(told(source.name, table, options.top))
    if circuit is not None:
        print("\n" + told_circuit(circuit))
    if out is not None:
        _write(options, out, source.name, table, circuit, labels, prompts)
    return 0


def read_prompts(options: argparse.Namespace) -> list[dict[str, str]]:
    """The pairs of prompts, from the options or from a file; each with every field.

    Raises UserError, which names the line.
    """
    given = {name: getattr(options, name) for name in FIELDS}
    if options.prompts is None:
        missing = [f"--{name}" for name in FIELDS if given[name] is None]
        if missing:
            raise UserError(f"{', '.join(missing)} missing; or give many pairs with --prompts FILE")
        return [given]
    if any(value is not None for value in given.values()):
        raise UserError("--prompts FILE holds the prompts: give it, or --clean and the others")
    try:
        lines = options.prompts.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {options.prompts}: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{options.prompts}, line {number}: no JSON ({error.msg})") from None
        known = isinstance(one, dict) and all(isinstance(one.get(name), str) for name in FIELDS)
        if not known:
            raise UserError(
                f"{options.prompts}, line {number}: expected an object with the texts "
                f"{', '.join(FIELDS)}"
            )
        found.append({name: one[name] for name in FIELDS})
    if not found:
        raise UserError(f"{options.prompts} holds no prompts")
    return found


def _measure(
    options: argparse.Namespace, loaded: Any, prompts: list[dict[str, str]], progress: Progress
) -> tuple["PatchTable", "Circuit | None", list[str] | None]:
    import torch

    from headwise.instruments.circuit import find_circuit
    from headwise.instruments.metrics import LogitDifference
    from headwise.instruments.patching import patch

    words = loaded.tokenizer
    ids = {name: [words(one[name])["input_ids"] for one in prompts] for name in FIELDS[:2]}
    for number, (a, b) in enumerate(zip(*ids.values(), strict=True), 1):
        if len(a) != len(b):
            raise UserError(
                f"pair {number}: {len(a)} clean and {len(b)} corrupted tokens; choose words of as "
                f"many tokens: {words.convert_ids_to_tokens(a)} and "
                f"{words.convert_ids_to_tokens(b)}"
            )
    right, wrong = (
        torch.tensor([_token(words, one[name], f"pair {n}: {name}")
                      for n, one in enumerate(prompts, 1)]) for name in FIELDS[2:]
    )  # fmt: skip
    metric = LogitDifference(right, wrong)
    clean, corrupted = ([torch.tensor([one]) for one in ids[name]] for name in FIELDS[:2])
    positions = {"end": -1} if options.positions == "end" else options.positions
    progress.note(f"patching the {options.site}")
    table = patch(
        loaded.model, clean, corrupted, metric, options.site, positions,
        direction=options.direction, method=options.method,
    )  # fmt: skip
    circuit = None
    if options.circuit is not None:
        circuit = find_circuit(
            loaded.model, clean, corrupted, metric, options.circuit,
            step=lambda name: progress.note(f"paths to {name}"),
        )  # fmt: skip
    labels = None
    if list(table.axes) == ["layer", "position"] and positions in (None, "all"):
        shown = zip(
            *(words.batch_decode([[i] for i in ids[n][0]]) for n in FIELDS[:2]), strict=True
        )
        labels = [a if a == b else f"{a}|{b.strip()}" for a, b in shown]
        if len(prompts) > 1:
            labels = [str(at) for at in range(len(labels))]
    return table, circuit, labels


def _token(words: Any, text: str, what: str) -> int:
    """The first token of an answer, as it would stand behind the prompt."""
    ids: list[int] = words(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"{what} {text!r} has no tokens")
    return ids[0]


def told(name: str, table: "PatchTable", rows: int) -> str:
    """The runs, and the places whose patch does most."""
    from headwise.cli.tables import table as drawn

    count = len(table.clean)
    head = [
        f"{name}: {count} pair{'s' * (count != 1)} of prompts, {table.metric} "
        f"{table.clean.mean():.3f} clean, {table.corrupted.mean():.3f} corrupted",
        {"denoise": "clean values into the corrupted run", "noise": "corrupted values into the "
         "clean run"}[table.direction] + f", {table.site}, {table.method}; 1 is the clean answer, "
        "0 the corrupted one",
    ]  # fmt: skip
    if table.gap <= 0:
        head.append("careful: the clean prompts do not favour the answer more than the corrupted")
    body = [
        (*(one[axis] for axis in table.axes), one["value"], one["error"], one["normalised"])
        for one in table.top(rows)
    ]
    names = (*table.axes, table.metric, "+/-", "share")
    return "\n".join([*head, "", drawn(names, body)])


def told_circuit(circuit: "Circuit") -> str:
    """The paths of a circuit, strongest first."""
    from headwise.cli.tables import table

    rows = [(str(e.sender), str(e.receiver), e.weight, e.error) for e in circuit.edges]
    head = f"circuit: {len(circuit.nodes)} components, {len(rows)} paths"
    return "\n".join([head, "", table(("from", "to", "share", "+/-"), rows)])


def _write(
    options: argparse.Namespace,
    out: Path,
    name: str,
    table: "PatchTable",
    circuit: "Circuit | None",
    labels: list[str] | None,
    prompts: list[dict[str, str]],
) -> None:
    from headwise.instruments.atomic import write_atomically
    from headwise.instruments.provenance import command_line
    from headwise.report.circuit_picture import circuit_picture
    from headwise.report.patch_picture import patch_picture

    numbers: dict[str, Any] = {"command": command_line(options.argv), "prompts": prompts}
    numbers |= table.record()
    files = {}
    if table.gap:
        files["patch.svg"] = patch_picture(table, f"{name}: patching the {table.site}", labels)
    if circuit is not None:
        numbers["circuit"] = circuit.record()
        if circuit.edges:
            files["circuit.svg"] = circuit_picture(circuit, f"{name}: circuit")
    files["patch.json"] = json.dumps(numbers, indent=1) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        write_atomically(out / file, content.encode())
    print(f"\n{', '.join(sorted(files))} in {out}")


def _checked_out(options: argparse.Namespace) -> Path | None:
    if options.out is None:
        return None
    out: Path = options.out.expanduser()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {options.out} is a file; expected a folder")
    there = [name for name in FILES if (out / name).exists()]
    if there and not options.force:
        raise UserError(f"{out / there[0]} is there already; choose another folder, or --force")
    return out
