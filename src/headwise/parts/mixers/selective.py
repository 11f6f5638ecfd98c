"""Selective state spaces: channels with a small state each, whose pace the input sets."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn

from headwise.parts.mixers.recurrent import Recurrent, held
from headwise.parts.mixers.selective_scan import CHUNK, scan_flops, selective_scan
from headwise.parts.mixers.shortconv import ShortConv
from headwise.parts.state import State


class SelectiveSSM(Recurrent):
    """Mamba (Gu and Dao 2023, arXiv 2312.00752, section 3.4): x widens to `expand` times dim and
    splits into u and a gate z; u passes a short convolution, then h_t = exp(dt A) h_{t-1} +
    dt B_t u_t, y_t = C_t h_t + D u_t, with dt, B and C made from u; out = W_O (y * silu(z)).

    There are no heads: `heads` is taken for the common interface and must be positive. `channels`:
    width of u and z, where it is not expand * dim. `states`: numbers per channel. `conv`: width of
    the convolution. `rank`: of the matrix that makes dt, default dim / 16. dt starts between
    `dt_range`. Weights are named and shaped as in the Mamba of transformers, but for conv1d, which
    is conv here.

    State: `(batch, states, channels)` and the last `conv - 1` inputs of the convolution.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        causal: bool = True,
        states: int = 16,
        expand: int = 2,
        conv: int = 4,
        rank: int | None = None,
        dt_range: tuple[float, float] = (0.001, 0.1),
        bias: bool = False,
        chunk: int = CHUNK,
        channels: int | None = None,
    ) -> None:
        super().__init__(dim, heads, causal)
        self.channels = expand * dim if channels is None else channels
        self.states, self.chunk = states, chunk
        self.rank = math.ceil(dim / 16) if rank is None else rank
        self.in_proj = nn.Linear(dim, 2 * self.channels, bias=bias)
        self.conv = ShortConv(self.channels, conv)
        self.x_proj = nn.Linear(self.channels, self.rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(self.rank, self.channels)
        self.A_log = nn.Parameter(
            torch.arange(1, states + 1, dtype=torch.float32).log().repeat(self.channels, 1)
        )
        self.D = nn.Parameter(torch.ones(self.channels))
        self.out_proj = nn.Linear(self.channels, dim, bias=bias)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        self.dt_proj.bias = nn.Parameter(pace(self.channels, *dt_range))

    def mix(self, x: Tensor, mask: Tensor | None, at: Tensor, state: State) -> Tensor:
        u, z = self.in_proj(x).chunk(2, -1)
        u = self.conv(u, mask, state)
        dt, b, c = self.x_proj(u).split([self.rank, self.states, self.states], -1)
        dt = nn.functional.softplus(self.dt_proj(dt))
        if mask is not None:  # dt = 0: nothing decays, nothing is written
            dt = dt.masked_fill(~mask[..., None], 0.0)
        a = -self.A_log.to(torch.promote_types(x.dtype, torch.float32)).exp()
        memory = held(state, "memory")
        y, state["memory"] = selective_scan(u, dt, a, b, c, self.D, memory, self.chunk)
        out: Tensor = self.out_proj(y * nn.functional.silu(z))
        return out

    def state_bytes(self, n: int, itemsize: int = 4) -> int:
        memory = max(4, itemsize) * self.states * self.channels
        return memory + itemsize * self.conv.state_numbers()

    def flops(self, n: int) -> int:
        small = self.channels * (2 * self.rank + 2 * self.states)
        projections = 2 * n * (3 * self.dim * self.channels + small)
        return projections + scan_flops(n, self.channels, self.states)

    @classmethod
    def examples(cls, dim: int, heads: int, causal: bool) -> tuple[Self, ...]:
        kinds = cls(dim, heads, states=4), cls(dim, heads, conv=2, expand=1), cls(dim, channels=6)
        return kinds if causal else ()


def pace(count: int, least: float, most: float) -> Tensor:
    """Biases for which softplus gives paces spread evenly in logarithm over [least, most]."""
    dt = torch.empty(count).uniform_(math.log(least), math.log(most)).exp().clamp(min=1e-4)
    return dt + (-(-dt).expm1()).log()
