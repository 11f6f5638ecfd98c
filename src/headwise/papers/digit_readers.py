"""Small vision transformers that read digits, for claims about the tokens of such models."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from headwise.models.backbones import VisionPatches
from headwise.models.heads import Classify
from headwise.parts import Attention
from headwise.tasks.bundled import Digits
from headwise.train import fit, seeded


def untrained_reader(
    seed: int, image: int, patch: int, dim: int, depth: int, heads: int, pool: str = "first"
) -> VisionPatches:
    """A transformer over patches with a class token. pool: what the answer is read off, "first"
    (the class token) or "mean"."""
    with seeded(seed):
        return VisionPatches(
            image,
            patch,
            dim,
            depth,
            mixer=lambda layer: Attention(dim, heads),
            head=Classify(dim, 10, pool=pool),
            channels=1,
            class_token=True,
        )


@cache
def trained_reader(seed: int, pool: str = "first") -> VisionPatches:
    """Three layers that read digits of 8 x 8 pixels in 16 patches, trained with all of them; not
    to be changed."""
    model = untrained_reader(seed, 8, 2, 32, 3, 4, pool)
    fit(model, Digits(), steps=250, size=64, rate=6e-3, seed=seed)
    return model.eval()


@cache
def held_out_digits() -> tuple[Tensor, Tensor]:
    """360 test images `(360, 1, 8, 8)` and what they show."""
    batch = Digits().all("test")
    return batch.inputs["pixel_values"], batch.targets


@torch.no_grad()
def share_right(model: VisionPatches) -> float:
    """Of the test images."""
    images, labels = held_out_digits()
    return float((model(images).argmax(-1) == labels).float().mean())
