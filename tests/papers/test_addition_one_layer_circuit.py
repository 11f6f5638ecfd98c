"""Labels by plain counting; what is hidden is hidden, and comes back."""

from __future__ import annotations

import pytest
import torch

from headwise.maps import Mask
from headwise.papers.lens.addition_one_layer_circuit import (
    DIGITS,
    hidden,
    highest_first,
    judged,
    labels,
    looks,
    lowest_first,
    one_layer,
    rebuilt,
    without_cascades,
)


def test_labels_by_counting() -> None:
    numbers = torch.randint(10, (200, 2, 4), generator=torch.Generator().manual_seed(0))
    numbers[:40, 1] = 9 - numbers[:40, 0]  # nines
    numbers[:20, 1, 0] = 9
    found = labels(numbers[:, 0], numbers[:, 1])
    said = rebuilt(found)
    for row, (a, b) in enumerate(numbers.tolist()):
        carry = False
        for k in range(5):
            below = a[k - 1] + b[k - 1] if k else 0
            assert bool(found["UC1"][row, k]) == (below >= 10)
            assert bool(found["US9"][row, k]) == (below == 9 and carry)
            assert bool(found["nine"][row, k]) == (k > 0 and below == 9)
            carry = below >= 10 or (below == 9 and carry)
            if k < 4:
                assert found["BA"][row, k] == (a[k] + b[k]) % 10
            assert said[row, k] == ((a[k] + b[k] if k < 4 else 0) + carry) % 10
    assert found["US9"].any()
    wrong = (without_cascades(found) != said).any(1)
    assert torch.equal(wrong, found["US9"].any(1))


@pytest.mark.parametrize("make", [highest_first, lowest_first])
def test_judged_says_what_the_task_says(make: object) -> None:
    """Places are in the order of the labels, whichever the task writes first."""
    task = make()  # type: ignore[operator]
    torch.manual_seed(0)
    model = one_layer().eval()
    loss, right, found = judged(model, task)
    batch = task.batch(0, 6000, "test")
    with torch.no_grad():
        told = task.measure(model(**batch.inputs), batch)
    assert float(loss.sum()) == pytest.approx(told["loss"][0], rel=1e-4)
    assert int(right.sum()) == told["accuracy"][0]
    carries = (found["UC1"] | found["US9"])[:, 1:].sum(1)
    assert torch.equal(carries, batch.facts["carries"])


def test_hidden_digits_get_no_weight() -> None:
    torch.manual_seed(0)
    model = one_layer().eval()
    before = model.stack.mixers[0].pattern
    whole = looks(model)
    with hidden(model, 1):
        cut = looks(model)
        assert isinstance(model.stack.mixers[0].pattern.b, Mask)  # type: ignore[union-attr]
    assert model.stack.mixers[0].pattern is before
    assert torch.equal(looks(model), whole)
    for row in range(DIGITS + 1):
        k = DIGITS - row  # the place that is asked
        gone = (cut[:, row] == 0) & (whole[:, row] > 0)
        for number in range(2):
            at = DIGITS - 1 - (k - 1) + number * (DIGITS + 1)
            if k:
                assert gone[:, at].all()
        assert int(gone[0].sum()) == (2 if k else 0)
    torch.testing.assert_close(cut.sum(-1), torch.ones(3, DIGITS + 1))
