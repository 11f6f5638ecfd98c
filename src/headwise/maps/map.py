"""AttentionMap: exact statistics of softmax(scale * Q K^T + bias) without the matrix."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from headwise.maps import algebra, flash
from headwise.maps.algebra import AlgebraEngine
from headwise.maps.dense import DenseEngine
from headwise.maps.gather import mass_at, mass_matching
from headwise.maps.pattern import Pattern, Window
from headwise.maps.scores import Bias, Piece, Scores
from headwise.maps.summary import MapSummary, summarize
from headwise.maps.tiles import TileEngine, online_attend, power

ENGINES = ("auto", "algebra", "tiles", "dense")
DENSE_LIMIT = 2**28  # numbers that `dense()` is willing to hold: 1 GiB of float32

# Quicker by the algebra than by tiles on a CPU, measured by bench/maps.py; the rest go to tiles.
BY_ALGEBRA = frozenset({"lse", "apply", "transpose_apply", "entropy", "distance", "inner", "kl"})


class AttentionMap:
    """The attention map of queries `(batch, heads, n_q, d)` and keys `(batch, kv_heads, n_k, d)`.

    `pattern`, `scale`, `bias`, `sinks` and `softcap` are those of `headwise.attend`. `lse`
    `(batch, heads, n_q)` may be given where a kernel has already returned it. `engine`: "algebra"
    (fused kernels), "tiles", "dense" (the reference), or "auto", the quicker of the first two by
    measurement.

    Every statistic is exact, O(n) in memory and float32; rows that see nothing give zero. With
    learned `sinks` the rows sum to less than one: statistics are over the keys, the sink itself
    is not one of them. No gradients are kept.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        pattern: Pattern | None = None,
        scale: float | None = None,
        bias: Tensor | Bias | None = None,
        sinks: Tensor | None = None,
        softcap: float | None = None,
        lse: Tensor | None = None,
        engine: str = "auto",
    ) -> None:
        if engine not in ENGINES:
            raise ValueError(f"engine {engine!r} is unknown; there are {', '.join(ENGINES)}")
        self.scores = Scores.of(q.detach(), k.detach(), pattern, scale, bias, sinks, softcap)
        if lse is not None and lse.shape != q.shape[:3]:
            raise ValueError(
                f"lse must be (batch, heads, n_q) = {tuple(q.shape[:3])}, not {tuple(lse.shape)}"
            )
        self._given = None if lse is None else lse.detach()
        self.engine = engine
        if engine == "algebra":
            _ = self._algebra  # refuse at once what it cannot serve

    def __repr__(self) -> str:
        s = self.scores
        return (
            f"AttentionMap(batch={s.batch}, heads={s.heads}, kv_heads={s.kv_heads}, n_q={s.n_q}, "
            f"n_k={s.n_k}, head_dim={s.q.shape[-1]}, {s.q.dtype}, {s.pattern!r}, {self.engine})"
        )

    # -- engines -----------------------------------------------------------------------------

    @cached_property
    def _algebra(self) -> AlgebraEngine:
        return AlgebraEngine(self.scores, self._given)

    @cached_property
    def _tiles(self) -> TileEngine:
        return TileEngine(self.scores, self._lse())

    @cached_property
    def _dense(self) -> DenseEngine:
        self._refuse_dense()
        return DenseEngine(self.scores)

    def _lse(self) -> Tensor:
        if self._given is None:
            if self._takes("lse") == "algebra":
                self._given = self._algebra.lse
            else:
                self._given = TileEngine(self.scores).lse
        return self._given

    def _takes(self, statistic: str) -> str:
        """Which engine answers a statistic."""
        if self.engine != "auto":
            return self.engine
        if statistic in BY_ALGEBRA and algebra.why_not(self.scores) is None:
            return "algebra"
        return "tiles"

    def _engine(self, statistic: str) -> AlgebraEngine | TileEngine | DenseEngine:
        name = self._takes(statistic)
        if name == "dense":
            return self._dense
        return self._algebra if name == "algebra" else self._tiles

    # -- statistics --------------------------------------------------------------------------

    @torch.no_grad()
    def logsumexp(self) -> Tensor:
        """Row log-sum-exp in nats `(batch, heads, n_q)`, -inf in rows that see nothing."""
        return (self._dense.lse if self.engine == "dense" else self._lse()).float()

    @torch.no_grad()
    def apply(self, v: Tensor) -> Tensor:
        """P V `(batch, heads, n_q, c)` for values `(batch, kv_heads, n_k, c)`."""
        if v.dim() != 4 or v.shape[:3] != self.scores.k.shape[:3]:
            raise ValueError(
                f"v must be (batch, kv_heads, n_k, c) = {tuple(self.scores.k.shape[:3])} and any "
                f"width, not {tuple(v.shape)}"
            )
        return self._engine("apply").apply(v).float()

    @torch.no_grad()
    def transpose_apply(self, r: Tensor) -> Tensor:
        """P^T r `(batch, heads, n_k)` for weights r >= 0 of the queries `(batch, heads, n_q)`."""
        r = r.expand(self.scores.q.shape[:3])
        if bool((r < 0).any()):
            raise ValueError("transpose_apply takes weights r >= 0, some are negative")
        return self._engine("transpose_apply").transpose_apply(r).float()

    def received(self) -> Tensor:
        """Attention that each key receives, the column sums `(batch, heads, n_k)`."""
        if "_summary" in self.__dict__:
            return self._summary.received
        return self.transpose_apply(torch.ones((), device=self.scores.device))

    @torch.no_grad()
    def entropy(self) -> Tensor:
        """-sum p log p of each row in nats `(batch, heads, n_q)`."""
        if "_summary" in self.__dict__:
            return self._summary.entropy
        return self._engine("entropy").entropy().float()

    @torch.no_grad()
    def max(self) -> Tensor:
        """The largest weight of each row `(batch, heads, n_q)`."""
        if "_summary" in self.__dict__:
            return self._summary.max
        return (self._dense if self.engine == "dense" else self._tiles).max().float()

    @torch.no_grad()
    def collision(self) -> Tensor:
        """sum_j p_ij^2 `(batch, heads, n_q)`: the chance that two draws of a key are one."""
        return self._engine("collision").collision().float()

    def mass_on(self, keys: Tensor) -> Tensor:
        """Mass on a set of keys, boolean `(n_k,)` or `(batch, n_k)` -> `(batch, heads, n_q)`."""
        s = self.scores
        if keys.dtype != torch.bool or keys.shape not in ((s.n_k,), (s.batch, s.n_k)):
            raise ValueError(
                f"keys must be boolean ({s.n_k},) or ({s.batch}, {s.n_k}), "
                f"not {keys.dtype} {tuple(keys.shape)}"
            )
        column = keys.to(s.device).expand(s.batch, s.n_k)[:, None, :, None].to(s.dtype)
        return self.apply(column.expand(-1, s.kv_heads, -1, -1))[..., 0]

    @torch.no_grad()
    def mass_at(self, index: Tensor) -> Tensor:
        """Mass on one key of each query, `(n_q,)` or `(batch, n_q)`, -1 for none. O(n d)."""
        return mass_at(self.scores, self._row_lse(), index).float()

    @torch.no_grad()
    def mass_within(self, window: int) -> Tensor:
        """Mass on keys with |i - j| < window `(batch, heads, n_q)`. O(n window d)."""
        near = Window(window, window - 1)
        s = self.scores
        part = Scores(s.q, s.k, s.pattern & near, s.scale, s.bias, None, s.softcap)
        if self.engine in ("auto", "algebra") and flash.why_not(part) is None:
            return self._share(flash.attend(part, s.k[..., :1])[1])
        none = s.k.new_zeros((*s.k.shape[:3], 0))
        return self._share(online_attend(part, none)[1])

    @torch.no_grad()
    def mass_matching(self, query_ids: Tensor, key_ids: Tensor) -> Tensor:
        """Mass on keys whose id equals the query's `(batch, heads, n_q)`.

        ids: integers `(n,)` or `(batch, n)`; a negative id matches nothing. Costs the sum over
        ids of (queries x keys) that have it, not n^2.
        """
        return mass_matching(self.scores, self._row_lse(), query_ids, key_ids).float()

    def mean_distance(self) -> Tensor:
        """Mean of i - j under each row, in tokens `(batch, heads, n_q)`."""
        return self._moments[0]

    def distance_variance(self) -> Tensor:
        """Variance of i - j under each row, in tokens squared `(batch, heads, n_q)`."""
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            mean, variance = self._engine("distance").distance_moments()
            return mean.float(), variance.float()

    def inner(self, other: AttentionMap) -> Tensor:
        """sum_j p_ij p'_ij with a map of the same shape `(batch, heads, n_q)`."""
        self._same_shape(other)
        return self._pair("inner", other)

    def cosine(self, other: AttentionMap) -> Tensor:
        """Cosine of each row with the other map's row `(batch, heads, n_q)`, in [0, 1]."""
        self._same_shape(other)
        # root by root: the product of two small squares would leave float32
        norm = self.collision().sqrt() * other.collision().sqrt()
        return (self.inner(other) / norm.clamp_min(1e-37)).clamp_max(1.0)

    def kl(self, other: AttentionMap) -> Tensor:
        """KL(P, P') of each row in nats `(batch, heads, n_q)`; inf where P' forbids what P sees."""
        self._same_shape(other)
        return self._pair("kl", other)

    @torch.no_grad()
    def _pair(self, statistic: str, other: AttentionMap) -> Tensor:
        name = self._takes(statistic)
        if name == "algebra" and self.engine == "auto":
            fits = algebra.why_not(other.scores) is None
            if not fits or self.scores.pattern != other.scores.pattern:
                name = "tiles"  # the algebra does not know where the other map is zero
        if name == "dense":
            return getattr(self._dense, statistic)(other.scores).float()
        engine = self._algebra if name == "algebra" else self._tiles
        return getattr(engine, statistic)(other.scores).float()

    @torch.no_grad()
    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest weights of each row and their keys `(batch, heads, n_q, k)`.

        Where a row has fewer keys, weight 0 and key -1 stand.
        """
        if not 1 <= k <= self.scores.n_k:
            raise ValueError(f"top({k}): there are {self.scores.n_k} keys")
        values, index = (self._dense if self.engine == "dense" else self._tiles).top(k)
        return values.float(), index

    def summary(self) -> MapSummary:
        """logsumexp, entropy, max, distances and received, all from one pass (kept)."""
        return self._summary

    @cached_property
    def _summary(self) -> MapSummary:
        return summarize(self.scores, self._row_lse())

    # -- dense pieces ------------------------------------------------------------------------

    @torch.no_grad()
    def rows(self, indices: Tensor) -> Tensor:
        """Dense rows of the map `(batch, heads, len(indices), n_k)`; indices of queries (n_q)."""
        indices = torch.as_tensor(indices, device=self.scores.device)
        return self._probabilities(self.scores.rows(indices), self._row_lse()[:, :, indices])

    @torch.no_grad()
    def tile(self, rows: slice, columns: slice) -> Tensor:
        """A dense block of the map `(batch, heads, len(rows), len(columns))`."""
        s = self.scores
        r0, r1, _ = rows.indices(s.n_q)
        c0, c1, _ = columns.indices(s.n_k)
        piece = Piece((0, s.batch), (0, s.kv_heads), (r0, r1), ())
        return self._probabilities(s.tile(piece, c0, c1, True), self._row_lse()[:, :, r0:r1])

    def dense(self) -> Tensor:
        """The whole map `(batch, heads, n_q, n_k)`; refuses above 2**28 numbers (1 GiB)."""
        self._refuse_dense()
        return self.tile(slice(None), slice(None))

    def _refuse_dense(self) -> None:
        s = self.scores
        count = s.batch * s.heads * s.n_q * s.n_k
        if count > DENSE_LIMIT:
            raise ValueError(
                f"the dense map would hold {count:,} numbers ({count * 4 / 2**30:.1f} GiB), more "
                f"than the limit of {DENSE_LIMIT:,}; take rows() or tile(), or a statistic"
            )

    # -- small steps -------------------------------------------------------------------------

    def _row_lse(self) -> Tensor:
        return self._dense.lse if self.engine == "dense" else self._lse()

    def _share(self, part: Tensor) -> Tensor:
        """exp(part - lse): the share of the normaliser that some keys make up."""
        share = (part - self._row_lse().to(part.dtype)).exp()
        return torch.where(part == float("-inf"), 0.0, share).clamp_max(1.0).float()

    @staticmethod
    def _probabilities(logits: Tensor, lse: Tensor) -> Tensor:
        lse = lse.to(logits.dtype)
        return power(logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).float()

    def _same_shape(self, other: AttentionMap) -> None:
        a, b = self.scores, other.scores
        mine, theirs = ((s.batch, s.heads, s.n_q, s.n_k) for s in (a, b))
        if mine != theirs:
            raise ValueError(
                f"maps differ in (batch, heads, n_q, n_k): {mine} and {theirs}; "
                f"compare maps of the same shape"
            )
