"""What the claims of EchoAtt do not say."""

import torch

from headwise.compress import steps_of
from headwise.papers.depth.echo_attention import Distilled, echo, fresh, task


def test_the_teacher_is_left_as_it_was() -> None:
    teacher = fresh(0).eval()
    given = task().batch(0, 4, "valid").inputs["input_ids"]
    before = teacher(given)
    student = echo(teacher, given)
    assert torch.equal(teacher(given), before)
    assert steps_of(teacher) == ()
    assert len(steps_of(student)) == 1


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it() -> None:
    teacher = fresh(0).eval()
    given = task().batch(0, 4, "valid").inputs["input_ids"]
    same = Distilled(teacher, teacher)
    same(given)
    assert abs(float(torch.as_tensor(same.penalty()).detach())) < 1e-5


def test_only_the_student_gets_gradients() -> None:
    teacher = fresh(0).eval()
    given = task().batch(0, 4, "valid").inputs["input_ids"]
    student = echo(teacher, given)
    distilled = Distilled(student, teacher)
    distilled(given).sum()
    penalty = distilled.penalty()
    assert isinstance(penalty, torch.Tensor)
    assert float(penalty.detach()) > 0
    penalty.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None for p in student.parameters())
