"""How much each head and channel is needed, learned by gates in front of frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.compress.structure.gate_kinds import GATES
from headwise.compress.structure.moments import run
from headwise.instruments.atlas import Atlas
from headwise.instruments.columns import Column
from headwise.instruments.examples import Examples, model_view, read_examples
from headwise.instruments.head_rows import rows_of
from headwise.instruments.metrics import Metric, metric_of
from headwise.instruments.run import evaluating
from headwise.models import ModelView, Site, sites_of, touching
from headwise.models.prefix import logits_of
from headwise.models.projections import features_first
from headwise.models.spots import spot_of

METHODS = (*GATES, "gradient")
WHAT = ("heads", "neurons")


@dataclass(frozen=True, eq=False)
class Gates:
    """What `head_gates` found. scores: site -> `(units,)`, larger is more needed, comparable
    between sites of a kind; values: what each unit is multiplied by where gates were learned;
    costs: parameters of one unit of a site; losses: of every step; shares: the expected share of
    the cost that was kept, at every step."""

    view: ModelView
    method: str
    scores: dict[Site, Tensor]
    values: dict[Site, Tensor]
    costs: dict[Site, float]
    losses: list[float]
    shares: list[float]

    def atlas(self) -> Atlas:
        """The heads' scores as an Atlas with the column `gate`."""
        heads, layers = rows_of(self.view)
        found: list[float] = []
        several = len(self.view.stacks) > 1
        for attention in self.view.attentions:
            stack = attention.stack if several else None
            score = self.scores.get(Site("heads", attention.layer, stack, attention.kind))
            found += [np.nan] * attention.heads if score is None else score.tolist()
        column = Column("gate", "score", f"How much a head is needed, by {self.method} gates.")
        return Atlas(heads | {"gate": np.array(found)}, layers, {"gate": column})

    def removed(self, keep: float) -> dict[Site, list[int]]:
        """Site -> units that go so that at most the share `keep` of the gated parameters stays:
        those of least score, of all sites together."""
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep}: expected a share above 0")
        units = [(float(s), site, n) for site, v in self.scores.items() for n, s in enumerate(v)]
        units.sort(key=lambda unit: unit[0])
        left = total = sum(self.costs[site] for _, site, _ in units)
        gone: dict[Site, list[int]] = {}
        for _, site, number in units:
            if left <= keep * total + 1e-9:
                break
            gone.setdefault(site, []).append(number)
            left -= self.costs[site]
        return {site: sorted(found) for site, found in gone.items()}

    def heads(self, keep: float) -> list[tuple[int, int]]:
        """The (layer, head) pairs of `removed`, as `prune_heads` takes them."""
        found = self.removed(keep).items()
        return [(site.layer, n) for site, units in found if site.kind == "heads" for n in units]

    def channels(self, keep: float) -> dict[int, list[int]]:
        """The {layer: channels} of `removed`, as `prune_channels` takes them."""
        return {site.layer: u for site, u in self.removed(keep).items() if site.kind == "neurons"}

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply the gates' values into the matrices that read the gated units, which gives the
        model what it gives under gates at their values. Not undone."""
        for site, values in self.values.items():
            weight = features_first(_reader(self.view, site))
            columns = values.repeat_interleave(weight.shape[1] // len(values)).to(weight)
            weight.mul_(columns)


def head_gates(
    model: nn.Module | ModelView,
    inputs: Any,
    method: str = "variational",
    keep: float = 0.5,
    what: Sequence[str] = ("heads",),
    metric: Any = "kl",
    steps: int = 200,
    rate: float = 0.05,
    weight: float = 1e-3,
    batch_size: int = 8,
    seed: int = 0,
    **reading: Any,
) -> Gates:
    """Learn a gate for every head (and, with `what` "neurons", every channel of the feed-forward
    parts) while the weights stay frozen.

        gates = head_gates(model, texts, keep=0.7, tokenizer=tok)
        prune_heads(model, gates.heads(keep=0.7))

    method: "variational" (information bottleneck, arXiv 1802.10399, as in VTrans, arXiv
    2406.05276), "l0" (hard concrete gates, arXiv 1712.01312 and 1905.09418), or "gradient":
    nothing is learned, |d metric / d gate| at gates of one, mean over examples (Michel et al.
    2019, arXiv 1905.10650). keep: share of the gated parameters that the learned gates are driven
    to, by a Lagrangian lambda_1 (s - keep) + lambda_2 (s - keep)^2 whose multipliers ascend (Wang
    et al. 2019, arXiv 1910.04732, eq. 6), over a target that falls to keep in the first half.
    metric: what is minimised with the gates in place, "kl" to the ungated model by default, or
    "loss" (see `instruments.metrics`). weight: of the gates' own penalty, in nats. Gates are drawn
    once for each example. reading: as in `read_examples`.

    The model is left as it was found. Raises ValueError for words and numbers that do not fit,
    UnsupportedModelError for models whose heads or channels are not known.
    """
    view = model_view(model)
    if method not in METHODS:
        raise ValueError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    if not what or any(kind not in WHAT for kind in what):
        raise ValueError(f"what={what!r}: expected some of {', '.join(WHAT)}")
    if not 0 < keep < 1 or steps < 1:
        raise ValueError(f"keep={keep}, steps={steps}: expected a share below 1, and steps above 0")
    measure = metric_of(metric)
    if method != "gradient" and measure.better == "higher":
        raise ValueError(f"the metric {measure.name!r} is better when higher: it is minimised here")
    costs = {site: _cost(view, site) for kind in what for site in sites_of(view, kind)}
    batches = read_examples(view.model, inputs, batch_size=batch_size, **reading)
    was = [p for p in view.model.parameters() if p.requires_grad]
    for parameter in was:
        parameter.requires_grad_(False)
    try:
        with evaluating(view.model), torch.enable_grad():
            if method == "gradient":
                if measure.needs_clean:
                    measure = metric_of("loss")  # a divergence has no slope where it is zero
                found = _slopes(view, costs, batches, measure)
                return Gates(view, method, found, {}, _each(costs), [], [])
            return _learned(view, method, costs, batches, measure, keep, steps, rate, weight, seed)
    finally:
        for parameter in was:
            parameter.requires_grad_(True)


def _learned(
    view: ModelView,
    method: str,
    costs: Mapping[Site, tuple[int, float]],
    batches: list[Examples],
    measure: Metric,
    keep: float,
    steps: int,
    rate: float,
    weight: float,
    seed: int,
) -> Gates:
    device = next(view.model.parameters()).device
    gates = {site: GATES[method](units).to(device) for site, (units, _) in costs.items()}
    trained = [p for gate in gates.values() for p in gate.parameters()]
    adam = torch.optim.Adam(trained, lr=rate)
    pull = torch.zeros(2, device=device)  # lambda_1, lambda_2
    total = sum(units * cost for units, cost in costs.values())
    random = torch.Generator().manual_seed(seed)
    clean = [_clean(view, batch, measure) for batch in batches]
    losses, shares = [], []
    for step in range(steps):
        number = int(torch.randint(len(batches), (1,), generator=random))
        batch = batches[number]
        writes = {s: _gating(gate.draw(len(batch), random)) for s, gate in gates.items()}
        with touching(view, writes):
            logits = logits_of(run(view.model, batch))
        loss = measure.score(logits, batch.inputs, clean[number]).mean()
        opened = [gate.open().sum() * costs[site][1] for site, gate in gates.items()]
        share = torch.stack(opened).sum() / total
        over = share - (1 - (1 - keep) * min(1.0, 2 * (step + 1) / steps))
        budget = pull[0] * over + pull[1] * over.square()
        penalty = torch.stack([gate.penalty() for gate in gates.values()]).sum()
        adam.zero_grad()
        (loss + weight * penalty + budget).backward()
        adam.step()
        with torch.no_grad():
            pull += rate * torch.stack([over, over.square()]).detach()
            pull[1].clamp_min_(0)
        losses.append(float(loss.detach()))
        shares.append(float(share.detach()))
    scores = {site: gate.score().detach() for site, gate in gates.items()}
    values = {site: gate.value().detach() for site, gate in gates.items()}
    return Gates(view, method, scores, values, _each(costs), losses, shares)


def _slopes(
    view: ModelView,
    costs: Mapping[Site, tuple[int, float]],
    batches: list[Examples],
    measure: Metric,
) -> dict[Site, Tensor]:
    found = {site: torch.zeros(units) for site, (units, _) in costs.items()}
    count = 0
    device = next(view.model.parameters()).device
    for batch in batches:
        ones = {
            site: torch.ones(len(batch), len(total), device=device, requires_grad=True)
            for site, total in found.items()
        }
        with touching(view, {site: _gating(gate) for site, gate in ones.items()}):
            logits = logits_of(run(view.model, batch))
        score = measure.score(logits, batch.inputs).sum()
        slopes = torch.autograd.grad(score, list(ones.values()))
        for site, slope in zip(ones, slopes, strict=True):
            found[site] += slope.abs().sum(0).cpu()
        count += len(batch)
    return {site: total / count for site, total in found.items()}


def _clean(view: ModelView, batch: Examples, measure: Metric) -> Tensor | None:
    if not measure.needs_clean:
        return None
    with torch.no_grad():
        return logits_of(run(view.model, batch))


def _gating(gate: Tensor) -> Callable[[Tensor], Tensor]:
    """gate `(batch, units)` on `(batch, n, heads, d)`, `(batch, n, hidden)` or, where a layer
    flattens its tokens (OPT), `(batch * n, hidden)`."""

    def write(there: Tensor) -> Tensor:
        if there.dim() == 2:
            return there * gate.to(there.dtype).repeat_interleave(len(there) // len(gate), 0)
        wide = gate[:, None].to(there.dtype)
        return there * (wide[..., None] if there.dim() == 4 else wide)

    return write


def _reader(view: ModelView, site: Site) -> nn.Module:
    """The matrix that reads what is at the site."""
    module = spot_of(view, site).module
    down = getattr(module, "down", None)
    return down if isinstance(down, nn.Linear) else module  # of LowRank, the first factor


def _cost(view: ModelView, site: Site) -> tuple[int, float]:
    """(units, parameters of one)."""
    reader = _reader(view, site)
    stack = site.stack or view.stacks[0]
    layer = next(one for one in view.layers if (one.stack, one.index) == (stack, site.layer))
    if site.kind == "heads":
        attention = next(a for a in layer.attentions if a.kind == site.attention)
        units = attention.heads
        parts = [attention.query_weight(), attention.key_weight(), attention.value_weight()]
        count = sum(part.numel() for part in parts) + attention.output_weight().numel()
        return units, count / units
    units = features_first(reader).shape[1]
    owner = layer.mlp if layer.mlp is not None else reader
    return units, sum(p.numel() for p in owner.parameters()) / units


def _each(costs: Mapping[Site, tuple[int, float]]) -> dict[Site, float]:
    return {site: cost for site, (_, cost) in costs.items()}
