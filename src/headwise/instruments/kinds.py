"""What a head mostly does, as a name that is given only with the numbers that justify it.

A kind is named by the first rule that a head's numbers meet, in this order:

1. What the head does when there is something to do: previous-token, induction, duplicate,
   retrieval. They come first because such heads park on a sink while there is nothing to do (an
   induction head on text without repetitions has a large sink mass, and is no sink head).
2. broad, sink, delimiter: where the mass lies as a whole. broad comes before sink and before what
   follows, because on a short input even an even spread puts much on the first and nearest keys.
3. positional, local: near keys, by offset alone or in any way. The special one comes first.
4. mixed: measured, but no rule is met.

A number that was not measured (NaN, or no such column) justifies nothing. A head of which nothing
is known that a rule asks for is "unmeasured", which is no kind.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "KINDS",
    "RULES",
    "THRESHOLDS",
    "UNMEASURED",
    "Condition",
    "Rule",
    "Thresholds",
    "evidence",
    "label",
    "label_all",
]

UNMEASURED = "unmeasured"


@dataclass(frozen=True)
class Thresholds:
    """Every threshold behind a kind, and those that instruments need to call a key a sink."""

    previous_token: float = 0.4
    """Least mass on the token just before, on the given input or on random tokens."""

    induction: float = 0.4
    """Least mass on the token after the earlier place, on repeated random tokens."""

    duplicate: float = 0.4
    """Least mass on the earlier place of the same token, on repeated random tokens."""

    retrieval: float = 0.1
    """Least share of needle tokens copied; Wu et al. 2024 (arXiv 2404.15574) use 0.1."""

    broad: float = 0.75
    """Least entropy as a share of the largest possible. Half of the mass on one key and the rest
    spread evenly gives about 0.6 at thousands of keys; an even spread over n**0.75 keys, 0.75."""

    sink: float = 0.5
    """Least mass on the first token, or on sinks found anywhere: more than on all other keys."""

    delimiter: float = 0.5
    """Least mass on punctuation, line ends and special tokens, which are a small share of text."""

    positional: float = 0.6
    """Least mass that the offset profile explains, on the given input and, where measured, on
    random tokens too."""

    local: float = 0.5
    """Least mass nearer than 8 tokens. The mass nearer than 64 is not asked: on an input of 64
    tokens it is 1 for every head."""

    dormant: float = 0.5
    """Instruments: a head is dormant on an input where its mass on sinks is above this."""

    sink_weight: float = 0.3
    """Instruments: a key whose mean weight over the rows that see it is above this is a sink;
    Gu et al. 2024 (arXiv 2410.10781) use 0.3."""


THRESHOLDS = Thresholds()


@dataclass(frozen=True)
class Condition:
    """`column` reaches the threshold; `on` says what it was measured on.

    Where `if_measured` is set, a number that is missing does no harm, but one below refutes.
    """

    column: str
    threshold: str
    on: str = ""
    if_measured: bool = False


@dataclass(frozen=True)
class Rule:
    """All conditions together justify the kind; `beside` are columns worth reading with them."""

    kind: str
    conditions: tuple[Condition, ...]
    beside: tuple[str, ...] = ()


# in the order in which they are tried; several rules of one kind are alternatives
RULES: tuple[Rule, ...] = (
    Rule(
        "previous-token",
        (Condition("previous_token_score", "previous_token", "random tokens"),),
        ("previous_mass",),
    ),
    Rule("previous-token", (Condition("previous_mass", "previous_token", "given input"),)),
    Rule(
        "induction",
        (Condition("induction_score", "induction", "repeated random tokens"),),
        ("induction_text",),
    ),
    Rule(
        "duplicate",
        (Condition("duplicate_token_score", "duplicate", "repeated random tokens"),),
        ("same_token",),
    ),
    Rule("retrieval", (Condition("retrieval_score", "retrieval", "needle test"),)),
    Rule("broad", (Condition("entropy_share", "broad", "given input"),), ("effective_keys",)),
    Rule("sink", (Condition("sink_mass", "sink", "first token"),), ("dormant_share",)),
    Rule("sink", (Condition("found_sink_mass", "sink", "sinks found"),), ("dormant_share",)),
    Rule("delimiter", (Condition("delimiter_mass", "delimiter", "given input"),)),
    Rule(
        "positional",
        (
            Condition("positional", "positional", "given input"),
            Condition("positional_random", "positional", "random tokens", if_measured=True),
        ),
        ("mean_distance",),
    ),
    Rule("local", (Condition("local_8", "local", "given input"),), ("mean_distance",)),
)

MIXED = "mixed"
KINDS: tuple[str, ...] = (*dict.fromkeys(rule.kind for rule in RULES), MIXED)


def label(row: Mapping[str, Any], thresholds: Thresholds = THRESHOLDS) -> tuple[str, str]:
    """The kind of a head and the reason: the numbers, and the thresholds they reach.

    row: column name -> number; columns may be missing or NaN. A reason reads
    "induction_score 0.83 >= 0.40 (repeated random tokens)".
    """
    met = evidence(row, thresholds)
    if met:
        return met[0]
    conditions = {c.column: c for rule in RULES for c in rule.conditions}
    known = [c for c in conditions.values() if not math.isnan(_number(row, c.column))]
    if all(condition.if_measured for condition in known):
        needed = [name for name, condition in conditions.items() if not condition.if_measured]
        return UNMEASURED, f"none of these was measured: {', '.join(needed)}"

    def nearness(condition: Condition) -> float:
        return _number(row, condition.column) / getattr(thresholds, condition.threshold)

    # one that reached its threshold, yet decided nothing, was refuted by another of its rule
    below = [condition for condition in known if nearness(condition) < 1]
    nearest = sorted(below, key=nearness, reverse=True)[:3]
    words = [_words(row, condition, thresholds) for condition in nearest]
    return MIXED, f"no threshold is met; nearest: {', '.join(words)}"


def evidence(row: Mapping[str, Any], thresholds: Thresholds = THRESHOLDS) -> list[tuple[str, str]]:
    """Every (kind, reason) whose rule the numbers meet, in the order of RULES; each kind once."""
    met: dict[str, str] = {}
    for rule in RULES:
        if rule.kind in met or not all(_holds(row, c, thresholds) for c in rule.conditions):
            continue
        words = ", ".join(_words(row, condition, thresholds) for condition in rule.conditions)
        beside = [
            f"{name} {_number(row, name):.2f}"
            for name in rule.beside
            if not math.isnan(_number(row, name))
        ]
        met[rule.kind] = words + (f"; {', '.join(beside)}" if beside else "")
    return list(met.items())


def label_all(
    heads: Mapping[str, Sequence[Any] | Any], thresholds: Thresholds = THRESHOLDS
) -> tuple[list[str], list[str]]:
    """Kinds and reasons of a whole table, column name -> (n_heads,) values."""
    count = len(next(iter(heads.values()), ()))
    rows = ({name: values[i] for name, values in heads.items()} for i in range(count))
    labels = [label(row, thresholds) for row in rows]
    return [kind for kind, _ in labels], [reason for _, reason in labels]


def _number(row: Mapping[str, Any], column: str) -> float:
    value = row.get(column)
    return math.nan if value is None else float(value)


def _holds(row: Mapping[str, Any], condition: Condition, thresholds: Thresholds) -> bool:
    value = _number(row, condition.column)
    if math.isnan(value):
        return condition.if_measured
    return value >= getattr(thresholds, condition.threshold)


def _words(row: Mapping[str, Any], condition: Condition, thresholds: Thresholds) -> str:
    value = _number(row, condition.column)
    threshold: float = getattr(thresholds, condition.threshold)
    if math.isnan(value):
        return f"{condition.column} not measured"
    digits = 2
    while digits < 9 and f"{value:.{digits}f}" == f"{threshold:.{digits}f}" and value != threshold:
        digits += 1  # as many as it takes to see which of the two is larger
    sign = ">=" if value >= threshold else "<"
    on = f" ({condition.on})" if condition.on else ""
    return f"{condition.column} {value:.{digits}f} {sign} {threshold:.2f}{on}"
