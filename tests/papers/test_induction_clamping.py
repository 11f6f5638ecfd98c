"""Clamped maps by hand: what comes out, what learns, on models of our own and of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import headwise
from headwise.edits.changes import Scale
from headwise.models import Site, recording, view
from headwise.papers.lens.induction_clamping import (
    HEADS,
    Clamped,
    Hold,
    model,
    previous_token,
    smooth,
    steps_to_half,
    uniform,
    with_heads,
)
from headwise.parts import Attention
from headwise.tasks import WanderingRepeat
from tests.instruments import tiny


def test_patterns() -> None:
    for pattern in (previous_token, uniform):
        for n in (1, 2, 7):
            table = pattern(n)
            assert (table.triu(1) == 0).all()
            torch.testing.assert_close(table.sum(1), torch.ones(n))
    assert previous_token(4).argmax(1).tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("pattern", [previous_token, uniform])
def test_a_clamped_head_reads_the_table(pattern: Any) -> None:
    torch.manual_seed(0)
    clamped: Any = Attention(
        16, 4, normalize=Clamped(pattern, (1, 3)), causal=True, backend="dense"
    )
    free = Attention(16, 4, causal=True)
    free.load_state_dict(clamped.state_dict())
    x = torch.randn(2, 6, 16)
    # what the output projection reads, head by head
    eye = torch.eye(16)
    for one in (clamped, free):
        one.merge.linear.weight.data = eye
    mine, theirs = clamped(x).unflatten(-1, (4, 4)), free(x).unflatten(-1, (4, 4))
    values = clamped.project.value(x).unflatten(-1, (4, 4))
    for head in range(4):
        want = theirs[:, :, head]
        if head in (1, 3):
            want = torch.stack([pattern(6) @ one[:, head] for one in values])
        torch.testing.assert_close(mine[:, :, head], want, rtol=0, atol=1e-6)


def test_only_clamped_heads_do_not_learn() -> None:
    torch.manual_seed(0)
    layer: Any = Attention(16, 4, normalize=Clamped(uniform, (0, 2)), causal=True, backend="dense")
    layer(torch.randn(2, 6, 16)).square().sum().backward()
    for part in (layer.project.query, layer.project.key):
        grad = part.weight.grad.unflatten(0, (4, 4)).abs().amax((1, 2))
        assert (grad[[0, 2]] == 0).all()
        assert (grad[[1, 3]] > 0).all()
    assert (layer.project.value.weight.grad.abs().sum(1) > 0).all()


def test_maps_in_pieces_are_refused() -> None:
    layer = Attention(16, 4, normalize=Clamped(uniform), causal=True, backend="dense")
    state = layer.empty_state()
    layer(torch.randn(1, 3, 16), state=state)
    with pytest.raises(ValueError, match="whole maps only, not 1 rows of 4 keys"):
        layer.step(torch.randn(1, 1, 16), state)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_holding_a_model_of_others_while_it_trains(make: Any) -> None:
    """A step of training with two heads held: their queries stay as they were, others' move."""
    held = make()
    ids = tiny.ids(9, 3)
    optimizer = torch.optim.SGD(held.parameters(), lr=0.1)
    look = view(held)
    before = look.attentions[0].query_weight().detach().clone()
    logits = held(ids).logits
    with headwise.swap(held, {(0, (0, 1)): Hold(previous_token), (1, 0): Scale(1.0)}):
        out = held(ids).logits
        assert not torch.allclose(out, logits)
        out.float().log_softmax(-1)[..., 3].sum().backward()
        optimizer.step()
        with pytest.raises(ValueError, match="whole maps only"):
            held.generate(ids, max_new_tokens=2, do_sample=False)
    after = look.attentions[0].query_weight()
    moved = (after - before).abs().amax((1, 2))
    assert (moved[:2] == 0).all()
    assert (moved[2:] > 0).all()


def test_what_the_held_heads_give() -> None:
    held = tiny.llama()
    ids = tiny.ids(9, 3)
    look = view(held)
    sites = {kind: Site(kind, 0) for kind in ("heads", "values")}
    with (
        headwise.swap(held, {0: Hold(uniform)}),
        recording(look, sites.values()) as seen,
        torch.no_grad(),
    ):
        held(ids)
    heads, values = (seen[sites[kind]] for kind in ("heads", "values"))
    group = heads.shape[2] // values.shape[2]
    for head in range(heads.shape[2]):
        want = uniform(9) @ values[:, :, head // group]
        torch.testing.assert_close(heads[:, :, head], want, rtol=0, atol=1e-5)


def test_steps_are_counted_where_the_mean_loss_is_half() -> None:
    half = float(torch.tensor(WanderingRepeat().vocabulary).log()) / 2
    losses = [2 * half] * 50 + [0.0] * 50
    assert steps_to_half(losses) == 61  # of 20 more than half are past the drop
    assert steps_to_half([2 * half] * 100) == 600
    assert float(smooth([1.0, 3.0] * 10)[0]) == 2.0


def test_all_heads_kept_is_the_model() -> None:
    torch.manual_seed(0)
    made = model(None).eval()
    batch = WanderingRepeat().batch(0, 256, "test")
    with torch.no_grad():
        loss = WanderingRepeat().loss(made(**batch.inputs), batch)
    assert with_heads(made, set(range(HEADS))) == pytest.approx(float(loss), rel=1e-6)
    assert with_heads(made, {0}) != pytest.approx(float(loss), rel=1e-6)
