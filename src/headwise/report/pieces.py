"""Small maps and tables of pairs as text: bytes in base64, as coarse as the eye."""

import base64
from typing import Any

import numpy as np

from headwise.instruments.atlas import Atlas

__all__ = ["MOST_PAIRED", "alike", "neighbours", "tiles"]

MOST_PAIRED = 1100
"""Heads up to which the similarity of every pair is on the page: two bytes a pair."""

_NEAREST = 4

Words = tuple[str, ...]
Places = tuple[int, ...] | None


def tiles(atlas: Atlas, most: int) -> dict[str, Any]:
    """Tiles cut to their first `most` tokens, their weights as 8 bits of the square root.

    The square root gives small weights the finer steps: the error is at most 0.002 of the root.
    What lies above the diagonal is left out where nothing does. Words that several tiles share
    are held once: "texts" are (tokens, positions or None), "entries" name them by number.
    """
    texts: dict[tuple[Words, Places], int] = {}
    entries: list[dict[str, Any]] = []
    for tile in atlas.tiles if most else ():
        weights = np.asarray(tile["weights"], dtype=np.float64)[:most, :most]
        rows, columns = weights.shape
        tokens = tuple(map(str, tile["tokens"]))[:most]
        start = int(tile.get("start", 0))
        places = tuple(map(int, tile.get("positions") or range(start, start + rows)))[:rows]
        # a cross-attention's keys are tokens of another sequence
        keys = tokens if tile.get("keys") is None else tuple(map(str, tile["keys"]))[:most]
        key_places = places if tile.get("keys") is None else None
        if rows > len(tokens) or columns > len(keys):
            raise ValueError(
                f"the tile of {atlas.name(int(tile['head']))} has weights {weights.shape} for "
                f"{len(tokens)} tokens and {len(keys)} keys"
            )
        known = np.nan_to_num(np.clip(weights, 0, 1), nan=0.0)
        levels = np.rint(255 * np.sqrt(known)).astype(np.uint8)
        causal = rows == columns and not np.triu(levels, 1).any()
        entry = {
            "head": int(tile["head"]),
            "tokens": texts.setdefault((tokens[:rows], places), len(texts)),
            "keys": texts.setdefault((keys[:columns], key_places), len(texts)),
            "causal": causal,
            "weights": _base64(levels[np.tril_indices(rows)] if causal else levels),
        }
        entries.append(entry | ({"name": str(tile["name"])} if tile.get("name") else {}))
    return {"texts": list(texts), "entries": entries}


def alike(atlas: Atlas, names: tuple[str, ...]) -> dict[str, str]:
    """Similarities of all pairs a < b in order of rows, as 16 bits of 65534; 65535: unknown."""
    given = [name for name in names if name in atlas.pairs]
    return {name: _halved(atlas.pairs[name]) for name in given if len(atlas) <= MOST_PAIRED}


def _halved(matrix: np.ndarray) -> str:
    upper = matrix[np.triu_indices(len(matrix), 1)].astype(np.float64)
    scaled = np.rint(np.clip(np.nan_to_num(upper, nan=0.0), 0, 1) * 65534).astype("<u2")
    scaled[~np.isfinite(upper)] = 65535
    return _base64(scaled)


def neighbours(atlas: Atlas) -> list[list[list[float | None]]]:
    """For each head the most similar others: [row, similarity, standard error or None]."""
    matrix = atlas.pairs.get("similarity")
    errors = atlas.pairs.get("similarity_se")
    if matrix is None:
        return _nearest_only(atlas)
    found = []
    for row in range(len(atlas)):
        values = np.where(np.isfinite(matrix[row]), matrix[row].astype(np.float64), -np.inf)
        values[row] = -np.inf
        order = np.argsort(-values, kind="stable")[:_NEAREST]
        found.append([
            [int(other), _rounded(values[other]),
             None if errors is None else _rounded(errors[row, other])]
            for other in order if np.isfinite(values[other])
        ])  # fmt: skip
    return found


def _nearest_only(atlas: Atlas) -> list[list[list[float | None]]]:
    empty = np.full(len(atlas), np.nan)
    similarity = atlas.heads.get("similarity", empty)
    other = atlas.heads.get("similar_to", empty)
    return [
        [[int(o), _rounded(s), None]] if np.isfinite(s) and 0 <= o < len(atlas) else []
        for o, s in zip(other, similarity, strict=True)
    ]


def _rounded(value: float) -> float | None:
    return float(f"{value:.4f}") if np.isfinite(value) else None


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
