"""What headwise knows without a model: kinds and thresholds, instruments, the choice of kernel."""

import argparse
import json
import textwrap

from headwise.cli.errors import UserError
from headwise.cli.tables import table


def kinds(_: argparse.Namespace) -> int:
    """Print every rule that gives a head its kind, in the order in which they are tried."""
    from headwise.instruments.columns import COLUMNS
    from headwise.instruments.kinds import MIXED, RULES, THRESHOLDS

    rows = []
    for rule in RULES:
        for place, condition in enumerate(rule.conditions):
            threshold = getattr(THRESHOLDS, condition.threshold)
            optional = ", if measured" if condition.if_measured else ""
            rows.append(
                (
                    rule.kind if not place else "  and",
                    f"{condition.column} >= {threshold:.2f}",
                    condition.on + optional,
                    COLUMNS[condition.column].description,
                )
            )
    rows.append((MIXED, "no rule is met", "", ""))
    print("A head has the kind of the first rule that its numbers meet:\n")
    print(table(("kind", "rule", "measured on", "what is measured"), rows))
    return 0


def instruments(options: argparse.Namespace) -> int:
    """Print the instruments with their columns, units, descriptions and sources."""
    from headwise.instruments.catalog import INSTRUMENTS

    if options.json:
        listed = {
            name: [vars(column) for column in instrument.columns]
            for name, instrument in INSTRUMENTS.items()
        }
        print(json.dumps(listed, indent=2))
        return 0
    for name, instrument in INSTRUMENTS.items():
        print(f"{name}  (measured on: {instrument.stimulus})")
        for column in instrument.columns:
            source = f" [{column.source}]" if column.source else ""
            text = f"{column.description}{source}"
            print(
                textwrap.fill(
                    f"{column.name:<24}{column.unit:<8}{text}",
                    width=100,
                    initial_indent="  ",
                    subsequent_indent=" " * 34,
                )
            )
        print()
    return 0


def explain(options: argparse.Namespace) -> int:
    """Print which backend an attention of the given shape takes, why, and its cost."""
    import torch

    from headwise.maps import Causal, Full, Pattern, Sinks, Window
    from headwise.maps import explain as choose

    if options.sinks and not options.window:
        raise UserError("--sinks without --window changes nothing: all keys are seen anyway")
    if options.full and options.window:
        raise UserError("--full and --window contradict each other")
    heads, kv_heads = options.heads, options.kv_heads or options.heads
    if heads % kv_heads:
        raise UserError(f"--kv-heads {kv_heads} does not divide --heads {heads}")
    queries = options.queries or options.tokens
    if queries > options.tokens:
        raise UserError(f"--queries {queries} is more than --tokens {options.tokens}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch sees no CUDA device")
    pattern: Pattern = Full() if options.full else Causal()
    if options.window:
        pattern = Window(options.window)
        if options.sinks:
            pattern = Causal() & (pattern | Sinks(options.sinks))

    # One number seen everywhere: shapes and types decide, values do not.
    one = torch.zeros((), dtype=getattr(torch, options.dtype), device=options.device)
    q = one.expand(options.batch, heads, queries, options.head_dim)
    k = one.expand(options.batch, kv_heads, options.tokens, options.head_dim)
    try:
        plan = choose(q, k, pattern, softcap=options.softcap, backend=options.backend)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(
        f"q {tuple(q.shape)}, k {tuple(k.shape)}, {options.dtype} on {options.device}, {pattern!r}"
    )
    print(plan)
    return 0
