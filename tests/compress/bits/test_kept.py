"""What is kept for the backward pass: exact losses, near gradients, counted bytes."""

import pytest
import torch
from torch import nn

from headwise.compress.bits.kept import KeptInBits, unpacked
from tests.instruments import tiny


def gradients(model: nn.Module, kept: KeptInBits | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    ids = tiny.ids(40, batch=2)
    if kept is None:
        loss = model(input_ids=ids, labels=ids).loss
    else:
        with kept.keeping():
            loss = model(input_ids=ids, labels=ids).loss
    return loss, list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_losses_are_exact_and_gradients_near(name: str) -> None:
    model = getattr(tiny, name)()
    model.set_attn_implementation("eager")
    kept = KeptInBits(4)
    want_loss, want = gradients(model, None)
    loss, got = gradients(model, kept)
    assert torch.equal(loss, want_loss)
    largest = max(float(b.norm()) for b in want)
    for a, b in zip(got, want, strict=True):
        if b.norm() < 1e-4 * largest:  # biases of keys, whose gradients are zero
            continue
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.98
    assert 0.2 < kept.bytes / kept.plain_bytes < 0.5  # tensors under 1,024 numbers stay floats
    again, _ = gradients(model, kept)
    assert torch.equal(again, want_loss)


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 5, 8), (7, 12), (3, 5, 7)])
def test_codes_against_a_loop(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) ** 3
    kept = KeptInBits(4)
    made = unpacked((kept.codes(x, 1), x.shape))
    assert made.shape == x.shape
    if len(shape) == 4:
        groups = [x[:, h] for h in range(4)]
        of = [made[:, h] for h in range(4)]
    elif shape[-1] % 4 == 0:
        groups, of = list(x.chunk(4, -1)), list(made.chunk(4, -1))
    else:
        groups, of = [x], [made]
    for some, rounded in zip(groups, of, strict=True):
        step = (some.max() - some.min()) / 255
        want = some.min() + step * ((some - some.min()) / step).round()
        torch.testing.assert_close(rounded, want, atol=1e-5, rtol=1e-4)


def test_ranges_run() -> None:
    kept = KeptInBits(1, memory=0.9)
    kept.codes(torch.tensor([[0.0, 1.0]]), 1)
    kept.codes(torch.tensor([[-1.0, 3.0]]), 1)
    low, step = kept.ranges[1]
    torch.testing.assert_close(low, torch.tensor([-0.1]))
    torch.testing.assert_close(step, torch.tensor([0.9 + 0.4]))
