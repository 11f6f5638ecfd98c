"""`headwise cause`: take every head out, and write what that does into an atlas and its report."""

import argparse
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.cli.cause_options import ESTIMATES, WHAT
from headwise.cli.errors import Interrupted, UserError, one_line
from headwise.cli.progress import Progress
from headwise.cli.see import ATLAS, PARTIAL, REPORT, check_tokens, default_text
from headwise.cli.sources import ModelSource, closest, model_source, output_folder, read_texts

if TYPE_CHECKING:
    from headwise.cli.loading import Loaded
    from headwise.instruments import Atlas

# Where finished batches are kept until the atlas has the columns.
FOLDER = "cause"
_NOT_OF_THE_RUN = {"--resume", "--force", "--quiet", "--debug"}
_COLUMNS = ("effect", "effect_gradient", "effect_integrated")

Texts = list[tuple[str, str]]


def run(options: argparse.Namespace) -> int:
    """Measure, rewrite atlas and report, print the largest effects and the disagreements."""
    source = model_source(options.model, options.gguf_file)
    texts = read_texts(options.text) if options.text else None
    reference = read_texts(options.reference) if options.reference else None
    _check(options)
    out = output_folder(options.atlas, source)
    atlas = _known(out, options)
    try:
        with Progress(quiet=options.quiet) as progress:
            found = _measure(options, source, texts, reference, out, atlas, progress)
    except KeyboardInterrupt:
        raise Interrupted(_how_to_go_on(options, out)) from None
    print(told(found, options.top))
    print(f"\natlas   {out / ATLAS}\nreport  {out / REPORT}")
    return 0


def _check(options: argparse.Namespace) -> None:
    for name in options.what:
        if name not in WHAT:
            raise UserError(closest(name, WHAT, "part"))
    for name in options.estimate:
        if name not in ESTIMATES:
            raise UserError(closest(name, ESTIMATES, "estimate"))
    if options.reference and options.how not in ("mean", "resample"):
        raise UserError("--reference goes with --how mean or --how resample")
    if options.no_exact and not options.estimate:
        raise UserError("--no-exact leaves nothing to measure; name an --estimate")


def _known(out: Path, options: argparse.Namespace) -> "Atlas | None":
    """The atlas in the folder, if there is one. Refuses to write over effects."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--atlas {out} is a file; expected a folder")
    unfinished = _finished(out / FOLDER) > 0
    if unfinished and not (options.resume or options.force):
        raise UserError(
            f"{out} holds an unfinished run of `headwise cause`; go on with it with --resume, or "
            "begin anew with --force"
        )
    if not (out / ATLAS).exists():
        return None
    from headwise.cli.atlases import load_atlas

    atlas = load_atlas(out)
    has = [name for name in _COLUMNS if name in atlas.heads]
    if has and not options.force and not unfinished:
        cause = atlas.provenance.get("cause") or {}
        raise UserError(
            f"the atlas in {out} has effects already ({cause.get('metric')}, {cause.get('how')}); "
            "replace them with --force, or choose another folder with --atlas"
        )
    return atlas


def _measure(
    options: argparse.Namespace,
    source: ModelSource,
    texts: Texts | None,
    reference: Texts | None,
    out: Path,
    atlas: "Atlas | None",
    progress: Progress,
) -> "Atlas":
    """The atlas with the effects; atlas and report are in the folder when this returns."""
    from headwise.cli.loading import load_to_answer

    loaded = load_to_answer(source, options, progress)

    # After the load, which tells what it does before it imports torch.
    from headwise.instruments import ablation
    from headwise.instruments.cause_tables import beside
    from headwise.report import write

    tokens = min(options.tokens, loaded.positions or options.tokens)
    if texts is None:
        check_tokens(tokens, loaded, source.name, progress)
        texts = [default_text(tokens * options.windows)]
    if atlas is None:
        with Progress(quiet=options.quiet) as first:  # its own pace
            atlas = _seen(options, source, loaded, texts, out, first)
    progress.note(f"taking out {' and '.join(options.what)}, {options.how}: {options.metric}")
    try:
        causes = ablation(
            loaded.model,
            texts,
            options.metric,
            options.how,
            options.what,
            reference=reference,
            frozen=options.frozen,
            estimate=options.estimate,
            exact=not options.no_exact,
            batch_size=options.batch_size,
            tokens=tokens,
            windows=options.windows,
            seed=options.seed,
            tokenizer=loaded.tokenizer,
            out=out / FOLDER,
            resume=options.resume,
            progress=progress,
            name=source.name,
            revision=options.revision,
            command=_command(options),
        )
        both = beside(atlas, causes)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    both.save(out / ATLAS)
    write(both, out / REPORT)
    if (out / FOLDER).is_dir() and not any((out / FOLDER).iterdir()):
        (out / FOLDER).rmdir()
    return both


def _seen(
    options: argparse.Namespace,
    source: ModelSource,
    loaded: "Loaded",
    texts: Texts,
    out: Path,
    progress: Progress,
) -> "Atlas":
    """What the heads do on the same texts, measured before anything is taken out."""
    from headwise.instruments import see

    progress.note(f"no atlas in {out} yet: seeing the heads first")
    return see(
        loaded.model,
        texts,
        seed=options.seed,
        out=out,
        resume=options.resume and _finished(out) > 0,
        progress=progress,
        tokenizer=loaded.tokenizer,
        name=source.name,
        revision=options.revision,
        command=_command(options),
    )


def told(atlas: "Atlas", rows: int) -> str:
    """What was measured, the heads and layers with the largest effects, and where they surprise."""
    from headwise.cli.tables import table
    from headwise.instruments.disagreement import disagreement

    cause = atlas.provenance["cause"]
    error = cause.get("unchanged_se")
    more = "" if error is None else f" ± {error:.2g}"
    lines = [
        f"{atlas.provenance.get('model')}: {cause['metric']} {cause['unchanged']:.4g}{more} on "
        f"{cause['examples']} examples; taken out: {cause['how']}"
        + (", maps frozen" if cause.get("frozen") else "")
    ]
    first = next(name for name in (*_COLUMNS, "") if name in atlas.heads or not name)
    if first:
        size = [abs(float(value)) for value in atlas.heads[first]]
        best = sorted(
            range(len(atlas)), key=lambda row: -size[row] if size[row] == size[row] else 0
        )
        shown = [name for name in ("kind", *_COLUMNS) if name in atlas.heads]
        records = [[atlas.name(r), *(_cell(atlas, n, r) for n in shown)] for r in best[:rows]]
        lines += ["", table(["head", *shown], records)]
    effects = [n for n in atlas.layers if n.endswith("_effect")]
    if effects:
        layers = atlas.layers
        records = [
            [int(layers["layer"][row]), *(_signed(layers[name][row]) for name in effects)]
            for row in range(len(layers["layer"]))
        ]
        lines += ["", table(["layer", *effects], records)]
    for name, value in (cause.get("rank_correlation") or {}).items():
        said = "not known" if value is None else f"{value:.2f}"
        lines += ["", f"rank correlation of the {name} estimate with the exact effect: {said}"]
    if "effect" in atlas.heads:
        between = disagreement(atlas)
        if between is not None and not math.isnan(between.correlation):
            name = between.column.replace("_", " ")
            lines += [
                "",
                f"rank correlation of {name} with the size of the effect: "
                f"{between.correlation:.2f}",
                *between.sentences(atlas, most=2),
            ]
    return "\n".join(lines)


def _cell(atlas: "Atlas", name: str, row: int) -> Any:
    value = atlas.heads[name][row]
    if name == "kind":
        return str(value)
    error = atlas.spread.get(name)
    known = error is not None and not math.isnan(error[row])
    return _signed(value) + (f" ± {error[row]:.1g}" if error is not None and known else "")


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.3g}"


def _finished(out: Path) -> int:
    return len(list((out / PARTIAL).glob("*.safetensors")))


def _command(options: argparse.Namespace) -> str:
    words = [word for word in options.argv if word not in _NOT_OF_THE_RUN]
    return shlex.join(["headwise", *words])


def _how_to_go_on(options: argparse.Namespace, out: Path) -> str:
    done = _finished(out / FOLDER) + _finished(out)
    seen = " (what the heads do is measured)" if (out / ATLAS).exists() else ""
    if not done and not seen:
        return "interrupted before the first example was finished; nothing was kept"
    return (
        f"interrupted; {done} finished examples are kept in {out}{seen}. Go on with:\n"
        f"  {_command(options)} --resume"
    )
