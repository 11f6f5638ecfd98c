"""Small random vision encoders whose attention is far from even."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

from headwise.models.backbones import VisionPatches
from headwise.models.heads import Classify
from headwise.parts import Attention

SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 24,
    "patch_size": 4,
}
PATCHES = 36
_DINO = {key: value for key, value in SIZE.items() if key != "intermediate_size"}

MAKE: dict[str, Any] = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**SIZE)),
    "deit": lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZE)),
    "dinov2": lambda: Dinov2ForImageClassification(
        Dinov2Config(**_DINO, mlp_ratio=2, layerscale_value=0.7)
    ),
    "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**_DINO)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZE)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZE)),
    "patches": lambda: VisionPatches(
        24,
        4,
        dim=32,
        depth=4,
        mixer=lambda layer: Attention(32, 4),
        head=Classify(32, 5, pool="first"),
        class_token=True,
    ),
}
SPECIAL = {"vit": 1, "deit": 2, "dinov2": 1, "registers": 5, "clip": 1, "siglip": 0, "patches": 1}


def make(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = MAKE[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.25)
    return model.eval()


def images(count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


def answer(model: Any, pixels: Tensor) -> Tensor:
    """Logits, or the last hidden state of the first token."""
    found = model(pixel_values=pixels)
    if isinstance(found, Tensor):
        return found
    if getattr(found, "logits", None) is not None:
        return found.logits
    return found.last_hidden_state[:, 0]
