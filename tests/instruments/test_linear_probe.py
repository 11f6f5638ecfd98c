"""The regressions against scikit-learn, and against their own definitions."""

import pytest
import torch
from torch.nn import functional as F

from headwise.instruments.linear_probe import fit_logistic, fit_ridge


def data(rows, width, classes, seed=0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=random) * torch.rand(width, generator=random) * 5 + 3
    y = (x[:, :classes] + torch.randn(rows, classes, generator=random)).argmax(1)
    return x, y


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("rows", [20, 150])
def test_logistic_is_scikit_learns(rows, classes):
    linear = pytest.importorskip("sklearn.linear_model")
    x, y = data(rows, 30, classes)
    found = fit_logistic(x, y, classes, strength=0.3)
    scaled = ((x.double() - x.double().mean(0)) / x.double().std(0, correction=0)).numpy()
    other = linear.LogisticRegression(C=0.3, tol=1e-10, max_iter=10_000).fit(scaled, y.numpy())
    assert found.weight.numpy() == pytest.approx(other.coef_, abs=1e-4)
    probabilities = found(x).softmax(1).numpy()
    assert probabilities == pytest.approx(other.predict_proba(scaled), abs=1e-4)
    assert (found.predict(x).numpy() == other.predict(scaled)).all()


@pytest.mark.parametrize("rows", [20, 150])
def test_ridge_is_scikit_learns(rows):
    linear = pytest.importorskip("sklearn.linear_model")
    x, _ = data(rows, 30, 2)
    y = x[:, 0] - 2 * x[:, 1] + 0.1 * torch.randn(rows, generator=torch.Generator().manual_seed(1))
    found = fit_ridge(x, y, strength=0.5)
    scaled = ((x.double() - x.double().mean(0)) / x.double().std(0, correction=0)).numpy()
    other = linear.Ridge(alpha=2.0).fit(scaled, y.double().numpy())
    assert found.predict(x)[:, 0].numpy() == pytest.approx(other.predict(scaled), abs=1e-6)


def test_at_the_optimum_the_objective_has_no_slope():
    x, y = data(60, 8, 3)
    found = fit_logistic(x, y, 3, strength=2.0)
    weight = found.weight.clone().requires_grad_()
    scaled = (x.double() - found.mean) / found.deviation
    cost = weight.pow(2).sum() / 2 + 2.0 * F.cross_entropy(
        scaled @ weight.mT + found.bias, y, reduction="sum"
    )
    cost.backward()
    assert weight.grad.abs().max() < 1e-3


def test_a_direction_points_to_its_class_in_the_features_themselves():
    x, y = data(200, 6, 2)
    found = fit_logistic(x, y, 2)
    along = x.double() @ found.direction(1)
    assert along[y == 1].mean() > along[y == 0].mean()
    assert torch.equal(found.direction(0), -found.direction(1))
    assert found.direction().norm() == pytest.approx(1)


def test_features_that_never_change_do_no_harm():
    x, y = data(50, 5, 2)
    x[:, 3] = 0.1
    assert fit_logistic(x, y, 2)(x).isfinite().all()
    with pytest.raises(ValueError, match="strength"):
        fit_logistic(x, y, 2, strength=0)
