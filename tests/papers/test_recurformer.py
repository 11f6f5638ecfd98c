"""What the claims of RecurFormer do not say."""

import torch

from headwise.compress import steps_of
from headwise.papers.recurrent import recurformer as paper


def test_the_original_stays_and_the_copy_remembers_its_step() -> None:
    torch.manual_seed(0)
    model = paper.Decoder(40, 64, 2, lambda _: paper.Attention(64, 4, causal=True), lambda _: None)
    given = paper.examples()[:4]
    before = model(given)
    made = paper.recurformer(model, given)
    assert torch.equal(model(given), before)
    assert steps_of(model) == ()
    (step,) = steps_of(made)
    assert len(step.heads) == 4  # type: ignore[attr-defined]
    silent = paper.silenced(model, given)
    assert sum(p.numel() for p in silent.parameters()) == sum(p.numel() for p in model.parameters())


def test_both_choices_share_no_head() -> None:
    torch.manual_seed(0)
    model = paper.Decoder(40, 64, 2, lambda _: paper.Attention(64, 4, causal=True), lambda _: None)
    near = paper.by_recency(model, paper.examples())
    far = paper.by_distance(model, paper.examples())
    assert not set(near) & set(far)
    assert len(near) == len(far) == 4
