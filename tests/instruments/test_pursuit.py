"""Matching pursuit against scikit-learn's for one sample, and against plain loops for many."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headwise.instruments.pursuit import head_outputs, pursuit, token_atoms
from headwise.models import Site, recording, view
from tests.instruments import tiny


def slow(samples: Tensor, atoms: Tensor, steps: int) -> tuple[list[int], np.ndarray]:
    x, d = samples.numpy(), atoms.numpy()
    d = d / np.linalg.norm(d, axis=1, keepdims=True)
    rest, support = x.copy(), []
    weights = np.zeros((len(x), 0))
    for _ in range(steps):
        sums = [
            -1.0 if v in support else sum(abs(float(r @ d[v])) for r in rest) for v in range(len(d))
        ]
        support.append(int(np.argmax(sums)))
        chosen = d[support]
        weights = np.stack([np.linalg.lstsq(chosen.T, row, rcond=None)[0] for row in x])
        rest = x - weights @ chosen
    return support, weights


@pytest.mark.parametrize("n", [1, 2, 9])
def test_against_plain_loops(n: int) -> None:
    make = torch.Generator().manual_seed(n)
    samples = torch.randn(n, 12, generator=make, dtype=torch.float64)
    atoms = torch.randn(30, 12, generator=make, dtype=torch.float64)
    found = pursuit(samples, atoms, 6)
    support, weights = slow(samples, atoms, 6)
    assert list(found.support) == support
    np.testing.assert_allclose(found.coefficients.numpy(), weights, atol=1e-9)
    unit = atoms / atoms.norm(dim=1, keepdim=True)
    left = samples - found.coefficients @ unit[list(found.support)]
    assert found.explained[-1] == pytest.approx(1 - float((left**2).sum() / (samples**2).sum()))
    assert list(found.explained) == sorted(found.explained)


def test_one_sample_is_orthogonal_matching_pursuit() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    make = torch.Generator().manual_seed(0)
    for _ in range(5):
        sample = torch.randn(1, 20, generator=make, dtype=torch.float64)
        atoms = torch.nn.functional.normalize(
            torch.randn(50, 20, generator=make, dtype=torch.float64), dim=1
        )
        found = pursuit(sample, atoms, 5)
        theirs = linear.orthogonal_mp(atoms.numpy().T, sample[0].numpy(), n_nonzero_coefs=5)
        assert set(found.support) == set(np.nonzero(theirs)[0].tolist())
        for token, weight in zip(found.support, found.coefficients[0].tolist(), strict=True):
            assert weight == pytest.approx(theirs[token], abs=1e-9)


def test_it_ends_where_everything_is_explained() -> None:
    atoms = torch.eye(6, dtype=torch.float64)
    found = pursuit(3 * atoms[[4, 4]] - atoms[[2, 2]], atoms, 5)
    assert found.support == (4, 2)
    assert found.explained[-1] == pytest.approx(1)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_outputs_of_heads_sum_to_what_the_attention_adds(make: Any) -> None:
    model = make()
    inputs = {"input_ids": tiny.ids(7, batch=3)}
    site = Site("attention", 1)
    with torch.no_grad(), recording(view(model), [site]) as kept:
        model(**inputs)
    found = head_outputs(model, inputs, at=-2)
    total = sum(found[1, h] for h in range(4))
    torch.testing.assert_close(total, kept[site][:, -2].double(), atol=1e-5, rtol=1e-4)


def test_atoms_raise_their_tokens() -> None:
    """Through LayerNorm: <atom, x> is the token's logit times the size of x, but for the bias."""
    model = tiny.gpt2().double()
    x = torch.randn(32, dtype=torch.float64)
    size = (x.var(correction=0) + model.transformer.ln_f.eps).sqrt()
    with torch.no_grad():
        logits = model.lm_head(model.transformer.ln_f(x)) * size
    torch.testing.assert_close(token_atoms(model, [5, 9]) @ x, logits[[5, 9]])
    assert token_atoms(model).shape == (tiny.VOCABULARY, 32)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="steps=4"):
        pursuit(torch.ones(1, 3), torch.ones(3, 3), 4)
    with pytest.raises(ValueError, match="differ"):
        pursuit(torch.ones(1, 3), torch.ones(3, 4), 1)
    with pytest.raises(ValueError, match="all samples are zero"):
        pursuit(torch.zeros(1, 3), torch.ones(3, 3), 1)
