"""Random attention problems and their dense answer in float64, written out in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from headwise.maps import (
    Alibi,
    Causal,
    Dilated,
    Documents,
    Full,
    KeyMask,
    Mask,
    Padding,
    Pattern,
    Predicate,
    Sinks,
    Window,
)

# one, two, primes, powers of two, and more than one tile of every engine
LENGTHS = (1, 2, 3, 5, 7, 8, 16, 31, 64, 67, 97, 128, 131, 257, 300)


@dataclass(repr=False)
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Pattern
    scale: float
    bias: Tensor | Alibi | None
    sinks: Tensor | None
    softcap: float | None

    def __repr__(self) -> str:
        size = "biased" if isinstance(self.bias, Tensor) else self.bias
        return (
            f"Case(q={tuple(self.q.shape)}, k={tuple(self.k.shape)}, v={tuple(self.v.shape)}, "
            f"{self.q.dtype}, {self.pattern!r}, scale={self.scale:.3g}, bias={size}, "
            f"sinks={self.sinks is not None}, softcap={self.softcap})"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def options(self) -> dict[str, object]:
        return {
            "pattern": self.pattern,
            "scale": self.scale,
            "bias": self.bias,
            "sinks": self.sinks,
            "softcap": self.softcap,
        }

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.q.shape[0], self.q.shape[1], self.q.shape[2], self.k.shape[2]

    def log_map(self) -> tuple[Tensor, Tensor]:
        """(log P, lse) in float64."""
        batch, heads, n_q, n_k = self.shape
        k = self.k.double().repeat_interleave(heads // self.k.shape[1], 1)
        s = self.scale * self.q.double() @ k.transpose(-1, -2)
        if self.softcap is not None:
            s = self.softcap * torch.tanh(s / self.softcap)
        i, j = torch.arange(n_q) + n_k - n_q, torch.arange(n_k)
        if isinstance(self.bias, Alibi):
            s = (
                s
                - torch.tensor(self.bias.slopes, dtype=torch.float64)[:, None, None]
                * (i[:, None] - j).abs()
            )
        elif self.bias is not None:
            s = s + self.bias.double()
        s = s.masked_fill(~self.pattern.mask(n_q, n_k, batch, heads), float("-inf"))
        lse = s.logsumexp(-1)
        if self.sinks is not None:
            lse = torch.logaddexp(lse, self.sinks.double()[None, :, None])
        return s - lse.masked_fill(lse == float("-inf"), 0.0)[..., None], lse

    def map(self) -> Tensor:
        return self.log_map()[0].exp()

    @property
    def tolerance(self) -> float:
        """Rounding of one logit in the compute type, which every weight inherits relatively."""
        k = self.k.double().repeat_interleave(self.q.shape[1] // self.k.shape[1], 1)
        size = self.scale * float((self.q.double().abs() @ k.abs().transpose(-1, -2)).max())
        if isinstance(self.bias, Alibi):
            # folded into the product as slope * j - slope * i: rounding is of these
            size += 2 * max(self.bias.slopes) * max(self.shape[2:])
        eps = 1e-15 if self.q.dtype == torch.float64 else 2e-7
        return 8 * eps * max(size, 4.0) + 4e-7  # results are float32


def draw_pattern(
    draw: st.DrawFn, batch: int, heads: int, n_q: int, n_k: int, depth: int = 2
) -> Pattern:
    if depth and draw(st.booleans()):
        kind = draw(st.sampled_from(["and", "or", "not"]))
        a = draw_pattern(draw, batch, heads, n_q, n_k, depth - 1)
        if kind == "not":
            return ~a
        b = draw_pattern(draw, batch, heads, n_q, n_k, depth - 1)
        return a & b if kind == "and" else a | b
    kind = draw(st.sampled_from(PATTERNS))
    if kind == "window":
        left = draw(st.one_of(st.none(), st.integers(0, n_k + 2)))
        return Window(left, draw(st.one_of(st.none(), st.integers(0, n_k))))
    if kind == "sinks":
        return Sinks(draw(st.integers(0, n_k + 1)))
    if kind == "dilated":
        return Dilated(draw(st.integers(1, 5)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    rows = draw(st.sampled_from([1, batch]))
    if kind == "documents":
        ids = torch.randint(0, 4, (rows, n_k), generator=generator)
        if draw(st.booleans()):
            ids = ids.sort(-1).values
        return Documents(ids[0] if rows == 1 else ids) if n_q <= n_k else Full()
    if kind == "padding":
        lengths = torch.randint(0, n_k + 1, (rows,), generator=generator)
        return Padding(lengths, left=draw(st.booleans()), n=n_k)
    if kind == "keymask":
        return KeyMask(torch.rand((rows, n_k), generator=generator) < 0.7)
    if kind == "mask":
        shape = (rows, draw(st.sampled_from([1, heads])), n_q, n_k)
        return Mask(torch.rand(shape, generator=generator) < 0.6)
    if kind == "predicate":
        return Predicate(lambda b, h, i, j: (i + 2 * j + h + b) % 3 != 0)
    return {"full": Full(), "causal": Causal()}[kind]


PATTERNS = [
    "full",
    "causal",
    "window",
    "sinks",
    "dilated",
    "documents",
    "padding",
    "keymask",
    "mask",
    "predicate",
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    shaped: bool = True,
    patterns: str = "any",
    sizes: tuple[float, ...] = (1.0, 1.0, 4.0, 100.0),
) -> Case:
    """`patterns`: "any", or "band" for what the fused kernels know."""
    batch, kv = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    group, d = draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 8, 13]))
    n_k = draw(st.sampled_from(LENGTHS))
    n_q = draw(st.one_of(st.just(n_k), st.sampled_from(LENGTHS)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    dtype = draw(st.sampled_from(dtypes))
    size = draw(st.sampled_from(sizes)) ** 0.5  # 100: logits reach 1e4
    if dtype == torch.float16:
        size = min(size, 4.0)
    q, k = normal(batch, kv * group, n_q, d) * 3 * size, normal(batch, kv, n_k, d) * 3 * size
    v = normal(batch, kv, n_k, draw(st.sampled_from([d, 1, d + 3])))
    bias: Tensor | Alibi | None = None
    softcap = None
    if patterns == "band":
        pattern: Pattern = draw(st.sampled_from([Full(), Causal(), None])) or Window(
            draw(st.one_of(st.none(), st.integers(0, 40))),
            draw(st.one_of(st.none(), st.integers(0, 40))),
        )
        if draw(st.booleans()):
            lengths = torch.randint(0, n_k + 1, (batch,), generator=generator)
            pattern = pattern & Padding(lengths, left=draw(st.booleans()), n=n_k)
        if pattern == Causal() and draw(st.booleans()):
            bias = Alibi(tuple(2.0 ** -(h + 1) for h in range(kv * group)))
    else:
        pattern = draw_pattern(draw, batch, kv * group, n_q, n_k)
        if shaped:
            table = normal(draw(st.sampled_from([1, batch])), kv * group, 1, n_k)
            bias = draw(
                st.sampled_from(
                    [None, None, table, Alibi(tuple(0.1 * h for h in range(kv * group)))]
                )
            )
            softcap = draw(st.sampled_from([None, None, 5.0]))
    sinks = normal(kv * group) if draw(st.booleans()) else None
    scale = draw(st.sampled_from([d**-0.5, 0.3, 1.0]))
    return Case(q.to(dtype), k.to(dtype), v.to(dtype), pattern, scale, bias, sinks, softcap)
