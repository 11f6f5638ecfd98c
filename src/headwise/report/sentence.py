"""What the heads are, in plain sentences computed from the numbers."""

from collections import Counter

import numpy as np

from headwise.instruments.atlas import Atlas
from headwise.instruments.kinds import THRESHOLDS
from headwise.report.causes import cause_sentence
from headwise.report.naming import DOING

__all__ = ["facts", "sentences"]


def sentences(atlas: Atlas) -> list[str]:
    """Two or three sentences: sinks and kinds, the strongest head, twins."""
    words = [_sinks_and_kinds(atlas)]
    for column, what in (("induction_score", "induction"), ("retrieval_score", "retrieval")):
        best = atlas.top(column, 1) if column in atlas.heads else []
        if best and best[0][column] >= getattr(THRESHOLDS, what):
            name = atlas.name(best[0]["row"])
            words.append(f"The strongest {what} head is {name}, at {best[0][column]:.2f}.")
            break
    words.append(cause_sentence(atlas))
    return [sentence for sentence in words if sentence]


def facts(atlas: Atlas) -> list[tuple[str, str]]:
    """(what, how much) for the line under the title."""
    known = atlas.provenance
    texts = known.get("texts") or []
    tokens = sum(text.get("tokens") or 0 for text in texts)
    found = [("heads", f"{len(atlas):,}"), ("layers", f"{_layers(atlas):,}")]
    if tokens:
        found.append(("tokens measured", f"{tokens:,}"))
    if texts:
        found.append(("text" if len(texts) == 1 else "texts", f"{len(texts):,}"))
    if known.get("seconds") is not None:
        found.append(("time", duration(float(known["seconds"]))))
    if known.get("peak_memory_bytes"):
        found.append(("peak memory", memory(float(known["peak_memory_bytes"]))))
    precision = [str(known[key]) for key in ("dtype", "device") if known.get(key)]
    if precision:
        found.append(("computed in", " on ".join(precision)))
    return found


def duration(seconds: float) -> str:
    """0.42 s, 41 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def memory(count: float) -> str:
    """Bytes in MB or GB, decimal."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _sinks_and_kinds(atlas: Atlas) -> str:
    total = len(atlas)
    clauses = []
    if "sink_mass" in atlas.heads:
        values = atlas.heads["sink_mass"].astype(np.float64)
        measured = int(np.isfinite(values).sum())
        parked = int((values > 0.5).sum())
        verb = "parks" if parked == 1 else "park"
        its = "its" if parked == 1 else "their"
        of = f"{f'{parked:,}' if parked else 'none'} of {measured:,} heads"
        if measured:
            clauses.append(f"{of} {verb} more than half of {its} attention on the first token")
    if "kind" in atlas.heads:
        counts = Counter(atlas.heads["kind"].tolist())
        doing = [
            f"{counts[kind]:,} {one if counts[kind] == 1 else many}"
            for kind, (one, many) in DOING.items()
            if counts[kind]
        ]
        if doing:
            clauses.append(_listed(doing))
    if not clauses:
        layers = _layers(atlas)
        heads = "1 head" if total == 1 else f"{total:,} heads"
        return f"{heads} in {layers} {'layer' if layers == 1 else 'layers'}."
    sentence = "; ".join(clauses)
    return sentence[0].upper() + sentence[1:] + "."


def _layers(atlas: Atlas) -> int:
    stack = atlas.heads.get("stack", np.zeros(len(atlas)))
    return len(set(zip(stack.tolist(), atlas.heads["layer"].tolist(), strict=True)))


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
