"""What the claims of the Depth-Adaptive Transformer do not say."""

import torch

from headwise.papers.depth.depth_adaptive import (
    KEYS_AND_VALUES,
    PAIRS,
    EasyAndHard,
    Halting,
    first,
)
from headwise.tasks.task import IGNORED


def test_easy_tokens_are_repeated_and_hard_ones_recalled() -> None:
    batch = EasyAndHard().batch(0, 16)
    ids, hard = batch.inputs["input_ids"], batch.facts["hard"]
    easy = (batch.targets != IGNORED) & ~hard
    assert torch.equal(ids[easy], batch.targets[easy])
    assert bool((ids[easy] >= KEYS_AND_VALUES).all())
    assert bool((hard.sum(1) == PAIRS).all())
    for row in range(16):
        pairs = dict(ids[row, : 2 * PAIRS].unflatten(0, (PAIRS, 2)).tolist())
        for at in hard[row].nonzero()[:, 0].tolist():
            assert pairs[int(ids[row, at])] == int(batch.targets[row, at])


def test_every_exit_has_the_same_targets() -> None:
    one, four = EasyAndHard().batch(3, 4), EasyAndHard(exits=4).batch(3, 4)
    assert four.targets.shape == (4, 4, 40)
    assert all(torch.equal(four.targets[:, n], one.targets) for n in range(4))


def test_the_oracle_is_the_first_right_exit_or_the_last() -> None:
    right = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 1], [0, 1, 0, 1]]).bool()
    assert first(right).tolist() == [1, 0, 3, 2]


def test_stopping_is_chi_above_one_half() -> None:
    torch.manual_seed(0)
    policy, x = Halting(8, 3), torch.randn(2, 5, 8)
    assert torch.equal(policy(1, x, x), policy.chi(1, x) > 0.5)
