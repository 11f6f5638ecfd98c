"""Which tokens many outputs of a head are made of: simultaneous orthogonal matching pursuit.

Tropp, Gilbert and Strauss 2006, Algorithms for simultaneous sparse approximation I, algorithm 3.1
with p = 1: in every step the atom with the largest sum of absolute correlations over all samples is
added, and all samples are fitted to the chosen atoms anew. With one sample it is orthogonal
matching pursuit, and its first step the token with the largest logit in magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.instruments.examples import model_view
from headwise.instruments.readout import output_stack
from headwise.instruments.run import evaluating
from headwise.instruments.token_tables import linear_head
from headwise.models import ModelView, Site, recording

__all__ = ["Pursued", "head_outputs", "pursuit", "token_atoms"]


@dataclass(frozen=True, eq=False)
class Pursued:
    """support: atoms in the order in which they were chosen; coefficients `(samples, steps)`;
    explained: after each step, the share of the samples' squared norm that the atoms explain."""

    support: tuple[int, ...]
    coefficients: Tensor
    explained: tuple[float, ...]


def pursuit(samples: Tensor, atoms: Tensor, steps: int) -> Pursued:
    """samples `(n, width)` as sums of the same few rows of atoms `(atoms, width)`, which are
    normalised; ends early when nothing is left. Raises ValueError for more steps than atoms, for
    widths that differ, and for samples that are all zero."""
    if samples.shape[-1] != atoms.shape[-1]:
        raise ValueError(f"samples {tuple(samples.shape)} and atoms {tuple(atoms.shape)} differ")
    if not 1 <= steps <= len(atoms):
        raise ValueError(f"steps={steps}: expected 1 to the number of atoms, {len(atoms)}")
    total = samples.pow(2).sum()
    if not total > 0:
        raise ValueError("all samples are zero: nothing to explain")
    atoms = nn.functional.normalize(atoms.to(samples), dim=-1)
    rest = samples
    support: list[int] = []
    explained: list[float] = []
    weights = samples.new_zeros(len(samples), 0)
    for _ in range(steps):
        match = (rest @ atoms.mT).abs().sum(0)
        match[support] = -1.0  # what is fitted is orthogonal to the rest, but for rounding
        support.append(int(match.argmax()))
        chosen = atoms[support]
        weights = torch.linalg.lstsq(chosen.mT, samples.mT, driver="gelsd").solution.mT
        rest = samples - weights @ chosen
        explained.append(float(1 - rest.pow(2).sum() / total))
        if explained[-1] > 1 - 1e-12:
            break
    return Pursued(tuple(support), weights, tuple(explained))


def head_outputs(
    model: nn.Module | ModelView, inputs: dict[str, Any], at: int = -1
) -> dict[tuple[int, int], Tensor]:
    """What every head of the answering stack writes at one position: (layer, head) -> `(batch,
    width)`, float64."""
    view = model_view(model)
    stack = output_stack(view)
    found = [a for a in view.attentions if a.stack == stack and a.kind == "self"]
    named = stack if len(view.stacks) > 1 else None
    sites = [Site("heads", a.layer, named) for a in found]
    with torch.no_grad(), evaluating(view.model), recording(view, sites) as kept:
        view.model(**inputs)
    made: dict[tuple[int, int], Tensor] = {}
    for attention, site in zip(found, sites, strict=True):
        weight = attention.output_weight().detach().double()
        written = torch.einsum("bhd,hwd->hbw", kept[site][:, at].double(), weight)
        made |= {(attention.layer, h): one for h, one in enumerate(written)}
    return made


def token_atoms(model: nn.Module | ModelView, tokens: Sequence[int] | None = None) -> Tensor:
    """Directions that raise a token's logit `(tokens, width)`, float64: rows of the unembedding
    through the final norm's gain and centring. tokens: None for all.

    Raises UnsupportedModelError where the answer is not linear in them.
    """
    view = model_view(model)
    table, final = linear_head(view)
    rows = table if tokens is None else table[list(tokens)]
    return final.into_input(rows.detach().double())
