"""The same answers on a CUDA device; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from headwise.maps import AttentionMap, Causal, Full, Padding, Pattern, Window, attend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]

PATTERNS = [Causal(), Full(), Window(100), Causal() & Padding(torch.tensor([700, 333]), n=1027)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [None, "tiled", "dense"])
def test_attend_equals_float64(pattern: Pattern, dtype: torch.dtype, backend: str | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 1027, 64, generator=generator).to(dtype) for h in (6, 2, 2))
    want, want_lse = attend(q.double(), k.double(), v.double(), pattern, backend="dense")
    out, lse = attend(q.cuda(), k.cuda(), v.cuda(), pattern, backend=backend)
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(out.cpu().double(), want, atol=bound, rtol=0)
    torch.testing.assert_close(lse.cpu().double(), want_lse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_summary_equals_float64(pattern: Pattern, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, h, 1027, 64, generator=generator).to(dtype) for h in (6, 2))
    want = AttentionMap(q.double(), k.double(), pattern, engine="dense")
    mine = AttentionMap(q.cuda(), k.cuda(), pattern).summary()
    for name in ("logsumexp", "entropy", "max", "received", "mean_distance"):
        found = getattr(mine, name).cpu()
        torch.testing.assert_close(found, getattr(want, name)(), atol=2e-3, rtol=1e-3, msg=name)
