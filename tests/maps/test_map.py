"""Every statistic of AttentionMap, on every engine, against the dense matrix in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headwise.maps import AttentionMap, Causal, Full, Window

from .cases import Case, cases


def close(mine: Tensor, want: Tensor, bound: float, what: str) -> None:
    assert mine.dtype == torch.float32, what
    assert mine.shape == want.shape, what
    assert not mine.isnan().any(), f"{what} has NaN"
    torch.testing.assert_close(
        mine.double(), want, atol=bound, rtol=bound, msg=lambda m: f"{what}: {m}"
    )


def check(case: Case, engine: str, data: st.DataObject) -> None:
    m = AttentionMap(case.q, case.k, engine=engine, **case.options())
    log_p, lse = case.log_map()
    p = log_p.exp()
    batch, heads, n_q, n_k = case.shape
    tol = case.tolerance
    i, j = (torch.arange(n_q) + n_k - n_q)[:, None], torch.arange(n_k)[None, :]
    distance = (i - j).double()
    mass = p.sum(-1)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    close(m.logsumexp(), lse, tol, "logsumexp")
    v = case.v.float()
    wide = v.double().repeat_interleave(heads // v.shape[1], 1)
    close(m.apply(v), p @ wide, tol * 4 * max(1.0, float(v.abs().max())), "apply")
    r = torch.rand((batch, heads, n_q), generator=generator)
    r[..., ::3] = 0
    want = (p.transpose(-1, -2) @ r.double()[..., None])[..., 0]
    close(m.transpose_apply(r), want, tol * max(1, n_q), "transpose_apply")
    close(m.received(), p.sum(-2), tol * max(1, n_q), "received")
    entropy = torch.special.entr(p).sum(-1)
    slack = 1 + float(torch.where(p > 1e-30, log_p, 0.0).abs().max())
    close(m.entropy(), entropy, tol * 4 * slack, "entropy")
    close(m.max(), p.amax(-1), tol, "max")
    close(m.collision(), p.square().sum(-1), tol * 2, "collision")

    keys = torch.rand((batch, n_k), generator=generator) < 0.3
    close(m.mass_on(keys), (p * keys[:, None, None]).sum(-1), tol * 2, "mass_on")
    close(m.mass_on(keys[0]), (p * keys[0]).sum(-1), tol * 2, "mass_on (n_k,)")
    index = torch.randint(-1, n_k, (batch, n_q), generator=generator)
    at = index.clamp_min(0)[:, None, :, None].expand(-1, heads, -1, -1)
    want = p.gather(-1, at)[..., 0].masked_fill(index[:, None] < 0, 0.0)
    close(m.mass_at(index), want, tol, "mass_at")
    window = data.draw(st.integers(1, n_k + 1))
    close(m.mass_within(window), (p * (distance.abs() < window)).sum(-1), tol * 2, "mass_within")
    ids_q = torch.randint(-1, 5, (batch, n_q), generator=generator)
    ids_k = torch.randint(-1, 5, (batch, n_k), generator=generator)
    same = (ids_q[:, :, None] == ids_k[:, None, :]) & (ids_q >= 0)[:, :, None]
    close(m.mass_matching(ids_q, ids_k), (p * same[:, None]).sum(-1), tol * 2, "mass_matching")

    seen = mass > 1e-30  # with a learned sink a row may have next to nothing on its keys

    def where_seen(x: Tensor) -> Tensor:
        return torch.where(seen, x, torch.zeros((), dtype=x.dtype))

    mean = where_seen((p * distance).sum(-1) / mass)
    variance = where_seen((p * (distance - mean[..., None]).square()).sum(-1) / mass)
    spread = float(distance.abs().max())
    close(where_seen(m.mean_distance()), mean, tol * 2 * spread, "mean_distance")
    close(where_seen(m.distance_variance()), variance, tol * 4 * spread**2, "distance_variance")

    if engine != "algebra":
        s = m.summary()
        close(s.logsumexp, lse, tol, "summary.logsumexp")
        close(s.entropy, entropy, tol * 4 * slack, "summary.entropy")
        close(s.max, p.amax(-1), tol, "summary.max")
        close(where_seen(s.mean_distance), mean, tol * 2 * spread, "summary.mean_distance")
        bound = tol * 4 * spread**2 + 4e-3  # stated by MapSummary
        close(where_seen(s.distance_variance), variance, bound, "summary.distance_variance")
        close(s.received, p.sum(-2), tol * max(1, n_q), "summary.received")

    rows = torch.randint(0, n_q, (3,), generator=generator)
    close(m.rows(rows), p[:, :, rows], tol, "rows")
    piece = slice(n_q // 3, n_q), slice(0, n_k // 2 + 1)
    close(m.tile(*piece), p[:, :, piece[0], piece[1]], tol, "tile")
    close(m.dense(), p, tol, "dense")
    k = data.draw(st.integers(1, min(4, n_k)))
    values, index = m.top(k)
    close(values, p.topk(k, -1).values, tol, "top")
    assert (values[index < 0] == 0).all()
    picked = p.gather(-1, index.clamp_min(0)).masked_fill(index < 0, 0.0)
    close(picked.float(), values.double(), tol * 2, "top's keys hold top's weights")


def check_pair(case: Case, engine: str, same_support: bool) -> None:
    """inner, cosine and kl with another map whose keys are grouped in another way."""
    heads, kv = case.q.shape[1], case.k.shape[1]
    generator = torch.Generator().manual_seed(heads)
    shape = (case.q.shape[0], heads if kv < heads else 1, case.k.shape[2], 5)
    other = Case(
        torch.randn((*case.q.shape[:3], 5), generator=generator).to(case.q.dtype),
        torch.randn(shape, generator=generator).to(case.q.dtype),
        case.v,
        case.pattern if same_support else case.pattern & Window(9, 4),
        0.5,
        None,
        case.sinks,
        None,
    )
    a = AttentionMap(case.q, case.k, engine=engine, **case.options())
    b = AttentionMap(other.q, other.k, engine=engine, **other.options())
    log_p, log_o = case.log_map()[0], other.log_map()[0]
    p, o = log_p.exp(), log_o.exp()
    tol = case.tolerance * 4
    inner = (p * o).sum(-1)
    close(a.inner(b), inner, tol, "inner")
    norm = (p.square().sum(-1) * o.square().sum(-1)).sqrt().clamp_min(1e-300)
    held = (p.sum(-1) > 1e-12) & (o.sum(-1) > 1e-12)  # learned sinks may leave the keys nothing
    want = torch.where(held, inner / norm, 0.0)
    close(torch.where(held, a.cosine(b), 0.0), want, tol * 2, "cosine")
    gap = torch.where(p > 0, p * (log_p - log_o), torch.zeros_like(p)).sum(-1)
    mine = a.kl(b)
    assert torch.equal(mine.isinf(), gap.isinf())
    finite = torch.isfinite(gap)
    size = 1 + float(log_o.nan_to_num(0.0, 0.0, 0.0).abs().max())
    zero = torch.zeros(())
    close(
        torch.where(finite, mine, zero),
        torch.where(finite, gap, zero.double()),
        tol * size,
        "kl",
    )


@settings(max_examples=120)
@given(cases(), st.data())
def test_tiles_equal_dense(case: Case, data: st.DataObject) -> None:
    check(case, "tiles", data)


@settings(max_examples=120)
@given(cases(patterns="band"), st.data())
def test_algebra_equals_dense(case: Case, data: st.DataObject) -> None:
    check(case, "algebra", data)


@settings(max_examples=60)
@given(cases(), st.data())
def test_automatic_choice_equals_dense(case: Case, data: st.DataObject) -> None:
    check(case, "auto", data)


@settings(max_examples=40)
@given(cases(dtypes=(torch.float32,)), st.data())
def test_dense_engine_equals_dense(case: Case, data: st.DataObject) -> None:
    check(case, "dense", data)


@settings(max_examples=60)
@given(cases(dtypes=(torch.float32, torch.float64), sizes=(1.0,)), st.booleans())
def test_pairs_by_tiles(case: Case, same_support: bool) -> None:
    check_pair(case, "tiles", same_support)
    check_pair(case, "auto", same_support)


@settings(max_examples=60)
@given(cases(dtypes=(torch.float32, torch.float64), patterns="band", sizes=(1.0,)))
def test_pairs_by_algebra(case: Case) -> None:
    check_pair(case, "algebra", same_support=True)


def test_longer_than_every_tile() -> None:
    """2,100 keys: several tiles of every engine, ragged ends, runs of the summary."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, 4, 1111, 8, generator=generator) * 3
    k = torch.randn(1, 2, 2100, 8, generator=generator) * 3
    for pattern in (Causal(), Full(), Window(700)):
        case = Case(q, k, k, pattern, 0.35, None, None, None)
        p = case.map()
        for engine in ("tiles", "auto"):
            m = AttentionMap(q, k, pattern, 0.35, engine=engine)
            close(m.entropy(), torch.special.entr(p).sum(-1), 2e-4, "entropy")
            close(m.received(), p.sum(-2), 2e-3, "received")
            s = m.summary()
            i, j = torch.arange(1111) + 989, torch.arange(2100)
            distance = (i[:, None] - j).double()
            mean = (p * distance).sum(-1)
            variance = (p * (distance - mean[..., None]).square()).sum(-1)
            close(s.mean_distance, mean, 2e-3, "mean_distance")
            close(s.distance_variance, variance, 4e-3, "summary.distance_variance")
            close(m.distance_variance(), variance, 1e-3, "distance_variance")


def test_sharp_far_rows_have_no_spurious_variance() -> None:
    """A head that looks at one far key has variance 0, not the rounding of 30,000 squared."""
    n = 30_000
    k = torch.zeros(1, 1, n, 4)
    k[0, 0, 0, 0] = 40.0
    q = torch.ones(1, 1, 8, 4)
    m = AttentionMap(q, k, Causal(), 1.0)
    assert float(m.distance_variance().max()) < 1e-2
    torch.testing.assert_close(m.mean_distance()[0, 0, -1], torch.tensor(float(n - 1)))
    forced = AttentionMap(q, k, Causal(), 1.0, engine="algebra")
    assert float(forced.distance_variance().max()) < 1e-2


def test_rows_that_see_nothing_are_zero() -> None:
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 3, 4)
    m = AttentionMap(q, k, Causal())  # the first two queries stand before the first key
    assert (m.logsumexp()[:, :, :2] == float("-inf")).all()
    for value in (m.entropy(), m.max(), m.mean_distance(), m.collision(), m.mass_within(2)):
        assert (value[:, :, :2] == 0).all()
    assert (m.dense()[:, :, :2] == 0).all()


def test_dense_refuses_above_its_limit() -> None:
    q = torch.empty(1, 16, 8192, 2)
    with pytest.raises(ValueError, match="1,073,741,824 numbers"):
        AttentionMap(q, q, Causal(), lse=torch.zeros(1, 16, 8192)).dense()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: AttentionMap(m.scores.q, m.scores.k, engine="quick"), "there are auto"),
        (lambda m: AttentionMap(m.scores.q, m.scores.k, softcap=1.0, engine="algebra"), "soft"),
        (lambda m: AttentionMap(m.scores.q, m.scores.k, lse=torch.zeros(2)), "lse must be"),
        (lambda m: m.transpose_apply(-torch.ones(1, 2, 6)), "r >= 0"),
        (lambda m: m.mass_on(torch.ones(6)), "boolean"),
        (lambda m: m.mass_at(torch.zeros(6)), "integers"),
        (lambda m: m.mass_at(torch.full((6,), 6)), "there are 6"),
        (lambda m: m.mass_matching(torch.zeros(6), torch.zeros(6)), "integers"),
        (lambda m: m.top(7), "there are 6 keys"),
        (lambda m: m.apply(torch.zeros(1, 2, 5, 4)), "v must be"),
        (lambda m: m.inner(AttentionMap(torch.zeros(1, 2, 4, 3), torch.zeros(1, 2, 4, 3))), "same"),
    ],
)
def test_bad_input_is_one_clear_error(call: object, words: str) -> None:
    m = AttentionMap(torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4))
    with pytest.raises(ValueError, match=words):
        call(m)  # type: ignore[operator]
