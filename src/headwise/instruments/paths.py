"""Path patching: the effect that one component has on another, and on nothing else in between.

A sender is given what it computes on the corrupted input. All other heads are held at what they
give on the clean one, so that the change reaches a receiver only straight along the residual; what
the receiver is then handed is kept, and put into a clean run, in which everything after the
receiver takes its course (Wang et al., arXiv 2211.00593, appendix B; Goldowsky-Dill et al., arXiv
2304.05969). Norms are run, not frozen: the numbers are exact for any norm.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headwise.edits import active
from headwise.instruments.examples import model_view
from headwise.instruments.exchange import PASS_TOKENS, Exchange, Scored, exchanged
from headwise.instruments.metrics import metric_of
from headwise.instruments.nodes import Group, Named, group, heads_of, senders_of
from headwise.instruments.pairs import Pair, read_pairs
from headwise.instruments.patch_table import PatchTable
from headwise.instruments.provenance import model_name, versions
from headwise.instruments.run import evaluating
from headwise.models import ModelView
from headwise.models.prefix import Prefix
from headwise.models.sites import Site, Write, sites_of

__all__ = ["path_patch"]

MLPS = ("run", "hold")
_NEVER_SENDS = ("queries", "keys", "values", "logits")


def path_patch(
    model: nn.Module | ModelView,
    clean: Any,
    corrupted: Any,
    metric: Any,
    receivers: Sequence[Named | Sequence[Named]] = ("logits",),
    senders: Sequence[Named | Sequence[Named]] | None = None,
    *,
    mlps: str = "run",
    tokenizer: Any | None = None,
    batch_size: int = 16,
    pass_tokens: int = PASS_TOKENS,
) -> PatchTable:
    """Every sender's effect along its direct path to every receiver: a table sender x receiver.

        path_patch(model, ids, other_ids, metric, receivers=["logits", "L1H0.k"]).top()

    receivers, senders: names as in `nodes.py`; a list of names among them are patched together.
    By default all heads and the embedding send, and all MLPs where `mlps="hold"`. mlps: "run"
    computes them anew, so that a path may lead through them (as Wang et al. do); "hold" keeps them
    at their clean outputs, which makes them components like heads. A sender that comes after a
    receiver has no effect on it. clean, corrupted, metric: as in `patch`.

    The table is one of noising: `effects` are the change of the metric, `normalised` is 1 where
    nothing was lost. Raises ValueError for names that are not there, and UnsupportedModelError
    for models of several stacks.
    """
    if mlps not in MLPS:
        raise ValueError(f"mlps={mlps!r}: expected one of {', '.join(MLPS)}")
    view, measure = model_view(model), metric_of(metric)
    to = [group(one) for one in receivers]
    given = senders_of(view, mlps == "hold") if senders is None else senders
    sending = [group(one) for one in given]
    _check(view, sending, to, mlps)
    began = time.perf_counter()
    parts = []
    with evaluating(view.model):
        for pair in read_pairs(view.model, clean, corrupted, tokenizer, batch_size):
            run = _Paths(view, pair, measure.of(pair.rows), mlps, pass_tokens)
            parts.append((run.effects(sending, to), run.before, run.corrupted))
    values, high, low = (torch.cat(found).cpu().numpy() for found in zip(*parts, strict=True))
    return PatchTable(
        values,
        high,
        low,
        {"sender": tuple(map(_told, sending)), "receiver": tuple(map(_told, to))},
        site="paths",
        metric=measure.name,
        unit=measure.unit,
        direction="noise",
        provenance={
            "model": model_name(view.model),
            "mlps": mlps,
            "versions": versions(),
            "seconds": time.perf_counter() - began,
            "edits": active(view.model),
        },
    )


class _Paths:
    """Paths in one batch: the clean run, and both runs' components."""

    def __init__(
        self, view: ModelView, pair: Pair, metric: Any, mlps: str, pass_tokens: int
    ) -> None:
        self.base, other = Scored(view, pair.clean, metric), Scored(view, pair.corrupted, metric)
        self.held = sites_of(view, "heads") + (sites_of(view, "mlp") if mlps == "hold" else [])
        wanted = [Site("residual", 0), *sites_of(view, "heads"), *sites_of(view, "mlp")]
        self.theirs, logits = other.recorded(wanted)
        self.mine, _ = self.base.recorded(wanted)
        self.prefix: Prefix = self.base.prefix()
        self.base.clean = other.clean = self.prefix.output
        self.before = self.base.of(self.prefix.output)[0]
        self.corrupted = other.of(logits)[0]
        self.length = self.mine[wanted[0]].shape[1]
        self.pass_tokens = pass_tokens
        self.copies = max(1, pass_tokens // (self.prefix.batch * self.length))

    def effects(self, senders: list[Group], receivers: list[Group]) -> Tensor:
        """The metric `(batch, senders, receivers)`."""
        found = self.before[:, None, None].repeat(1, len(senders), len(receivers))
        order = sorted(range(len(senders)), key=lambda i: min(n.order for n in senders[i]))
        while order:
            chosen, order = order[: self.copies], order[self.copies :]
            seen, scores = self._sent([senders[i] for i in chosen], receivers)
            changes, places = [], []
            for copy, i in enumerate(chosen):
                first = min(n.order for n in senders[i])
                for j, to in enumerate(receivers):
                    if to[0].kind == "logits":
                        found[:, i, j] = scores[copy]
                    elif first < max(n.order for n in to):
                        # what ran before every sender is as it was
                        changed = [n for n in to if n.site in seen]
                        changes.append(
                            [Exchange(n.site, seen[n.site][copy], n.head) for n in changed]
                        )
                        places.append((i, j))
            if changes:
                after = exchanged(self.prefix, changes, self.base.of, self.length, self.pass_tokens)
                for (i, j), one in zip(places, after, strict=True):
                    found[:, i, j] = one
        return found

    def _sent(
        self, senders: list[Group], receivers: list[Group]
    ) -> tuple[dict[Site, Tensor], Tensor]:
        """What receivers are handed `(senders, batch, n, ...)`, and the metric `(senders, batch)`
        of what the logits are, with all else held."""
        count = len(senders)
        wanted = {n.site for to in receivers for n in to if n.kind != "logits"}
        seen: dict[Site, Tensor] = {}

        def passing(site: Site) -> Write:
            mine = [(k, n) for k, nodes in enumerate(senders) for n in nodes if n.site == site]

            def write(there: Tensor) -> Tensor | None:
                copies = there.unflatten(0, (count, -1))
                if site in wanted:
                    seen[site] = copies.clone()
                if site in self.held:
                    made = self.mine[site].expand_as(copies).clone()
                elif mine:
                    made = copies.clone()
                else:
                    return None
                for copy, n in mine:
                    Exchange(site, self.theirs[site], n.head).write(made[copy])
                return made.flatten(0, 1)

            return write

        sites = dict.fromkeys([*self.held, *(n.site for nodes in senders for n in nodes), *wanted])
        start = self.prefix.start_of({n.site: passing(n.site) for nodes in senders for n in nodes})
        begin = {site: passing(site) for site in sites}
        with torch.no_grad():
            logits = self.prefix.run(begin, copies=count, start=start)
        return seen, self.base.of(logits)


def _check(view: ModelView, senders: list[Group], receivers: list[Group], mlps: str) -> None:
    heads = {(n.layer, n.head) for n in heads_of(view)}
    shared = {(a.layer, head) for a in view.attentions for head in range(a.kv_heads)}
    feeds = {site.layer for site in sites_of(view, "mlp")}
    for nodes in senders:
        for n in nodes:
            if n.kind in _NEVER_SENDS:
                raise ValueError(f"{n} sends nothing: expected embed, a head, or an MLP")
    for nodes in receivers:
        for n in nodes:
            if n.kind == "embed" or (n.kind == "logits" and len(nodes) > 1):
                raise ValueError(f"{_told(nodes)}: expected heads, their .q, .k, .v, MLPs; logits")
    for n in (n for nodes in (*senders, *receivers) for n in nodes):
        known = shared if n.kind in ("keys", "values") else heads
        if n.kind == "mlp":
            if n.layer not in feeds:
                raise ValueError(f"{n}: this layer has no feed-forward part that was found")
        elif n.kind not in ("embed", "logits") and (n.layer, n.head) not in known:
            raise ValueError(f"{n} is not there: the model has {len(view.layers)} layers")


def _told(nodes: Group) -> str:
    return " + ".join(map(str, nodes))
