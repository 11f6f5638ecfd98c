"""Linearity against least squares, and where it is known."""

import pytest
import torch

from headwise.instruments.linearity import linearity, linearity_by_layer
from tests.instruments import tiny


def cloud(rows: int = 80, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.manual_seed(seed)).double()


@pytest.mark.parametrize("rank", [6, 3])
def test_equals_least_squares(rank: int) -> None:
    x = cloud()[:, :rank] @ cloud(rank, 6, 1)
    y = x.pow(3) + 0.2 * cloud(seed=2) + 5
    a, b = x - x.mean(0), y - y.mean(0)
    a, b = a / a.norm(), b / b.norm()
    best = torch.linalg.lstsq(a, b, driver="gelsd").solution
    left = a @ best - b
    found = linearity(x, y)
    assert found.score == pytest.approx(1 - float(left.pow(2).sum()), abs=1e-10)
    torch.testing.assert_close(found.rows, left.norm(dim=1))
    assert found.rows.pow(2).sum().item() == pytest.approx(1 - found.score)
    assert 0 < found.score < 1


def test_affine_is_one_and_scale_does_not_count() -> None:
    x = cloud()
    y = x @ cloud(6, 4, 1) + 3
    assert linearity(x, y).score == pytest.approx(1, abs=1e-12)
    assert linearity(x, y, centred=False).score < 0.9999
    bent = x.abs()
    assert linearity(x, bent).score == pytest.approx(linearity(9 * x, 0.1 * bent).score)
    assert linearity(x, torch.ones(80, 2)).score == 1


def test_layers_of_a_model() -> None:
    model, inputs = tiny.gpt2(), {"input_ids": tiny.ids(40, batch=3)}
    states = tiny.outputs(model, inputs)["hidden_states"]
    found = linearity_by_layer(model, inputs)
    assert len(found) == 2
    assert found[0].rows.shape == (120,)
    # the last state of transformers stands behind the final norm
    expected = linearity(states[0].flatten(0, 1), states[1].flatten(0, 1))
    assert found[0].score == pytest.approx(expected.score, abs=1e-6)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="7 rows of 6 numbers"):
        linearity(cloud(7), cloud(7))
    with pytest.raises(ValueError, match=r"expected \(rows, d\)"):
        linearity(cloud(9), cloud(8))
