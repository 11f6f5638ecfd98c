"""What the claims of SimVQ leave out: shapes, gradients, the package of others."""

import pytest
import torch

from headwise.papers.compress.simvq import SimVQ, VectorQuantiser


def test_shapes_and_the_nearest_code() -> None:
    torch.manual_seed(0)
    quantiser = SimVQ(8, 32)
    z = torch.randn(2, 5, 8)
    quantised, indices, loss = quantiser(z)
    assert quantised.shape == z.shape
    assert indices.shape == (2, 5)
    assert loss.shape == ()
    codes = quantiser.codes().detach()
    for b in range(2):
        for i in range(5):
            distances = [float(((z[b, i] - code) ** 2).sum()) for code in codes]
            assert int(indices[b, i]) == min(range(32), key=distances.__getitem__)
            assert torch.allclose(quantised[b, i], codes[indices[b, i]], atol=1e-6)


def test_gradients_pass_straight_through_and_the_basis_stays() -> None:
    torch.manual_seed(0)
    quantiser = SimVQ(8, 32)
    z = torch.randn(4, 8, requires_grad=True)
    got = quantiser(z)
    (got.quantised * torch.arange(8.0)).sum().backward()
    assert torch.equal(z.grad, torch.arange(8.0).expand(4, 8))
    assert quantiser.turn.weight.grad is None
    quantiser(z).loss.backward()
    assert quantiser.turn.weight.grad is not None
    assert [name for name, _ in quantiser.named_parameters()] == ["turn.weight"]
    assert [name for name, _ in VectorQuantiser(8, 32).named_parameters()] == ["basis"]


def test_as_the_package() -> None:
    theirs_of = pytest.importorskip("vector_quantize_pytorch").SimVQ
    torch.manual_seed(0)
    theirs = theirs_of(dim=8, codebook_size=32, rotation_trick=False)
    ours = SimVQ(8, 32)
    with torch.no_grad():
        ours.basis.copy_(theirs.frozen_codebook)
        ours.turn.weight.copy_(theirs.code_transform.weight)
    z = torch.randn(2, 6, 8)
    quantised, indices, _ = theirs(z)
    assert torch.equal(ours(z).indices, indices)
    assert torch.allclose(ours(z).quantised, quantised, atol=1e-5)
