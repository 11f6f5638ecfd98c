"""What the claims of Skip-Middle do not say."""

import pytest
import torch

from headwise.papers.depth.skip_middle import SIZES, SkipMiddle, ids, undecided


def test_gates_never_open_again_and_are_shared_with_the_mirror() -> None:
    model, seen = undecided(SkipMiddle).train(), []
    whole = model.blend
    model.blend = lambda layer, x, gate, positions=None: (  # type: ignore[method-assign]
        seen.append(gate.detach()) or whole(layer, x, gate, positions)  # type: ignore[func-returns-value]
    )
    model(ids())
    assert len(seen) == 6
    for first, second in ((0, 1), (1, 2)):
        assert bool((seen[second] <= seen[first]).all())
    for layer in range(3):
        assert torch.equal(seen[layer], seen[5 - layer])
    assert 0 < float((seen[2] == 0).float().mean()) < 1


def test_runs_count_open_tokens() -> None:
    model = undecided(SkipMiddle)
    model.train()(ids())
    assert model.runs == 6 * ids().numel()
    with torch.no_grad():
        model.eval()(ids())
    assert model.runs < 6 * ids().numel()


def test_the_penalty_pulls_towards_the_target() -> None:
    model = SkipMiddle(**SIZES, target=0.2)
    model(ids())
    model.penalty().backward()
    assert all(score.weight.grad is not None for score in model.scores)
    free = SkipMiddle(**SIZES)
    free(ids())
    assert float(free.penalty().detach()) == 0.0


def test_depth_must_be_even() -> None:
    with pytest.raises(ValueError, match="must be even"):
        SkipMiddle(vocabulary=10, dim=8, depth=3)
