"""What columns and kinds are called on the page, and in which order they stand."""

from headwise.instruments.columns import Column
from headwise.instruments.kinds import KINDS, RULES, THRESHOLDS, UNMEASURED, Condition

__all__ = ["DOING", "GROUPS", "MEANING", "group", "label", "rules"]

# heading -> columns; what stands nowhere goes under OTHER
GROUPS: dict[str, tuple[str, ...]] = {
    "Sinks": (
        "sink_mass", "found_sink_mass", "learned_sink_mass", "dormant_share", "value_drain",
        "received_concentration",
    ),
    "Spread": (
        "entropy", "entropy_share", "effective_keys", "max_weight", "mean_distance",
        "distance_std",
    ),
    "Places": (
        "self_mass", "previous_mass", "next_mass", "local_8", "local_64", "delimiter_mass",
        "positional", "positional_random",
    ),
    "Content": (
        "induction_score", "induction_text", "previous_token_score", "duplicate_token_score",
        "same_token", "retrieval_score",
    ),
    "Effect": ("residual_share", "ov_copying", "qk_matching", "output_norm"),
    "Cause": ("effect", "effect_gradient", "effect_integrated"),
    "Likeness": ("similarity", "similarity_rest"),
}  # fmt: skip
OTHER = "Other"

_LABELS = {
    "ov_copying": "OV copying",
    "effect": "effect of taking it out",
    "effect_gradient": "effect, by gradient",
    "effect_integrated": "effect, integrated gradient",
    "qk_matching": "QK matching",
    "local_8": "within 8 tokens",
    "local_64": "within 64 tokens",
    "distance_std": "distance spread",
    "found_sink_mass": "found-sink mass",
    "previous_token_score": "previous-token score",
    "duplicate_token_score": "duplicate-token score",
    "induction_text": "induction on text",
    "same_token": "same-token mass",
    "learned_sink_mass": "learned-sink mass",
    "similarity_rest": "similarity, first key left out",
    "positional_random": "positional, random tokens",
}

MEANING: dict[str, str] = {
    "sink": "parks on the first token or another sink",
    "previous-token": "looks at the token just before",
    "induction": "finds an earlier place of the token, looks at what followed",
    "duplicate": "looks at earlier places of the same token",
    "retrieval": "copies what was hidden far back in the text",
    "local": "stays with the nearest tokens",
    "broad": "spreads over most of what it can see",
    "positional": "looks at a fixed offset, whatever stands there",
    "delimiter": "looks at punctuation, line ends, special tokens",
    "mixed": "meets no threshold",
    UNMEASURED: "nothing was measured that a kind rests on",
}

# (one head, several heads) in the sentence at the top
DOING: dict[str, tuple[str, str]] = {
    "induction": ("does induction", "do induction"),
    "previous-token": ("looks at the token just before", "look at the token just before"),
    "retrieval": ("retrieves", "retrieve"),
    "duplicate": ("finds duplicates", "find duplicates"),
    "local": ("stays local", "stay local"),
    "positional": ("keeps a fixed offset", "keep a fixed offset"),
    "delimiter": ("looks at delimiters", "look at delimiters"),
    "broad": ("spreads broadly", "spread broadly"),
    "mixed": ("meets no single rule", "meet no single rule"),
}


def label(column: str) -> str:
    """A name to read: "induction score" for "induction_score"."""
    return _LABELS.get(column, column.replace("_", " "))


def group(column: Column) -> str:
    """The heading under which a column stands."""
    return next((name for name, members in GROUPS.items() if column.name in members), OTHER)


def rules() -> list[dict[str, object]]:
    """Each kind with the conditions that give it, in the order in which they are tried."""
    return [
        {
            "kind": kind,
            "meaning": MEANING.get(kind, ""),
            "rules": [
                " and ".join(map(_condition, rule.conditions))
                for rule in RULES
                if rule.kind == kind
            ],
        }
        for kind in KINDS
    ]


def _condition(condition: Condition) -> str:
    threshold = getattr(THRESHOLDS, condition.threshold)
    where = f" ({condition.on})" if condition.on else ""
    measured = " where measured" if condition.if_measured else ""
    return f"{condition.column} >= {threshold:.2f}{where}{measured}"
