"""What probes read: activations at chosen positions, collected while batches stream through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.instruments.examples import Examples
from headwise.instruments.metrics import Inputs, last_positions
from headwise.instruments.readout import output_stack
from headwise.instruments.run import evaluating
from headwise.models import ModelView
from headwise.models.sites import Site, recording, sites_of

__all__ = ["Features", "Position", "collect_features", "probed_sites"]

Position = str | int | Tensor
"""last, first, mean, each, all, a number, or `(examples,)` numbers."""

_NAMED = ("last", "first", "mean", "each", "all")


@dataclass(eq=False)
class Features:
    """values: site -> `(rows, ..., d)` float32 on the CPU: `(rows, heads, d)` at sites that have
    heads, `(examples, n, d)` where positions stay ("all"). example `(rows,)`: where a row is from;
    position `(rows,)`: -1 where it is none. token `(rows,)`: its id, -1 where there is none. real
    `(examples, n)`: which positions count, for "all"."""

    values: dict[Site, Tensor]
    example: Tensor
    position: Tensor
    token: Tensor
    real: Tensor | None = None

    @property
    def bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.values.values())


def probed_sites(
    view: ModelView, kind: str, layers: Sequence[int] | None, stack: str | None
) -> list[Site]:
    """The sites of a kind in the stack that answers (or in `stack`), of some layers.

    Raises ValueError where there are none.
    """
    chosen = stack or output_stack(view)
    named = chosen if len(view.stacks) > 1 else None
    if chosen not in view.stacks:
        raise ValueError(f"stack={stack!r}: the model has {', '.join(view.stacks)}")
    found = [s for s in sites_of(view, kind) if s.stack == named and s.attention == "self"]
    if layers is not None:
        found = [s for s in found if s.layer in set(layers)]
    if not found:
        raise ValueError(f"no site {kind!r} in layers {layers} of {chosen}")
    return found


def collect_features(
    view: ModelView,
    batches: Sequence[Examples],
    sites: Sequence[Site],
    position: Position = "last",
    most: int = 4 << 30,
) -> Features:
    """Run the batches, keep what stands at the sites.

    position: "last" (real) token, "first", "mean" over real tokens, "each" (every real token is a
    row), "all" (they stay together), a number (from the end where negative), or one for each
    example. Held are rows x d x 4 bytes for each site, nothing else outlasts a batch.

    Raises ValueError before the second batch where that would be more than `most` bytes, and for
    positions that are not there.
    """
    if isinstance(position, str) and position not in _NAMED:
        raise ValueError(f"position={position!r}: expected {', '.join(_NAMED)}, or numbers")
    kept: dict[Site, list[Tensor]] = {site: [] for site in sites}
    told: dict[str, list[Tensor]] = {"example": [], "position": [], "token": [], "real": []}
    total = batches[-1].rows.stop
    with evaluating(view.model), torch.no_grad():
        for number, batch in enumerate(batches):
            with recording(view, sites) as seen:
                view.model(**batch.inputs)
            n = max(seen[site].shape[1] for site in sites)
            real = _real(batch.inputs, len(batch), n)
            for site in sites:
                value = seen[site].float()
                kept[site].append(_picked(value, real, position, batch).cpu())
            for name, value in _told(batch, real, position).items():
                told[name].append(value.cpu())
            if number == 0:
                held = sum(k[0].numel() * 4 for k in kept.values()) * total // len(batch)
                if held > most:
                    raise ValueError(
                        f"activations of {total} examples at {len(sites)} sites would take "
                        f"{held / 2**30:.1f} GiB, more than {most / 2**30:.1f}: give layers= (some "
                        "at a time), fewer examples, or memory="
                    )
    if position == "all" and len({tuple(t.shape[1:]) for t in told["real"]}) > 1:
        _pad(kept, told)
    return Features(
        {site: torch.cat(values) for site, values in kept.items()},
        torch.cat(told["example"]),
        torch.cat(told["position"]),
        torch.cat(told["token"]),
        torch.cat(told["real"]) if position == "all" else None,
    )


def _real(inputs: Inputs, batch: int, n: int) -> Tensor:
    speaks = "decoder_input_ids" in inputs
    mask = inputs.get("decoder_attention_mask" if speaks else "attention_mask")
    if isinstance(mask, Tensor) and mask.shape == (batch, n):
        return mask.bool().cpu()
    return torch.ones(batch, n, dtype=torch.bool)


def _picked(value: Tensor, real: Tensor, position: Position, batch: Examples) -> Tensor:
    real = real.to(value.device)
    if position == "all":
        return value
    if position == "each":
        return value[real]
    if position == "mean":
        shares = real / real.sum(1, keepdim=True).clamp_min(1)
        return torch.einsum("bn...,bn->b...", value, shares.to(value.dtype))
    at = _places(real, position, batch)
    return value[torch.arange(len(value), device=value.device), at.to(value.device)]


def _places(real: Tensor, position: Position, batch: Examples) -> Tensor:
    b, n = real.shape
    last = last_positions({"attention_mask": real}, n, b).to(real.device)
    if position == "last":
        return last
    if position == "first":
        return real.int().argmax(1)
    asked = torch.as_tensor(position, device=real.device)
    asked = asked[batch.rows] if asked.dim() else asked.expand(b)
    at = torch.where(asked < 0, last + 1 + asked, asked)
    if asked.shape != (b,) or bool(((at < 0) | (at >= n)).any()):
        raise ValueError(
            f"position {position}: expected numbers below {n}, one for all or (examples,)"
        )
    return at


def _told(batch: Examples, real: Tensor, position: Position) -> dict[str, Tensor]:
    b, n = real.shape
    examples = torch.arange(batch.rows.start, batch.rows.stop)
    ids = batch.inputs.get("decoder_input_ids", batch.inputs.get("input_ids"))
    tokens = torch.full((b, n), -1)
    if isinstance(ids, Tensor) and ids.shape == (b, n):
        tokens = ids.cpu()
    if position == "each":
        rows = examples[:, None].expand(b, n)[real]
        return {
            "example": rows,
            "position": torch.arange(n).expand(b, n)[real],
            "token": tokens[real],
        }
    if position in ("mean", "all"):
        none = torch.full((b,), -1)
        return {"example": examples, "position": none, "token": none, "real": real}
    at = _places(real, position, batch)
    return {"example": examples, "position": at, "token": tokens[torch.arange(b), at]}


def _pad(kept: dict[Site, list[Tensor]], told: dict[str, list[Tensor]]) -> None:
    """Examples of several lengths, brought to the longest with positions that do not count."""
    longest = max(value.shape[1] for value in told["real"])

    def longer(value: Tensor) -> Tensor:
        more = value.new_zeros(len(value), longest - value.shape[1], *value.shape[2:])
        return torch.cat([value, more], 1)

    for values in (*kept.values(), told["real"]):
        values[:] = [longer(value) for value in values]
