"""Translators: what they compute, that they get closer, and that nothing else changes."""

import numpy as np
import pytest
import torch

from headwise.instruments.lenses import lens
from headwise.instruments.tuned_lens import TunedLens, fit_lens
from tests.instruments import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.llama()


@pytest.fixture(scope="module")
def ids():
    return tiny.ids(24, seed=3, batch=40)


@pytest.fixture(scope="module")
def tuned(model, ids):
    return fit_lens(model, ids, steps=60, rate=3e-3, every=20, batch_size=8)


def test_what_it_translates_is_affine():
    torch.manual_seed(0)
    found = TunedLens(torch.randn(2, 3, 3), torch.randn(2, 3))
    h = torch.randn(4, 5, 3)
    made = found.translate(h, 1)
    for b in range(4):
        for p in range(5):
            for i in range(3):
                expected = h[b, p, i] + found.bias[1, i]
                for j in range(3):
                    expected = expected + found.weight[1, i, j] * h[b, p, j]
                assert made[b, p, i] == pytest.approx(float(expected), abs=1e-5)


def test_untrained_it_is_the_logit_lens(model, ids):
    nothing = TunedLens(torch.zeros(2, 32, 32), torch.zeros(2, 32))
    a, b = lens(model, ids[:3]), lens(model, ids[:3], nothing)
    assert b.kind == "tuned"
    assert np.allclose(a.kl, b.kl, atol=1e-6)


def test_it_comes_closer_to_the_final_answer_on_text_it_has_not_seen(model, tuned):
    other = tiny.ids(24, seed=11, batch=8)
    before = lens(model, other).by_layer()["kl"]
    after = lens(model, other, tuned).by_layer()["kl"]
    assert after[0] < 0.7 * before[0]
    assert after[1] < 0.9 * before[1]
    assert after[-1] == before[-1] == pytest.approx(0, abs=1e-6)
    kl = tuned.record["kl"]
    assert all(a < b for a, b in zip(kl["after"], kl["before"], strict=True))


def test_the_same_seed_gives_the_same_lens_and_the_model_is_left_alone(model, ids):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    a = fit_lens(model, ids, steps=4, every=2, seed=5)
    assert torch.equal(torch.rand(1), expected)
    b = fit_lens(model, ids, steps=4, every=2, seed=5)
    other = fit_lens(model, ids, steps=4, every=2, seed=6)
    assert torch.equal(a.weight, b.weight)
    assert not torch.equal(a.weight, other.weight)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_it_ends_early_and_keeps_the_best(model, ids):
    wild = fit_lens(model, ids, steps=200, rate=30.0, every=1, patience=2)
    assert wild.record["steps"] < 200
    kl = wild.record["kl"]
    assert all(a <= b for a, b in zip(kl["after"], kl["before"], strict=True))
    now = lens(model, ids[-8:], wild).by_layer()["kl"]
    assert now[:-1] == pytest.approx(kl["after"], rel=1e-3)


def test_a_file_gives_it_back(tuned, tmp_path, model, ids):
    path = tuned.save(tmp_path / "deep" / "lens.safetensors")
    again = TunedLens.load(path)
    assert torch.equal(again.weight, tuned.weight)
    assert again.record == tuned.record
    assert [p.name for p in path.parent.iterdir()] == ["lens.safetensors"]
    assert lens(model, ids[:2], again).kind == "tuned"
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no safetensors file"):
        TunedLens.load(tmp_path / "no.safetensors")
    with pytest.raises(FileNotFoundError):
        TunedLens.load(tmp_path / "absent")


def test_it_is_refused_on_another_model(tuned, ids):
    with pytest.raises(ValueError, match="layers of width"):
        lens(tiny.llama(num_hidden_layers=3), ids[:2], tuned)
    changed = tiny.llama()
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="other weights"):
        lens(changed, ids[:2], tuned)
    lens(changed, ids[:2], TunedLens(tuned.weight, tuned.bias, tuned.record, strict=False))


def test_what_cannot_be_fitted_is_refused(model, ids):
    with pytest.raises(ValueError, match="one to fit and one to measure"):
        fit_lens(model, ids[:8])
    with pytest.raises(ValueError, match="share"):
        fit_lens(model, ids, held_out=0)
