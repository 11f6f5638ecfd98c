"""Lenses on real weights (stories260K): the last layer is the model, and tuning comes closer."""

import pytest
import torch
from transformers import LlamaForCausalLM

from headwise.instruments import lens
from headwise.instruments.direct_attribution import direct_effects
from headwise.instruments.tuned_lens import fit_lens
from tests.proof.weights import stories

WINDOW = 74


@pytest.fixture(scope="module")
def model(assets):
    folder = assets / "stories260K" / "hf"
    return LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def windows(assets) -> torch.Tensor:
    """Windows of five stories; the last story's are measured on only."""
    texts = stories(assets)
    cut = [ids[:, : ids.shape[1] // WINDOW * WINDOW].reshape(-1, WINDOW) for ids in texts]
    return torch.cat(cut)


def test_the_last_layer_answers_as_the_model_does(model, assets):
    for ids in stories(assets)[:2]:
        found = lens(model, ids)
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        expected = -logs[:-1].gather(1, ids[0, 1:, None])[:, 0]
        assert found.loss[-1, :-1] == pytest.approx(expected.numpy(), abs=1e-4)
        nats = found.by_layer()["loss"]
        assert (nats[1:] < nats[:-1]).all()  # every layer brings the answer closer
        assert nats[-1] < 1.6 < nats[2]


def test_a_tuned_lens_comes_closer_than_the_logit_lens(model, windows):
    tuned = fit_lens(model, windows[:-4], steps=100, rate=3e-3, rows=WINDOW, batch_size=4)
    before = lens(model, windows[-4:]).by_layer()
    after = lens(model, windows[-4:], tuned).by_layer()
    assert (after["kl"][:-1] < 0.85 * before["kl"][:-1]).all(), (before["kl"], after["kl"])
    assert (after["kl"][:3] < 0.5 * before["kl"][:3]).all()
    assert (after["loss"][:-1] < before["loss"][:-1]).all()
    assert (after["accuracy"][:-1] > before["accuracy"][:-1]).all()


def test_a_logit_falls_into_what_the_parts_wrote(model, assets):
    ids = stories(assets)[0][:, :100]
    found = direct_effects(model, ids)
    with torch.no_grad():
        best = model(ids).logits[0, -1].max()
    assert found.total == pytest.approx(float(best), abs=1e-4)
    assert found.heads.shape == (1, 40)
