"""Which heads do the same: cosines of their maps, on sampled rows.

Rows of all heads of all layers cannot be kept at full length. A row is folded into 512 buckets
under random signs (a count sketch; Charikar, Chen and Farach-Colton 2002): key j goes to bucket
j mod 512 with a sign that is drawn anew for each sampled row. Inner products of folded rows are
those of the rows, plus noise of mean zero and of size 1/sqrt(512) of the norms at most, which
averages out over the rows. Norms are exact. Inputs of up to 512 keys are not folded.
"""

import numpy as np
import torch
from torch import Tensor

from headwise.instruments.batch import Batch
from headwise.instruments.columns import columns
from headwise.instruments.instrument import Findings, Instrument, Numbers, Tables
from headwise.instruments.reading import Reading
from headwise.models import AttentionView, ModelView

__all__ = ["ROWS", "WIDTH", "Similarity"]

ROWS = 32
"""Sampled rows of an input: one from each of so many equal parts of it, the same for all heads."""

WIDTH = 512
"""Buckets of a folded row."""

_AT_ONCE = {"cpu": 2**21, "cuda": 2**25}  # numbers of dense rows that are held at a time
_NEGLIGIBLE = 1e-6  # norm of a row's rest below which it has no direction


class Similarity(Instrument):
    """Mean over sampled rows of the cosine of two heads' rows, between heads that look from the
    same stack at the same stack; `similarity_se` is its standard error over the rows.

    Heads with a large sink are all alike in it: `similarity_rest` leaves the first key out.
    """

    name = "similarity"
    columns = columns("similarity", "similar_to", "similarity_rest", "next_similarity")

    def start(self, view: ModelView, seed: int) -> None:
        self._view = view
        self._seed = seed

    def begin(self, batch: Batch) -> None:
        # for each sample of the batch, attention -> (whole rows, rows without the first key)
        self._kept: list[dict[AttentionView, tuple[_Rows, _Rows]]] = [{} for _ in range(len(batch))]

    def read(self, reading: Reading) -> Numbers:
        s = reading.map.scores
        held = _AT_ONCE.get(s.device.type, 2**25)
        step = max(1, held // max(1, s.batch * s.heads * s.n_k))
        samples = list(range(s.batch))
        # without padding the sampled rows are the same in all samples
        groups = [samples] if reading.rows is None else [[b] for b in samples]
        for group in groups:
            rows = self._sampled(reading, group[0])
            kept: list[list[tuple[_Rows, _Rows]]] = [[] for _ in group]
            for part in torch.arange(len(rows), device=s.device).split(step):
                dense = reading.map.rows(rows[part])
                for parts, b in zip(kept, group, strict=True):
                    weights = dense[b]
                    if reading.keys is not None:
                        weights = weights[..., reading.keys[b]]
                    parts.append(self._fold(weights, part))
            for parts, b in zip(kept, group, strict=True):
                whole, rest = (_join(list(folded)) for folded in zip(*parts, strict=True))
                self._kept[b][reading.attention] = whole, rest
        return {}

    def finish(self) -> Findings:
        pairs = [self._pairs(kept) for kept in self._kept]
        self._kept = []
        return Findings({name: np.stack([p[name] for p in pairs]) for name in pairs[0]})

    def conclude(self, tables: Tables) -> None:
        # squares so far, one a sample: the error of a mean over samples with rows of their own
        tables.pairs["similarity_se"] = np.sqrt(tables.pairs["similarity_se"] / tables.samples)
        for name in ("similarity", "similarity_rest"):
            others = tables.pairs[name].copy()
            np.fill_diagonal(others, np.nan)
            known = ~np.isnan(others).all(1)
            best = np.where(np.isnan(others), -np.inf, others).argmax(1)
            largest = others[np.arange(len(others)), best]
            tables.heads[name] = np.where(known, largest, np.nan)
            if name == "similarity":
                tables.heads["similar_to"] = np.where(known, best, -1).astype(np.int64)
        tables.layers["next_similarity"] = self._next(tables.pairs["similarity"])

    # -- steps -------------------------------------------------------------------------------

    def _sampled(self, reading: Reading, b: int) -> Tensor:
        """Query rows of a sample, ascending: stratified over its real rows."""
        s = reading.map.scores
        real = s.n_q if reading.rows is None else int(reading.rows[b].sum())
        first = 0 if reading.rows is None else int(reading.rows[b].long().argmax())
        count = min(ROWS, real)
        inside = torch.rand(ROWS, generator=torch.Generator().manual_seed(self._seed))[:count]
        at = ((torch.arange(count) + inside) * real / max(count, 1)).long().clamp_max(real - 1)
        return (at + first).to(s.device)

    def _fold(self, weights: Tensor, places: Tensor) -> "tuple[_Rows, _Rows]":
        """weights `(heads, rows, n_k)` of the sampled rows with these numbers."""
        norm = torch.linalg.vector_norm(weights, dim=-1)
        rest = torch.linalg.vector_norm(weights[..., 1:], dim=-1)
        n_k = weights.shape[-1]
        if n_k <= WIDTH:
            without = weights.clone()
            without[..., 0] = 0
            return _Rows(weights, norm), _Rows(without, rest)
        signed = torch.nn.functional.pad(
            weights * self._signs(n_k, weights.device)[places], (0, -n_k % WIDTH)
        )
        first = signed[..., 0].clone()
        signed[..., 0] = 0
        without = signed.unflatten(-1, (-1, WIDTH)).sum(-2)
        whole = without.clone()
        whole[..., 0] += first
        return _Rows(whole, norm), _Rows(without, rest)

    def _signs(self, n_k: int, device: torch.device) -> Tensor:
        """+1 or -1 for each sampled row and key `(ROWS, n_k)`."""
        kept = getattr(self, "_last_signs", None)
        if kept is None or kept.shape[1] != n_k or kept.device != device:
            random = torch.Generator().manual_seed(self._seed + n_k)
            kept = torch.randint(0, 2, (ROWS, n_k), generator=random, dtype=torch.int8)
            self._last_signs = kept = (kept * 2 - 1).to(device)
        return kept

    def _pairs(self, kept: "dict[AttentionView, tuple[_Rows, _Rows]]") -> dict[str, np.ndarray]:
        order = self._view.attentions
        starts = np.cumsum([0] + [a.heads for a in order])
        size = int(starts[-1])
        names = ("similarity", "similarity_se", "similarity_rest")
        pairs = {name: np.full((size, size), np.nan) for name in names}
        for stack, kind in dict.fromkeys((a.stack, a.kind) for a in order):
            members = [
                (number, kept[a])
                for number, a in enumerate(order)
                if (a.stack, a.kind) == (stack, kind) and a in kept
            ]
            if not members:
                continue
            heads = [np.arange(starts[n], starts[n + 1]) for n, _ in members]
            at = np.ix_(np.concatenate(heads), np.concatenate(heads))
            mean, error = _cosines([rows for _, (rows, _) in members])
            pairs["similarity"][at], pairs["similarity_se"][at] = mean, error
            pairs["similarity_rest"][at] = _cosines([rows for _, (_, rows) in members])[0]
        return pairs

    def _next(self, similarity: np.ndarray) -> np.ndarray:
        """For each layer, the mean over its heads of the best cosine in the next layer."""
        starts = np.cumsum([0] + [a.heads for a in self._view.attentions])
        at = {a: slice(starts[n], starts[n + 1]) for n, a in enumerate(self._view.attentions)}
        found = []
        layers = self._view.layers
        for number, layer in enumerate(layers):
            later = layers[number + 1] if number + 1 < len(layers) else None
            best = [
                similarity[at[a], at[b]].max(1)
                for a in layer.attentions
                for b in (later.attentions if later is not None else ())
                if (a.stack, a.kind) == (b.stack, b.kind)
            ]
            found.append(float(np.concatenate(best).mean()) if best else np.nan)
        return np.array(found)


class _Rows:
    """Folded rows `(heads, rows, width)` and the norms of the rows themselves `(heads, rows)`."""

    def __init__(self, folded: Tensor, norm: Tensor) -> None:
        self.folded, self.norm = folded, norm


def _join(parts: list[_Rows]) -> _Rows:
    folded = torch.cat([part.folded for part in parts], 1)
    return _Rows(folded.contiguous(), torch.cat([part.norm for part in parts], 1))


def _cosines(attentions: list[_Rows]) -> tuple[np.ndarray, np.ndarray]:
    """Mean cosine over rows of every two heads, and the square of its standard error
    `(heads, heads)`."""
    norm = torch.cat([rows.norm for rows in attentions])
    folded = torch.cat([rows.folded for rows in attentions])
    has = norm > _NEGLIGIBLE
    unit = folded / norm.clamp_min(_NEGLIGIBLE)[..., None]
    count = has.float() @ has.float().T
    total = torch.zeros_like(count)
    squares = torch.zeros_like(count)
    for row in range(unit.shape[1]):
        part = unit[:, row] * has[:, row, None]
        cosine = part @ part.T
        total += cosine
        squares += cosine.square()
    mean = total / count  # 0 / 0 is NaN: no row in which both have a direction
    spread = (squares / count - mean.square()).clamp_min(0)
    error = (spread / (count - 1)).masked_fill(count < 2, torch.nan)
    both = []
    for matrix in (mean.clamp(-1, 1), error):
        both.append(matrix.cpu().double().numpy())
    np.fill_diagonal(both[0], np.where(np.isnan(both[0].diagonal()), np.nan, 1.0))
    return both[0], both[1]
