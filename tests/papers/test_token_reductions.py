"""Reductions of the papers in a Hugging Face ViT: nobody lost, gradients; DeiT's soft loss."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from headwise.compress import reduce_tokens
from headwise.papers.compress.deit import distillation_loss
from headwise.papers.tokens.mctf_token_fusion import MultiCriteria
from headwise.papers.tokens.multiscale_token_merge import MergeIntoCrucial, MultiScale
from tests.compress.tokens.encoders import PATCHES, answer, images, make


@pytest.mark.parametrize("how", [MultiCriteria(), MergeIntoCrucial()])
def test_no_patch_is_lost_and_gradients_pass(how):
    model, pixels = make("vit"), images().requires_grad_()
    with reduce_tokens(model, schedule={1: 24, 2: 13}, how=how) as record:
        answer(model, pixels).sum().backward()
    assert record.counts == {1: 24, 2: 13}
    for image in range(3):
        members = record.members(2, image)
        assert sorted(patch for token in members for patch in token) == list(range(PATCHES))
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0


def test_scales_begin_as_nothing():
    torch.manual_seed(0)
    scales, x = MultiScale(8), torch.randn(2, 8, 6, 6)
    assert torch.equal(scales(x), x)
    nn.init.ones_(scales.gates)
    assert (scales(x) - x).abs().max() > 0.01


def test_soft_distillation_without_a_share_is_cross_entropy():
    torch.manual_seed(0)
    one, other, teacher = torch.randn(3, 5, 4)
    labels = torch.arange(5) % 4
    plain = distillation_loss(one, other, labels, teacher, hard=False, share=0.0)
    assert torch.allclose(plain, F.cross_entropy(one, labels))
    told = distillation_loss(one, teacher, labels, teacher, hard=False)
    assert torch.allclose(told, 0.9 * F.cross_entropy(one, labels))
