"""The band near the diagonal and the counts of visible keys, against dense maps and masks."""

import pytest
import torch
from torch import Tensor

from headwise.instruments.band import NEAR, WITHIN, band
from headwise.instruments.visibility import looks_ahead, visible
from headwise.maps import (
    Alibi,
    AttentionMap,
    Causal,
    Documents,
    Full,
    KeyMask,
    Mask,
    Padding,
    Pattern,
    Sinks,
    Window,
)

N = 150
random = torch.Generator().manual_seed(0)
PATTERNS: dict[str, Pattern] = {
    "causal": Causal(),
    "full": Full(),
    "window": Window(20),
    "two-sided window": Window(10, 4),
    "causal, padded right": Causal() & Padding(torch.tensor([N, N - 30])),
    "causal, padded left": Causal() & Padding(torch.tensor([N - 9, N]), left=True, n=N),
    "keys": KeyMask(torch.rand((2, N), generator=random) > 0.3),
    "window of keys": Window(30, 2) & KeyMask(torch.rand((2, N), generator=random) > 0.3),
    "documents": Documents(torch.arange(N) // 40) & Causal(),
    "window or sinks": Causal() & (Window(12) | Sinks(3)),
    "any mask": Mask(torch.rand((2, 1, N, N), generator=random) > 0.5),
}


def made(pattern: Pattern, n: int = N, **more: object) -> AttentionMap:
    shapes = torch.Generator().manual_seed(1)
    q = torch.randn((2, 6, n, 8), generator=shapes) * 2
    k = torch.randn((2, 3, n, 8), generator=shapes)
    return AttentionMap(q, k, pattern, **more)  # type: ignore[arg-type]


def diagonal(dense: Tensor, offset: int) -> Tensor:
    """dense[..., i, i - offset], zero where there is no such key."""
    n = dense.shape[-1]
    out = torch.zeros(dense.shape[:-1])
    rows = torch.tensor([i for i in range(n) if 0 <= i - offset < n], dtype=torch.long)
    out[..., rows] = dense[..., rows, rows - offset]
    return out


@pytest.mark.parametrize("name", PATTERNS)
def test_band_equals_dense(name: str) -> None:
    pattern = PATTERNS[name]
    of = made(pattern)
    dense = of.dense()
    found = band(of, looks_ahead(pattern))
    for offset in range(1 - NEAR, NEAR):
        assert torch.allclose(found.at(offset), diagonal(dense, offset), atol=1e-5), offset
    distance = (torch.arange(N)[:, None] - torch.arange(N)).abs()
    assert torch.allclose(found.within, (dense * (distance < WITHIN)).sum(-1), atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 127, 130])
@pytest.mark.parametrize("ahead", [False, True])
def test_band_at_any_length(n: int, ahead: bool) -> None:
    of = made(Full() if ahead else Causal(), n)
    found = band(of, ahead)
    for offset in (0, 1, NEAR - 1):
        assert torch.allclose(found.at(offset), diagonal(of.dense(), offset), atol=1e-5)
    assert found.offsets.shape[-1] == (2 * NEAR - 1 if ahead else NEAR)


def test_band_with_everything_that_shapes_a_map() -> None:
    bias = torch.randn((1, 6, N, N), generator=torch.Generator().manual_seed(2))
    for more in (
        {"bias": bias},
        {"bias": Alibi((0.1, 0.2, 0.3, 0.4, 0.5, 0.6))},
        {"softcap": 2.0},
        {"sinks": torch.randn(6)},
        {"scale": 0.1},
    ):
        of = made(Causal(), **more)
        found, dense = band(of, False), of.dense()
        for offset in range(NEAR):
            assert torch.allclose(found.at(offset), diagonal(dense, offset), atol=1e-5), more


@pytest.mark.parametrize("name", PATTERNS)
def test_counts_equal_the_mask(name: str) -> None:
    """Rows that are not real are not counted; keys that nobody sees count zero."""
    pattern = PATTERNS[name]
    of = made(pattern)
    rows = torch.rand((2, N), generator=torch.Generator().manual_seed(3)) > 0.2
    mask = pattern.mask(N, N, 2).expand(2, 1, N, N)
    for real in (None, rows):
        counted = visible(of, real)
        seen = mask if real is None else mask & real[:, None, :, None]
        assert torch.equal(counted.queries.expand(2, 1, N), seen.sum(2).float())
        assert torch.equal(counted.keys.expand(2, 1, N), mask.sum(3).float())


@pytest.mark.parametrize("name", PATTERNS)
def test_looking_ahead_is_never_missed(name: str) -> None:
    pattern = PATTERNS[name]
    mask = pattern.mask(N, N, 2)
    really = bool(torch.triu(mask, 1).any())
    assert looks_ahead(pattern) or not really
    causal = name.startswith("causal") or name in ("window", "documents", "window or sinks")
    assert looks_ahead(pattern) == (not causal)
