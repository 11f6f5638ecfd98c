"""What every task keeps, whoever wrote it: seeds, shapes, targets, splits, a docstring that says
what the problem is worth."""

import importlib
import inspect
import pkgutil
import re

import pytest
import torch

import headwise.tasks as room
from headwise.tasks.task import IGNORED, Batch, Task


def found() -> list[type[Task]]:
    """Every task of the package."""
    kinds = set()
    for module in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
        for _, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(kind, Task) and kind is not Task:
                kinds.add(kind)
    return sorted(kinds, key=lambda kind: kind.__name__)


# Read, not made: what the data hold is theirs, and a seed does not change it.
DATA = {"Finite", "TextStream"}
TASKS = [
    kind
    for kind in found()
    if not kind.__name__.startswith("_") and not DATA & {base.__name__ for base in kind.__mro__}
]
EXAMPLES = [
    pytest.param(task, id=f"{kind.__name__}-{number}")
    for kind in TASKS
    for number, task in enumerate(kind.examples())
]


# Their tables are drawn once: which answer is frequent there cannot be known without training.
REMEMBERED = {"Facts", "FactsAndChains", "TwoHopFacts"}


def same(a: Batch, b: Batch) -> bool:
    return (
        a.inputs.keys() == b.inputs.keys()
        and all(torch.equal(a.inputs[name], b.inputs[name]) for name in a.inputs)
        and torch.equal(a.targets.nan_to_num(7.0), b.targets.nan_to_num(7.0))
    )


def problems(task: Task, split: str) -> list[bytes]:
    """Each problem of some batches, its inputs as bytes."""
    rows = []
    for step in range(4):
        inputs = task.batch(step, 32, split).inputs
        for i in range(32):
            rows.append(b"|".join(value[i].numpy().tobytes() for value in inputs.values()))
    return rows


def test_tasks_are_found() -> None:
    assert len(EXAMPLES) > 60
    assert len({kind.__name__ for kind in TASKS}) == len(TASKS)


@pytest.mark.parametrize("task", EXAMPLES)
def test_a_batch_is_a_function_of_its_arguments(task: Task) -> None:
    first = task.batch(3, 16)
    torch.rand(5)
    assert same(first, task.batch(3, 16))
    assert not same(first, task.batch(4, 16))
    assert not same(first, task.batch(3, 16, "valid"))
    assert not same(task.batch(3, 16, "test"), task.batch(3, 16, "valid"))
    with pytest.raises(ValueError, match="split"):
        task.batch(0, 2, "validation")


@pytest.mark.parametrize("task", EXAMPLES)
def test_the_seed_counts_and_the_global_one_does_not(task: Task) -> None:
    torch.manual_seed(1)
    first = task.batch(0, 16)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert same(first, task.batch(0, 16))
    assert torch.equal(before, torch.get_rng_state())
    other = type(task).__new__(type(task))
    other.__dict__.update(task.__dict__)
    other.seed = task.seed + 1
    assert not same(first, other.batch(0, 16))


@pytest.mark.parametrize("task", EXAMPLES)
@pytest.mark.parametrize("size", [1, 5])
def test_shapes_and_targets(task: Task, size: int) -> None:
    batch = task.batch(0, size)
    assert all(len(value) == size for value in batch.inputs.values())
    assert len(batch.targets) == size
    assert all(isinstance(fact, torch.Tensor) for fact in batch.facts.values())
    if batch.targets.is_floating_point():
        assert not batch.targets.isnan().all()
        assert not batch.targets.isinf().any()
        return
    assert batch.targets.dtype == torch.long
    asked = batch.targets != IGNORED
    assert asked.reshape(size, -1).any(1).all(), "a problem in which nothing is asked"
    assert (batch.targets[asked] >= 0).all()
    ids = batch.inputs.get("input_ids")
    if ids is not None and hasattr(task, "vocabulary"):
        assert ids.dtype == torch.long
        assert ids.min() >= 0
        assert ids.max() < task.vocabulary
        assert batch.targets[asked].max() < task.vocabulary
    mask = batch.inputs.get("attention_mask")
    if mask is not None and mask.shape == batch.targets.shape:
        assert set(mask.unique().tolist()) <= {0, 1}
        assert not (asked & (mask == 0)).any(), "asked where there is only padding"


@pytest.mark.parametrize("task", EXAMPLES)
def test_a_model_over_the_vocabulary_takes_it(task: Task) -> None:
    """The least of all models, a table of bigrams: a loss, its gradient, and what is measured."""
    batch = task.batch(0, 8)
    if (
        "input_ids" not in batch.inputs
        or batch.targets.shape[:2] != batch.inputs["input_ids"].shape
    ):
        pytest.skip("not a task that asks tokens about tokens")
    table = torch.nn.Embedding(task.vocabulary, task.vocabulary)
    output = table(batch.inputs["input_ids"])
    loss = task.loss(output, batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert table.weight.grad is not None
    assert table.weight.grad.abs().sum() > 0
    found = task.measure(output.detach(), batch)
    assert all(0 <= found[name][0] <= found[name][1] for name in ("accuracy", "solved"))
    assert found["loss"][0] / found["loss"][1] == pytest.approx(float(loss.detach()), rel=1e-4)


@pytest.mark.parametrize("task", EXAMPLES)
def test_held_out_problems_are_no_training_problems(task: Task) -> None:
    """As often as training problems meet again by chance, held-out ones may meet them: twice as
    many pairs are compared, and there is luck. Of 128 problems all would be met in a leak."""
    train, test = problems(task, "train"), problems(task, "test")
    again = len(train) - len(set(train))
    assert sum(problem in set(train) for problem in test) <= 6 * again + 16
    assert len(set(test)) > 1


@pytest.mark.parametrize("task", EXAMPLES)
def test_chance_is_what_an_answer_without_looking_gets(task: Task) -> None:
    """The most frequent answer of some batches, given to others."""
    chance = getattr(task, "chance", None)
    if not isinstance(chance, float) or type(task).__name__ in REMEMBERED:
        pytest.skip("no chance that could be measured so")
    assert 0.0 < chance < 1.0
    counts: dict[int, int] = {}
    for step in range(6):
        answers, number = task.batch(step, 64).targets.unique(return_counts=True)
        for answer, times in zip(answers.tolist(), number.tolist(), strict=True):
            if answer != IGNORED:
                counts[answer] = counts.get(answer, 0) + times
    best = max(counts, key=lambda answer: counts[answer])
    right = asked = 0
    for step in range(6):
        targets = task.batch(step, 64, "test").targets
        right += int((targets == best).sum())
        asked += int((targets != IGNORED).sum())
    # answers of one problem may hang together: so the margin counts different problems
    different = len(set(problems(task, "train") + problems(task, "test")))
    assert right / asked <= chance + 4 * (chance * (1 - chance) / different) ** 0.5


@pytest.mark.parametrize("kind", [k for k in TASKS if k.examples()], ids=lambda k: k.__name__)
def test_the_docstring_says_what_the_task_is_worth(kind: type[Task]) -> None:
    said = inspect.getdoc(kind) or ""
    assert re.search(r"solv|learn|answered", said, re.I), "what solves it?"
    assert re.search(r"\b(not|cannot|no|only)\b", said, re.I), "what does not?"
    if hasattr(kind, "chance"):
        assert "hance" in said or inspect.getdoc(kind.chance)
