"""A real vision transformer reads digits with half of its patches, and which half matters.

The dense model reads 965 of the first 1,000 test images. With 25 of 49 patches from layer 1 on:
957 by class attention, 955 with similar ones joined, 928 with patches drawn by chance.
"""

import pytest
import torch

from headwise.compress import reduce_tokens
from tests.proof.mnist_vit import as_vit
from tests.proof.weights import loader


@pytest.fixture(scope="module")
def digits(assets):
    images, labels = loader(assets / "vit_mnist" / "vit_mnist.py").mnist_test()
    return images[:1000], labels[:1000]


@pytest.fixture(scope="module")
def model(assets):
    path = assets / "vit_mnist" / "vit_mnist_gpu.pt"
    return as_vit(torch.load(path, map_location="cpu", weights_only=True))


@torch.no_grad()
def right(model, digits) -> int:
    images, labels = digits
    scores = torch.cat([model(part).logits for part in images.split(250)])
    return int((scores.argmax(-1) == labels).sum())


def test_half_of_the_patches_are_enough_if_they_are_the_right_half(model, digits):
    whole = right(model, digits)
    assert whole == pytest.approx(965, abs=1)
    found = {}
    for how in ("class", "similar"):
        with reduce_tokens(model, schedule={1: 0.5}, how=how):
            found[how] = right(model, digits)
    with reduce_tokens(model, schedule={1: 0.5}, how="random"):
        chance = right(model, digits)
    assert found["class"] >= 950
    assert min(found.values()) >= 945
    assert chance <= 938
    # what random patches cost, class attention costs less than half of
    assert whole - found["class"] < (whole - chance) / 2
    assert right(model, digits) == whole


def test_joining_keeps_more_than_dropping_where_few_tokens_are_left(model, digits):
    found = {}
    for how in ("class", "similar", "random"):
        with reduce_tokens(model, schedule={1: 5}, how=how):
            found[how] = right(model, digits)
    assert found["similar"] > found["class"] + 15 > found["random"] + 15
    assert found["similar"] >= 895


def test_patches_with_ink_survive(model, digits):
    """A third of the patches has ink; of the 13 that class attention keeps in layer 4, two
    thirds; of 13 drawn by chance, a third."""
    images = digits[0][:200]
    ink = torch.nn.functional.max_pool2d(images, 4).flatten(1) > 0
    shares = {}
    for how in ("class", "random"):
        with torch.no_grad(), reduce_tokens(model, schedule={4: 13}, how=how) as record:
            model(images)
        groups = record.kept(4)
        kept = (groups >= 0) & (groups < 13)  # beyond is the fused rest
        assert (kept.sum(1) == 13).all()
        shares[how] = float(ink[kept].float().mean())
    assert shares["class"] > 0.6
    assert shares["random"] < 0.4
