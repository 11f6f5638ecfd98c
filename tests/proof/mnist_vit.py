"""The MNIST vision transformers as Hugging Face ViTs, exactly.

Their heads are wider than width / heads (64 of 64 in width 64), which ViTConfig allows by
`head_dim`; the attention-only model gets MLPs that add nothing.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from tests.proof.nothing import Nothing

HEADS = 4


@torch.no_grad()
def as_vit(weights: dict[str, Tensor], **settings: Any) -> ViTForImageClassification:
    """weights: a state dict of vit-mnist-explorations (4 heads, 28 x 28 pixels, one channel)."""
    with_mlp = any(".net." in name for name in weights)
    at = "0." if with_mlp else ""
    layers = 1 + max(int(n.split(".")[2]) for n in weights if n.startswith("transformer.layers"))
    width = weights["cls_token"].shape[-1]
    patch = round(weights["to_patch_embedding.1.weight"].shape[1] ** 0.5)
    hidden = weights["transformer.layers.0.1.fn.net.0.weight"].shape[0] if with_mlp else 1
    configure: Any = ViTConfig  # it takes more than its own signature says
    config = configure(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        head_dim=weights[f"transformer.layers.0.{at}fn.to_qkv.weight"].shape[0] // 3 // HEADS,
        intermediate_size=hidden,
        hidden_act="relu",
        layer_norm_eps=1e-5,
        image_size=28,
        patch_size=patch,
        num_channels=1,
        qkv_bias=False,
        num_labels=weights["mlp_head.1.weight"].shape[0],
        **settings,
    )
    model = ViTForImageClassification(config)
    named = {
        "vit.embeddings.cls_token": weights["cls_token"],
        "vit.embeddings.position_embeddings": weights["pos_embedding"],
        "vit.embeddings.patch_embeddings.projection.weight": weights[
            "to_patch_embedding.1.weight"
        ].view(width, 1, patch, patch),
        "vit.embeddings.patch_embeddings.projection.bias": weights["to_patch_embedding.1.bias"],
        "vit.layernorm.weight": weights["mlp_head.0.weight"],
        "vit.layernorm.bias": weights["mlp_head.0.bias"],
        "classifier.weight": weights["mlp_head.1.weight"],
        "classifier.bias": weights["mlp_head.1.bias"],
    }
    for layer in range(layers):
        theirs, ours = f"transformer.layers.{layer}.", f"vit.layers.{layer}."
        qkv = weights[f"{theirs}{at}fn.to_qkv.weight"].chunk(3)
        for name, part in zip("qkv", qkv, strict=True):
            named[f"{ours}attention.{name}_proj.weight"] = part
        pairs = {f"{at}norm": "layernorm_before", f"{at}fn.to_out.0": "attention.o_proj"}
        if with_mlp:
            pairs |= {"1.norm": "layernorm_after", "1.fn.net.0": "mlp.fc1", "1.fn.net.3": "mlp.fc2"}
        else:
            model.vit.layers[layer].mlp = Nothing()
        for source, target in pairs.items():
            for kind in ("weight", "bias"):
                named[f"{ours}{target}.{kind}"] = weights[f"{theirs}{source}.{kind}"]
    found = model.load_state_dict(named, strict=False)
    assert not found.unexpected_keys, found
    assert all("layernorm_after" in name and not with_mlp for name in found.missing_keys), found
    return model.eval()
