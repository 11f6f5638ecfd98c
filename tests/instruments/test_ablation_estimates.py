"""Estimates of effects from gradients, against their definitions by plain finite differences."""

import numpy as np
import pytest
import torch

from headwise.instruments.ablations import ablation
from headwise.instruments.effect_ranks import rank_correlation
from headwise.instruments.joint_ablation import ablate_together
from tests.instruments import slow_ablation as slow
from tests.instruments import tiny

EXACT = {"exact": False}


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart"])
def test_the_gradient_is_the_effect_of_a_little(name):
    """Taking out a thousandth of a head does a thousandth of the estimate."""
    model = getattr(tiny, name)().double()
    ids = tiny.ids(6, batch=3)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "bart" else {})
    found = ablation(model, inputs, metric=mean_loss, estimate="gradient", **EXACT)
    wanted = []
    for projection, *_ in slow.projections(model):
        small = slow.effects(
            model, inputs, projection, 4, exact, lambda z, h: z[..., h, :] * (1 - 1e-3)
        )
        large = slow.effects(
            model, inputs, projection, 4, exact, lambda z, h: z[..., h, :] * (1 + 1e-3)
        )
        wanted.append((small - large) / 2e-3)
    assert np.abs(found.heads["effect_gradient"] - torch.cat(wanted).mean(1).numpy()).max() < 1e-3
    assert "effect" not in found.heads


def mean_loss(logits, inputs):
    """The log-probability of token 5, in the model's own precision."""
    return -logits.log_softmax(-1)[:, :, 5].mean(1)


def exact(logits):
    return mean_loss(logits, {})


def test_the_integrated_shares_sum_to_what_the_attention_does():
    """Completeness: the shares of an attention's heads add up to its effect."""
    model = tiny.gpt2().double()
    ids = tiny.ids(6, batch=2)
    found = ablation(model, ids, metric=mean_loss, estimate="integrated", steps=64, **EXACT)
    whole = ablate_together(model, ids, ["L0", "L1"], metric=mean_loss)
    by_layer = found.heads["effect_integrated"].reshape(2, 4).sum(1)
    assert np.abs(by_layer - whole.mean).max() < 2e-3
    rough = ablation(model, ids, metric=mean_loss, estimate="integrated", steps=1, **EXACT)
    gap = np.abs(rough.heads["effect_integrated"].reshape(2, 4).sum(1) - whole.mean).max()
    assert gap > 2e-2  # one step is not enough, so the sum above says something


def test_one_head_alone_is_estimated_exactly():
    """With one head an attention, its integrated share is its effect."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=1, n_positions=16)
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(20, (3, 6))
    for how in ("zero", "mean"):
        found = ablation(model, ids, how=how, metric="kl", estimate="integrated", steps=100)
        gap = np.abs(found.heads["effect_integrated"] - found.heads["effect"]).max()
        assert gap < 1e-3 * np.abs(found.heads["effect"]).max() + 1e-5


def test_parameters_need_not_ask_for_gradients():
    model = tiny.llama()
    ids = tiny.ids(6, batch=2)
    wanted = ablation(model, ids, estimate=("gradient", "integrated"))
    model.requires_grad_(False)
    found = ablation(model, ids, estimate=("gradient", "integrated"))
    for column in ("effect_gradient", "effect_integrated"):
        assert np.allclose(found.heads[column], wanted.heads[column], atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_the_rank_correlation_stands_beside_them():
    atlas = ablation(tiny.llama(), tiny.ids(8, batch=4), estimate=("gradient", "integrated"))
    said = atlas.provenance["cause"]["rank_correlation"]
    for name, value in said.items():
        a, b = atlas.heads[f"effect_{name}"], atlas.heads["effect"]
        ranks = [np.argsort(np.argsort(x)) for x in (a, b)]  # no ties here
        assert value == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert set(said) == {"gradient", "integrated"}


def test_ranks_share_what_is_equal_and_leave_out_what_is_not_known():
    stats = pytest.importorskip("scipy.stats")
    a = np.array([1.0, 2, 2, 3, np.nan, 0.5])
    b = np.array([0.2, 0.1, 0.4, 0.4, 9, np.inf])
    assert rank_correlation(a, b) == pytest.approx(
        stats.spearmanr(a[[0, 1, 2, 3, 5]], b[[0, 1, 2, 3, 5]])[0]
    )
    assert np.isnan(rank_correlation(np.ones(4), np.arange(4.0)))


def test_a_metric_without_a_gradient_says_so():
    def best(logits, inputs):
        return logits.argmax(-1).float().mean(1)

    with pytest.raises(ValueError, match="does not depend on the heads by a gradient"):
        ablation(tiny.llama(), tiny.ids(5), metric=best, estimate="gradient")
