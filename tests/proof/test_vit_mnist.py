"""Vision transformers of 0.1 to 0.5 million parameters that read MNIST digits.

Weights: researchase/vit-mnist-explorations (MIT); on all 10,000 test images they are right in
97.21 %, 99.46 % and 99.17 % of cases. Here the first 1,000 images are taken, of which the loader
beside the weights, a model of its own, gets 965 right.
"""

import pytest
import torch

from headwise.models import AttentionReading, observe, view
from tests.proof.eager import CLOSE, differences
from tests.proof.mnist_vit import as_vit
from tests.proof.weights import loader

IMAGES = 1000


@pytest.fixture(scope="module")
def source(assets):
    return loader(assets / "vit_mnist" / "vit_mnist.py")


@pytest.fixture(scope="module")
def digits(source) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = source.mnist_test()
    return images[:IMAGES], labels[:IMAGES]


def converted(assets, name: str, implementation: str = "sdpa"):
    path = assets / "vit_mnist" / f"{name}.pt"
    weights = torch.load(path, map_location="cpu", weights_only=True)
    return as_vit(weights, attn_implementation=implementation)


@torch.no_grad()
def right(model, digits) -> int:
    images, labels = digits
    scores = torch.cat([model(part).logits for part in images.split(250)])
    return int((scores.argmax(-1) == labels).sum())


def test_965_of_1000_digits_are_read_observed_and_unobserved(assets, digits):
    model = converted(assets, "vit_mnist_gpu")
    seen: set[int] = set()
    with observe(view(model), read=lambda r: seen.add(r.attention.layer)):
        assert right(model, digits) == pytest.approx(965, abs=1)
    assert seen == set(range(6))
    assert right(model, digits) == pytest.approx(965, abs=1)


@pytest.mark.parametrize("name", ["vit_mnist_3class", "vit_mnist_3class_attn_only"])
def test_the_small_models_read_0_1_and_2_under_observation(assets, digits, name):
    model = converted(assets, name)
    some = digits[1] < 3
    with observe(view(model), read=lambda r: None):
        found = right(model, (digits[0][some], digits[1][some]))
    assert found / int(some.sum()) > 0.98


@pytest.mark.parametrize(
    "name", ["vit_mnist_gpu", "vit_mnist_3class", "vit_mnist_3class_attn_only"]
)
def test_every_statistic_agrees_with_the_eager_matrices(assets, source, digits, name):
    model = converted(assets, name)
    images = digits[0][:24]
    with torch.no_grad():
        theirs = source.load(f"{name}.pt")(images)
        assert (model(images).logits - theirs).abs().max() < 1e-3
    found = differences(model, {"pixel_values": images})
    assert max(found.values()) < CLOSE, found


@torch.no_grad()
def test_heads_of_layer_4_gather_on_few_patches_with_ink(assets, digits):
    """In 49 patches of 4 x 4 pixels about a third has ink. The first heads of layer 4 put nearly
    all there, most of it on one patch; no head looks at its own place or its neighbours."""
    images = digits[0][:200]
    ink = torch.nn.functional.max_pool2d(images, 4).flatten(1) > 0
    ink = torch.nn.functional.pad(ink, (1, 0))  # the class token has none
    numbers: dict[str, list[torch.Tensor]] = {"ink": [], "entropy": [], "most": [], "self": []}

    def read(reading: AttentionReading) -> None:
        found, summary = reading.map, reading.map.summary()
        numbers["ink"].append(found.mass_on(ink).mean((0, 2)))
        numbers["entropy"].append(summary.entropy.mean((0, 2)))
        numbers["most"].append(summary.received.amax(-1).mean(0) / 50)
        numbers["self"].append(found.mass_at(torch.arange(50)).mean((0, 2)))

    model = converted(assets, "vit_mnist_gpu")
    with observe(view(model), read=read):
        model(images)
    table = {name: torch.stack(layers) for name, layers in numbers.items()}
    assert ink.float().mean() < 0.4
    assert table["ink"][4, :2].min() > 0.75
    assert table["ink"].mean() < 0.6
    assert table["most"][4, :3].min() > 0.5
    sharpest = table["entropy"].flatten().topk(3, largest=False).indices
    assert sorted(sharpest.tolist()) == [16, 17, 18]
    assert table["entropy"][4, :3].max() < 1.3
    assert table["self"].max() < 0.06
