"""Dimensions of clouds that are known, and of a package's estimators where it is installed."""

import math

import pytest
import torch

from headwise.instruments.dimension import (
    anisotropy,
    dimensions,
    effective_rank,
    levina_bickel,
    neighbour_distances,
    two_nn,
)
from tests.instruments import tiny


def cloud(name, rows=1500):
    random = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(20, 20, generator=random, dtype=torch.float64)).Q
    if name == "line":
        return torch.rand(rows, 1, generator=random) @ torch.ones(1, 7), 1
    if name == "sphere":
        x = torch.randn(rows, 4, generator=random, dtype=torch.float64)
        return (x / x.norm(dim=1, keepdim=True)) @ turn[:4], 3
    if name == "swiss roll":
        t = torch.rand(rows, generator=random) * 9 + 4.5
        other = torch.rand(rows, generator=random) * 20
        return torch.stack([t * t.cos(), other, t * t.sin()], 1), 2
    x = torch.rand(rows, 5, generator=random, dtype=torch.float64)
    return x @ turn[:5] + 100, 5


@pytest.mark.parametrize("name", ["line", "sphere", "swiss roll", "cube"])
def test_known_manifolds(name):
    x, expected = cloud(name)
    assert two_nn(x) == pytest.approx(expected, rel=0.12)
    # edges pull it down, the more the more neighbours are asked
    assert levina_bickel(x, k=10) == pytest.approx(expected, rel=0.15)


def test_neighbours_by_loops():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    found = neighbour_distances(x, 4)
    for i in range(40):
        far = sorted(math.dist(x[i].tolist(), x[j].tolist()) for j in range(40) if j != i)
        assert found[i].tolist() == pytest.approx(far[:4], abs=1e-5)


def test_estimators_are_those_of_scikit_dimension():
    skdim = pytest.importorskip("skdim", reason="scikit-dimension is not installed")
    for name in ("sphere", "cube"):
        x, _ = cloud(name, rows=400)
        other = skdim.id.TwoNN(discard_fraction=0.1).fit_transform(x.numpy())
        assert two_nn(x) == pytest.approx(other, rel=1e-6)
        other = skdim.id.MLE().fit_transform(x.numpy(), n_neighbors=20, comb="mle")
        assert levina_bickel(x) == pytest.approx(other, rel=1e-6)


def test_rows_that_stand_twice_count_once():
    x, _ = cloud("cube", rows=300)
    assert two_nn(torch.cat([x, x[:50]])) == two_nn(x)
    with pytest.raises(ValueError, match="too few"):
        two_nn(x[:1].expand(50, -1))
    with pytest.raises(ValueError, match="neighbours"):
        levina_bickel(x[:15])


def test_anisotropy_and_rank_by_loops():
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).double() + 1
    cosines = [
        float(x[i] @ x[j] / (x[i].norm() * x[j].norm()))
        for i in range(12)
        for j in range(12)
        if i != j
    ]
    assert anisotropy(x) == pytest.approx(sum(cosines) / len(cosines))
    values = torch.linalg.eigvalsh(torch.cov(x.T))
    assert effective_rank(x) == pytest.approx(float(values.sum() ** 2 / values.pow(2).sum()))
    assert effective_rank(x[:3]) <= 2 + 1e-9


def test_layers_of_a_model():
    model, ids = tiny.llama(), tiny.ids(40, batch=6)
    found = dimensions(model, ids, most=200)
    assert found.names == ["L0 residual", "L1 residual", "L2 residual"]
    assert found.rows == 200
    assert (found.two_nn > 0).all()
    assert "TwoNN" in repr(found)
    again = dimensions(model, ids, most=200)
    assert (again.two_nn == found.two_nn).all()
    with pytest.raises(ValueError, match="has heads"):
        dimensions(model, ids, site="heads")
