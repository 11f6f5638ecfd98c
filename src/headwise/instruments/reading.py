"""One attention while it runs, with what is known of its input: what an instrument reads."""

from functools import cached_property

import torch
from torch import Tensor

from headwise.instruments.band import Band, band
from headwise.instruments.batch import Batch
from headwise.instruments.kinds import THRESHOLDS
from headwise.instruments.visibility import Visible, looks_ahead, visible
from headwise.maps import AttentionMap
from headwise.maps.summary import MapSummary
from headwise.models import AttentionReading

__all__ = ["FEWEST_ROWS", "Reading"]

FEWEST_ROWS = 64
"""A key is called a sink only if so many queries see it; a quarter of them on inputs of less
than four times as many. The last key of a causal map is seen by itself alone."""


class Reading:
    """A call of one attention. Tensors must not be kept: they are the model's own.

    attention: its view. map: the attention map, exact, never dense. query, key, value, out: as
    in `headwise.models.AttentionReading`. batch: the samples that run.

    Statistics that several instruments want are computed once, when the first one asks. Only
    real tokens count, as queries and as keys: a padded batch gives the same numbers as its
    samples one by one.
    """

    def __init__(self, seen: AttentionReading, batch: Batch) -> None:
        self.seen = seen
        self.batch = batch
        self.attention = seen.attention
        self.map: AttentionMap = seen.map
        self.query, self.key, self.value, self.out = seen.query, seen.key, seen.value, seen.out

    # -- the input ---------------------------------------------------------------------------

    @property
    def cross(self) -> bool:
        """Whether keys come from another sequence than queries: offsets mean nothing then."""
        return self.attention.kind == "cross"

    @property
    def _key_stack(self) -> str:
        return "encoder" if self.cross else self.attention.stack

    def _of(self, table: dict[str, Tensor], stack: str, n: int) -> Tensor | None:
        """The entry of a stack, if it speaks of as many tokens as there are here (an image that
        stands for one token in the input becomes many in some models)."""
        found = table.get(stack)
        if found is None or found.shape != (self.map.scores.batch, n):
            return None
        return found.to(self.map.scores.device)

    @cached_property
    def query_ids(self) -> Tensor | None:
        """Token ids of the queries `(batch, n_q)`, -1 at padding; None where there are none."""
        ids = self._of(self.batch.ids, self.attention.stack, self.map.scores.n_q)
        return ids if ids is None or self.rows is None else ids.masked_fill(~self.rows, -1)

    @cached_property
    def key_ids(self) -> Tensor | None:
        """Token ids of the keys `(batch, n_k)`, -1 at padding; None where there are none."""
        ids = self._of(self.batch.ids, self._key_stack, self.map.scores.n_k)
        return ids if ids is None or self.keys is None else ids.masked_fill(~self.keys, -1)

    @cached_property
    def delimiters(self) -> Tensor | None:
        """True where a key is punctuation, a line end or a special token `(batch, n_k)`."""
        return self._of(self.batch.delimiters, self._key_stack, self.map.scores.n_k)

    @cached_property
    def rows(self) -> Tensor | None:
        """True where a query is real `(batch, n_q)`; None: all are."""
        s = self.map.scores
        known = self._of(self.batch.valid, self.attention.stack, s.n_q)
        if known is None and not self.cross and s.n_q == s.n_k:
            known = self.seen.padding
        return known

    @cached_property
    def keys(self) -> Tensor | None:
        """True where a key is real `(batch, n_k)`; None: all are."""
        known = self._of(self.batch.valid, self._key_stack, self.map.scores.n_k)
        return self.seen.padding if known is None else known

    @cached_property
    def first_key(self) -> Tensor:
        """Index of the first real key of each sample `(batch,)`."""
        s = self.map.scores
        if self.keys is None:
            return torch.zeros(s.batch, dtype=torch.long, device=s.device)
        return self.keys.long().argmax(1)

    # -- the map -----------------------------------------------------------------------------

    @property
    def summary(self) -> MapSummary:
        """Row and column statistics from one pass over the map, padding rows among them."""
        return self.map.summary()

    @cached_property
    def count(self) -> Tensor | int:
        """Number of real queries, `(batch, 1)` where samples differ."""
        return self.map.scores.n_q if self.rows is None else self.rows.sum(1, keepdim=True)

    def mean(self, x: Tensor) -> Tensor:
        """Mean over real queries of `(batch, heads, n_q)` -> `(batch, heads)`."""
        return self.total(x) / self.count

    def total(self, x: Tensor) -> Tensor:
        """Sum over real queries of `(batch, heads, n_q)` -> `(batch, heads)`."""
        if self.rows is not None:
            x = x.masked_fill(~self.rows[:, None], 0.0)
        return x.sum(-1)

    @cached_property
    def received(self) -> Tensor:
        """What each key receives from all real queries together `(batch, heads, n_k)`."""
        if self.rows is None:
            return self.summary.received
        return self.map.transpose_apply(self.rows[:, None].float())

    def mass_on(self, keys: Tensor) -> Tensor:
        """Mean mass on a set of keys, `(batch, n_k)` or `(batch, heads, n_k)`, from what each
        received: no pass of its own."""
        if keys.dim() == 2:
            keys = keys[:, None]
        return (self.received * keys).sum(-1) / self.count

    @cached_property
    def visible(self) -> Visible:
        """How many keys a query may see, and how many real queries a key is seen by."""
        return visible(self.map, self.rows)

    @cached_property
    def sinks(self) -> Tensor:
        """Sinks found anywhere `(batch, heads, n_k)`: keys whose mean weight over the queries
        that see them is above 0.3 (Gu et al. 2024, arXiv 2410.10781, section 3)."""
        seen_by = self.visible.queries
        fewest = (torch.as_tensor(self.count) // 4).clamp(1, FEWEST_ROWS).to(seen_by.device)
        enough = seen_by >= (fewest[..., None] if fewest.dim() else fewest)
        return (self.received > THRESHOLDS.sink_weight * seen_by) & enough

    @cached_property
    def learned_sink(self) -> Tensor | None:
        """Mean mass on a learned sink, which is no key `(batch, heads)`; None: there is none."""
        if self.map.scores.sinks is None:
            return None
        return (1 - self.received.sum(-1) / self.count).clamp_min(0)

    @cached_property
    def ahead(self) -> bool:
        """Whether queries may look ahead."""
        return looks_ahead(self.map.scores.pattern)

    @cached_property
    def band(self) -> Band:
        """The weights near the diagonal; only where queries and keys are the same sequence."""
        return band(self.map, self.ahead)

    def nothing(self) -> Tensor:
        """NaN for every head `(batch, heads)`: not measured here."""
        s = self.map.scores
        return torch.full((s.batch, s.heads), torch.nan, device=s.device)
