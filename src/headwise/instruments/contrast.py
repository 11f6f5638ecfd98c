"""May two atlases be compared? Their provenance against each other, in words."""

from collections.abc import Mapping
from typing import Any

__all__ = ["contrast"]

# what is expected to differ from run to run and changes no figure
_OF_THE_RUN = {"seconds", "date", "command", "peak_memory_bytes", "threads", "platform"}
_HANDLED = {"model", "revision", "weights_hash", "texts", "dtype", "device", "versions", "settings"}


def contrast(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The differences that bear on a comparison, the gravest first; empty if there are none."""
    return [*_texts(a, b), *_model(a, b), *_precision(a, b), *_versions(a, b), *_settings(a, b)]


def _texts(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    texts_a, texts_b = a.get("texts") or [], b.get("texts") or []
    if not texts_a or not texts_b:
        which = "neither atlas names" if not texts_a and not texts_b else "one atlas does not name"
        return [f"{which} its texts: figures are only comparable on the same text"]
    hashes_a, hashes_b = ([t.get("sha256") for t in texts] for texts in (texts_a, texts_b))
    if sorted(map(str, hashes_a)) != sorted(map(str, hashes_b)):
        common = len(set(hashes_a) & set(hashes_b))
        return [
            f"measured on different texts ({_names(texts_a)} against {_names(texts_b)}; {common} "
            "in common): figures are only comparable on the same text"
        ]
    tokens_a, tokens_b = (sum(t.get("tokens") or 0 for t in texts) for texts in (texts_a, texts_b))
    if tokens_a != tokens_b:
        return [
            f"the same text, but {tokens_a:,} tokens against {tokens_b:,}: entropies, effective "
            "keys and distances depend on the length"
        ]
    return []


def _model(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    name_a, name_b = a.get("model"), b.get("model")
    same_weights = _same(a, b, "weights_hash")
    if same_weights:
        return []  # whatever they are called
    if name_a != name_b:
        return [f"different models: {name_a or 'unknown'} against {name_b or 'unknown'}"]
    if same_weights is False:
        return [
            f"the same model name ({name_a}), but different weights (hash "
            f"{_short(a['weights_hash'])} against {_short(b['weights_hash'])})"
        ]
    if _same(a, b, "revision") is False:
        return [f"different revisions of {name_a}: {a['revision']} against {b['revision']}"]
    return []


def _precision(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    words = []
    if _same(a, b, "dtype") is False:
        words.append(
            f"computed in {a['dtype']} against {b['dtype']}: small differences are rounding"
        )
    if _same(a, b, "device") is False:
        words.append(f"computed on {a['device']} against {b['device']}")
    return words


def _versions(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    versions_a, versions_b = a.get("versions") or {}, b.get("versions") or {}
    changed = [
        f"{name} {versions_a[name]} against {versions_b[name]}"
        for name in versions_a
        if name in versions_b and versions_a[name] != versions_b[name]
    ]
    return [f"different versions: {', '.join(changed)}"] if changed else []


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    settings_a, settings_b = ({**(p.get("settings") or {})} for p in (a, b))
    for given, settings in ((a, settings_a), (b, settings_b)):
        known = _OF_THE_RUN | _HANDLED
        settings |= {name: value for name, value in given.items() if name not in known}
    missing = object()
    changed = [
        f"{name} {settings_a.get(name, 'not given')} against {settings_b.get(name, 'not given')}"
        for name in {**settings_a, **settings_b}
        if settings_a.get(name, missing) != settings_b.get(name, missing)
    ]
    return [f"different settings: {'; '.join(changed)}"] if changed else []


def _same(a: Mapping[str, Any], b: Mapping[str, Any], key: str) -> bool | None:
    """Whether the two agree, or None where one does not say."""
    if a.get(key) is None or b.get(key) is None:
        return None
    return a[key] == b[key]


def _names(texts: list[dict[str, Any]]) -> str:
    names = [str(text.get("name") or "unnamed") for text in texts]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _short(digest: Any) -> str:
    return str(digest).rpartition(":")[2][:12]
