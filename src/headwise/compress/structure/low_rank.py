"""Matrices as products of two thin ones, chosen so that outputs on real text change least."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.compress.step import Step, take
from headwise.compress.structure.matrices import (
    bias_of,
    matrices_of,
    named_matrix,
    put_in_place,
    shape_of,
    tied_elsewhere,
)
from headwise.compress.structure.moments import Moments, input_moments
from headwise.compress.structure.ranks import (
    WEIGHTINGS,
    Spectrum,
    largest_rank,
    share_out,
    spectrum,
)
from headwise.instruments.examples import model_view, read_examples
from headwise.models import ModelView
from headwise.models.projections import features_first


class LowRank(nn.Module):
    """x -> up(down(x)): `down` (rank, in) without a bias, `up` (out, rank) with the matrix's.

    `weight` is their product `(out, in)`, made anew at each reading: views of the model see it,
    what is written into it is lost. `in_features`, `out_features` and `rank` are as they say.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, **where: Any
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False, **where)
        self.up = nn.Linear(rank, out_features, bias=bias, **where)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.down(x))
        return out

    @property
    def weight(self) -> Tensor:
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


@dataclass(frozen=True)
class Factorise(Step):
    """Empty LowRank modules in the places of matrices. ranks: (name, rank) pairs."""

    ranks: tuple[tuple[str, int], ...]

    def apply(self, model: nn.Module) -> None:
        found = []
        for name, rank in self.ranks:
            matrix = named_matrix(model, name)
            out, wide = shape_of(matrix)
            if not 1 <= rank <= largest_rank(out, wide):
                raise ValueError(
                    f"{name} ({out} x {wide}): two factors of rank {rank} are no smaller than the "
                    f"matrix; expected 1 to {largest_rank(out, wide)}"
                )
            other = tied_elsewhere(model, matrix)
            if other is not None:
                raise ValueError(f"{name} shares its weight with {other}: both would be needed")
            found.append((matrix, rank))
        for matrix, rank in found:
            out, wide = shape_of(matrix)
            weight = features_first(matrix)
            with torch.device(weight.device):
                new = LowRank(wide, out, rank, bias_of(matrix) is not None, dtype=weight.dtype)
            new.train(matrix.training)
            for parameter in new.parameters():
                parameter.requires_grad_(weight.requires_grad)
            put_in_place(model, matrix, new)


def factorise(
    model: nn.Module | ModelView,
    inputs: Any = None,
    rank: int | Mapping[str, int] | None = None,
    keep: float | None = None,
    which: str | Iterable[str] = "all",
    weighting: str = "full",
    relative: bool = True,
    **reading: Any,
) -> dict[str, float]:
    """Replace matrices of the layers by products of two thin ones; returns, for each that was
    replaced, the share of its output's mean square that is lost.

        factorise(model, texts, keep=0.7, tokenizer=tok)      # 70 % of their parameters
        factorise(model, texts, rank=64, which="attention", tokenizer=tok)

    rank: one for all, or by name. keep: share of the parameters of the chosen matrices; ranks are
    shared out so that the most output energy is kept (`relative`: each matrix counts by the
    share of its own output, else by absolute size); matrices that are worth it stay whole. which:
    see `matrices_of`. weighting: "full" second moments of what the matrices read on the inputs
    (the least possible output error), "diagonal" (LoRAP, ASVD), or "none", plain SVD, which needs
    no inputs. Where there is a bias, the mean output is kept in it. reading: tokenizer=, tokens=,
    windows=, batch_size=, as in `read_examples`.

    Raises ValueError, before anything is changed, for a rank that would not save parameters, with
    the largest that would.
    """
    if (rank is None) == (keep is None):
        raise ValueError("give rank= or keep=, one of them")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting={weighting!r}: expected one of {', '.join(WEIGHTINGS)}")
    view = model_view(model)
    if isinstance(rank, Mapping) and which == "all":
        which = tuple(rank)
    matrices = matrices_of(view, which)
    chosen = _asked(matrices, rank) if rank is not None else None
    moments: dict[str, Moments] = {}
    if weighting != "none":
        if inputs is None:
            raise ValueError(f"weighting={weighting!r} needs inputs=; without any: 'none'")
        moments = input_moments(view.model, matrices, read_examples(view.model, inputs, **reading))
    spectra = {
        name: _spectrum(matrix, moments.get(name), weighting) for name, matrix in matrices.items()
    }
    if chosen is None:
        assert keep is not None
        chosen = _shared_out(matrices, spectra, keep, relative)
    step = Factorise(tuple(chosen.items()))
    before = {name: (features_first(m).detach(), bias_of(m)) for name, m in matrices.items()}
    take(view.model, step)
    for name, size in chosen.items():
        weight, bias = before[name]
        _fill(view.model.get_submodule(name), spectra[name], weight, bias, size, moments.get(name))
    return {name: spectra[name].error(size) for name, size in chosen.items()}


def _asked(matrices: Mapping[str, nn.Module], rank: int | Mapping[str, int]) -> dict[str, int]:
    """Ranks by name, refused where none is saved."""
    asked = dict.fromkeys(matrices, rank) if isinstance(rank, int) else dict(rank)
    unknown = sorted(set(asked) - set(matrices))
    if unknown:
        raise ValueError(f"rank= names {', '.join(unknown[:3])}, which which= leaves out")
    for name, size in asked.items():
        out, wide = shape_of(matrices[name])
        if not 1 <= size <= largest_rank(out, wide):
            raise ValueError(
                f"{name} ({out} x {wide}): rank {size} does not save parameters; the largest that "
                f"does is {largest_rank(out, wide)}"
            )
    return asked


def _shared_out(
    matrices: Mapping[str, nn.Module], spectra: Mapping[str, Spectrum], keep: float, relative: bool
) -> dict[str, int]:
    if not 0 < keep < 1:
        raise ValueError(f"keep={keep}: expected a share of the parameters between 0 and 1")
    shapes = {name: shape_of(matrix) for name, matrix in matrices.items()}
    shapes = {name: shape for name, shape in shapes.items() if largest_rank(*shape) > 0}
    energies = {}
    for name, found in spectra.items():
        if name not in shapes:  # too thin for two factors
            continue
        scale = float(found.energy.sum()) if relative else 1.0
        energies[name] = (found.energy / (scale or 1.0)).tolist()
    budget = int(keep * sum(out * wide for out, wide in shapes.values()))
    ranks = share_out(energies, shapes, budget)
    return {name: rank for name, rank in ranks.items() if rank is not None}


def _spectrum(matrix: nn.Module, moments: Moments | None, weighting: str) -> Spectrum:
    centred = bias_of(matrix) is not None
    second = None if moments is None else moments.second(centred)
    return spectrum(features_first(matrix), second, weighting)


@torch.no_grad()
def _fill(
    module: nn.Module,
    found: Spectrum,
    weight: Tensor,
    bias: Tensor | None,
    rank: int,
    moments: Moments | None,
) -> None:
    assert isinstance(module, LowRank)
    up, down = found.factors(weight, rank)
    module.up.weight.copy_(up)
    module.down.weight.copy_(down)
    if bias is not None:
        kept = bias.double()
        if moments is not None:  # what the lost directions give on average
            kept = kept + (weight.double() - up @ down) @ moments.mean
        module.up.bias.copy_(kept)
