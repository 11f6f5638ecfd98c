"""The quantised store against one that holds every entry by itself, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headwise.compress.cache.quantised import Coding, Quantised
from headwise.compress.cache.store import Plain

D, DV = 8, 6


class Twin:
    """Rows of entries; each is [key, value] as it would be read. `coded`: how many are codes."""

    def __init__(self, coding: Coding, keys: Tensor, values: Tensor) -> None:
        self.coding, self.coded = coding, 0
        self.rows = [
            [[k.double(), v.double()] for k, v in zip(*row, strict=True)]
            for row in zip(keys, values, strict=True)
        ]

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.settle()
        for row, ks, vs in zip(self.rows, keys, values, strict=True):
            row += [[k.double(), v.double()] for k, v in zip(ks, vs, strict=True)]

    def settle(self) -> None:
        group, held = self.coding.group, len(self.rows[0])
        while held - self.coded - self.coding.residual >= group:
            for row in self.rows:
                self.code(row[self.coded : self.coded + group], self.coding.outliers)
            self.coded += group

    def code(self, entries: list, outliers: int = 0) -> None:
        """Code some entries of one row as one group, in place, but for those that stand out."""
        if not entries:
            return
        keys = torch.stack([k for k, _ in entries])
        far = [float(((k - keys.mean(0)) ** 2).sum()) for k in keys]
        out = sorted(range(len(entries)), key=lambda i: -far[i])[:outliers]
        coded = [entry for i, entry in enumerate(entries) if i not in out]
        if self.coding.keys == "channel":
            for channel in range(D):
                line = torch.stack([k[channel] for k, _ in coded])
                for entry, new in zip(coded, cut(line, self.coding.key_bits), strict=True):
                    entry[0] = entry[0].clone()
                    entry[0][channel] = new
        else:
            for entry in coded:
                entry[0] = by_parts(entry[0], self.coding.group, self.coding.key_bits)
        for entry in coded:
            entry[1] = by_parts(entry[1], self.coding.group, self.coding.value_bits)

    def select(self, indices: Tensor) -> None:
        new = min(sum(int(i) >= self.coded for i in row) for row in indices)
        old = indices.shape[1] - new
        kept = []
        for row, at in zip(self.rows, indices.tolist(), strict=True):
            late = [row[i] for i in at[:old] if i >= self.coded]
            self.code(late)
            kept.append([row[i] for i in at])
        self.rows, self.coded = kept, old
        self.settle()

    def whole(self) -> tuple[Tensor, Tensor]:
        keys = torch.stack([torch.stack([k for k, _ in row]) for row in self.rows])
        return keys, torch.stack([torch.stack([v for _, v in row]) for row in self.rows])


def cut(line: Tensor, bits: int) -> Tensor:
    low, high = line.min(), line.max()
    scale = (high - low) / (2**bits - 1)
    return low + torch.round((line - low) / scale) * scale if scale > 0 else line


def by_parts(line: Tensor, group: int, bits: int) -> Tensor:
    return torch.cat([cut(part, bits) for part in line.split(group)])


def same(store: Quantised, twin: Twin) -> None:
    for got, want in zip(store.whole(), twin.whole(), strict=True):
        # one code of a thousand may fall the other way: float32 against float64
        assert ((got.double() - want).abs() < 1e-5).float().mean() > 0.995
    assert store.coded == twin.coded


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([(2, 4), (4, 2), (8, 3)]),
    st.sampled_from([(4, 0, 0), (4, 3, 1), (3, 5, 0)]),
    st.sampled_from(["channel", "token"]),
)
def test_as_the_twin_through_appends_and_evictions(
    seed: int, bits: tuple[int, int], sizes: tuple[int, int, int], keys: str
) -> None:
    made = torch.Generator().manual_seed(seed)
    group, residual, outliers = sizes
    coding = Coding(*bits, group, residual, outliers, keys=keys, scales=torch.float32)

    def entries(n: int) -> tuple[Tensor, Tensor]:
        both = torch.randn(2, 3, n, D, generator=made)
        return both[0], both[1, ..., :DV]

    first = entries(11)
    store, twin = coding.make(*first), Twin(coding, *first)
    for _ in range(5):
        more = entries(int(torch.randint(1, 9, (), generator=made)))
        store.append(*more)
        twin.append(*more)
        same(store, twin)
        keep = int(torch.randint(3, store.length + 1, (), generator=made))
        at = torch.rand(3, store.length, generator=made).argsort(1)[:, :keep].sort(1).values
        store = store.select(at)
        twin.select(at)
        same(store, twin)


def filled(coding: Coding, rows: int = 3, n: int = 40, seed: int = 0) -> Quantised:
    torch.manual_seed(seed)
    store = coding.make(torch.randn(rows, n, D), torch.randn(rows, n, DV))
    store.settle()
    return store


CODINGS = [
    Coding(4, 2, 8, 8),
    Coding(2, 2, 8, 4, outliers=2),
    Coding(4, 4, 8, 8, keys="token"),
    Coding(3, 8, 4, 6, rotated=True),
]


@pytest.mark.parametrize("coding", CODINGS)
def test_what_is_kept_is_kept_to_the_bit(coding: Coding) -> None:
    """Every entry that was in codes reads the same after each of several evictions."""
    store = filled(coding)
    keys, values = store.whole()
    at = torch.stack([torch.randperm(store.coded)[:20].sort().values for _ in range(3)])
    newest = torch.arange(store.coded, 40).expand(3, -1)
    at = torch.cat([at, newest], 1)
    each = torch.arange(3)[:, None]
    for cutting in (slice(None), slice(1, None), slice(5, None, 2)):
        at = at[:, cutting]
        kept = store.select(at)
        for got, was in zip(kept.whole(), (keys, values), strict=True):
            assert torch.equal(got[:, : kept.coded], was[each, at][:, : kept.coded])
        # selecting from what was selected is selecting from the whole
        two = kept.select(torch.arange(1, kept.length, 2).expand(3, -1))
        part = was[each, at][:, 1::2]
        assert torch.equal(two.whole()[1][:, : two.coded], part[:, : two.coded])
    assert torch.equal(store.whole()[0], keys)  # the first store was left alone


@pytest.mark.parametrize("coding", CODINGS)
def test_tiles_are_the_whole_and_never_large(
    coding: Coding, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(coding)
    keys, values = store.whole()
    monkeypatch.setattr("headwise.compress.cache.quantised.TILE", 3 * 8 * 8)
    tiles = list(store.tiles())
    assert max(k.shape[1] for k, _ in tiles[:-1]) <= 8
    assert torch.equal(store.turned_back(torch.cat([k for k, _ in tiles], 1)), keys)
    assert torch.equal(store.turned_back(torch.cat([v for _, v in tiles], 1)), values)


def test_the_newest_are_exact_and_the_rest_is_near() -> None:
    torch.manual_seed(1)
    keys, values = torch.randn(2, 50, D), torch.randn(2, 50, DV)
    for bits, error in ((8, 0.02), (4, 0.25), (2, 1.2)):
        store = Coding(bits, bits, 16, 10).make(keys, values)
        assert store.coded == 0
        store.settle()
        assert store.coded == 32
        got = store.whole()
        assert torch.equal(got[0][:, 32:], keys[:, 32:])
        assert torch.equal(got[1][:, 32:], values[:, 32:])
        assert 0 < (got[0] - keys).abs().max() < error
        assert 0 < (got[1] - values).abs().max() < error


def test_tokens_that_stand_out_are_exact_and_spare_the_others() -> None:
    torch.manual_seed(2)
    keys, values = torch.randn(2, 32, D), torch.randn(2, 32, DV)
    keys[:, 5] *= 40
    keys[:, 20] *= 40
    stores = [Coding(2, 2, 16, 0, outliers).make(keys, values) for outliers in (0, 1)]
    for store in stores:
        store.settle()
    without, kept = ((store.whole()[0] - keys).abs() for store in stores)
    assert kept[:, [5, 20]].max() == 0
    others = [i for i in range(32) if i not in (5, 20)]
    assert kept[:, others].mean() < 0.2 * without[:, others].mean()


def test_worth_names_the_tokens_that_stay_exact() -> None:
    torch.manual_seed(3)
    keys, values = torch.randn(2, 32, D), torch.randn(2, 32, DV)
    worth = torch.zeros(2, 32)
    worth[0, [3, 30]] = worth[1, [9, 16]] = 1.0
    store = Coding(2, 2, 16, 0, outliers=1).make(keys, values)
    store.settle(worth)
    exact = (store.whole()[0] == keys).all(-1) & (store.whole()[1] == values).all(-1)
    assert torch.equal(exact, worth > 0)


def test_an_entry_that_fills_a_row_up_does_not_take_an_outlier_along() -> None:
    torch.manual_seed(5)
    keys, values = torch.randn(2, 16, D), torch.randn(2, 16, DV)
    keys[:, 0] *= 50
    store = Coding(2, 2, 16, 0, outliers=1).make(keys, values)
    store.settle()
    kept = store.select(torch.tensor([[0, 0, 0, 4, 7], [0, 1, 2, 3, 4]]))
    assert torch.equal(kept.whole()[0][0, 2], keys[0, 0])
    assert torch.equal(kept.whole()[0][1, 0], keys[1, 0])


def test_scores_and_outputs_stay_under_the_rotation() -> None:
    torch.manual_seed(4)
    keys, values, queries = torch.randn(2, 24, D), torch.randn(2, 24, D), torch.randn(2, 5, D)
    store = Coding(8, 8, 8, 0, rotated=True).make(keys, values)
    (k, v), *more = store.tiles()
    assert not more
    weights = torch.softmax(store.turned(queries) @ k.mT, -1)
    assert torch.allclose(weights, torch.softmax(queries @ keys.mT, -1), atol=1e-5)
    want = torch.softmax(queries @ keys.mT, -1) @ values
    assert torch.allclose(store.turned_back(weights @ v), want, atol=1e-5)


@pytest.mark.parametrize("coding", CODINGS)
def test_rows_in_another_order_and_twice(coding: Coding) -> None:
    store = filled(coding)
    order = torch.tensor([2, 0, 0, 1])
    before = store.whole()
    moved = store.rows(order)
    moved.append(torch.randn(4, 20, D), torch.randn(4, 20, DV))
    moved.settle()
    for got, was in zip(moved.whole(), before, strict=True):
        assert torch.equal(got[:, : store.coded], was[order][:, : store.coded])
    assert torch.equal(store.whole()[0], before[0])


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("length", [0, 13, 24, 35, 40, 99])
def test_crop_and_go_on(coding: Coding, length: int) -> None:
    store = filled(coding)
    before = store.whole()
    store.crop(length)
    left = min(length, 40)
    assert store.length == left
    more = torch.randn(3, 21, D), torch.randn(3, 21, DV)
    store.append(*more)
    coded = store.coded
    store.settle()
    for got, was, new in zip(store.whole(), before, more, strict=True):
        assert torch.equal(got[:, : min(left, coded)], was[:, : min(left, coded)])
        assert torch.allclose(got[:, left:], new, atol=2.5)
    assert store.length == left + 21


@pytest.mark.parametrize("coding", CODINGS)
def test_joined_rows(coding: Coding) -> None:
    one, other = filled(coding, 2, 40, 1), filled(coding, 3, 48, 2)
    other = other.select(torch.arange(4, 44).expand(3, -1))
    both = Quantised.join([one, other])
    assert both is not None
    assert both.length == 40
    coded = min(one.coded, other.coded)
    for got, first, second in zip(both.whole(), one.whole(), other.whole(), strict=True):
        assert torch.equal(got[:2, :coded], first[:, :coded])
        assert torch.equal(got[2:, :coded], second[:, :coded])
        newest = slice(both.coded, None)
        assert torch.allclose(got[:2, newest], first[:, newest], atol=1e-5)
    assert Quantised.join([one, filled(Coding(8), 2, 40)]) is None
    assert Quantised.join([one, filled(coding, 2, 39)]) is None
    plain = Plain.make(torch.randn(1, 40, D), torch.randn(1, 40, DV))
    assert Quantised.join([one, plain]) is None


def test_bytes_are_those_of_the_tensors_and_fall_with_what_goes() -> None:
    rows, n, d = 4, 512, 64
    keys, values = torch.randn(rows, n, d), torch.randn(rows, n, d)
    store = Coding(4, 2, group=32, residual=32).make(keys, values)
    store.settle()
    coded = n - 32
    codes = rows * coded * (d // 2 + d // 4)
    table = rows * (coded // 32) * d * 2 * 2 + rows * coded * (d // 32) * 2 * 2
    newest = rows * (32 + 32) * 2 * d * 4  # with room for a group
    assert codes + table + newest <= store.nbytes() <= 1.15 * (codes + table + newest)
    plain = Plain.make(keys, values)
    assert store.nbytes() < 0.35 * plain.nbytes()
    kept = store.select(torch.arange(256, n).expand(rows, -1))
    assert kept.nbytes() < 0.6 * store.nbytes()
    one_a_group = torch.cat([torch.arange(0, coded, 32), torch.arange(coded, n)])
    spread = store.select(one_a_group.expand(rows, -1))
    assert spread.nbytes() < 0.4 * store.nbytes() + newest


def test_what_cannot_be_is_refused() -> None:
    for given_, says in (
        ({"key_bits": 5}, "key_bits=5"),
        ({"value_bits": 0}, "value_bits=0"),
        ({"group": 0}, "group=0"),
        ({"residual": -1}, "residual=-1"),
        ({"outliers": 32}, "outliers=32"),
        ({"keys": "head"}, "keys='head'"),
        ({"scales": torch.float64}, "scales="),
    ):
        with pytest.raises(ValueError, match=says):
            Coding(**given_)  # type: ignore[arg-type]
