"""Patching sweeps of TransformerLens 4 on the same models and prompts: the same numbers.

It needs an environment of its own, see transformerlens/README.md beside this file.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip(
    "transformer_lens", reason="TransformerLens is absent: see tests/proof/transformerlens"
)

import transformer_lens.patching as lens_patching
from transformers import LlamaForCausalLM

from headwise.instruments.metrics import LogitDifference
from headwise.instruments.patching import patch
from tests.proof.lens import RANDOM, VOCABULARY, bridge, llama, native_llama

AGREES = 1e-4
# ours -> theirs, and whether heads are the second axis
SWEEPS = {
    "residual": (lens_patching.get_act_patch_resid_pre, "all"),
    "attention": (lens_patching.get_act_patch_attn_out, "all"),
    "mlp": (lens_patching.get_act_patch_mlp_out, "all"),
    "heads": (lens_patching.get_act_patch_attn_head_out_all_pos, "together"),
    "queries": (lens_patching.get_act_patch_attn_head_q_all_pos, "together"),
}


def prompts(size: int, n: int = 12, batch: int = 3) -> tuple[Tensor, Tensor]:
    """Behind token 0, the same but for some in the middle and the last."""
    generator = torch.Generator().manual_seed(2)
    clean, other = torch.randint(1, size, (2, batch, n), generator=generator)
    clean[:, 0] = 0
    corrupted = clean.clone()
    corrupted[:, 3:6] = other[:, 3:6]
    corrupted[:, -1] = other[:, -1]
    return clean, corrupted


def compare(model: Any, lens: Any, size: int, sites: Any = SWEEPS) -> None:
    clean, corrupted = prompts(size)
    with torch.no_grad():  # what either says, or its second choice
        right = model(clean).logits[:, -1].argmax(-1)
        said = model(corrupted).logits[:, -1].topk(2).indices
    wrong = torch.where(said[:, 0] == right, said[:, 1], said[:, 0])
    rows = torch.arange(len(clean))

    def metric(logits: Tensor) -> Tensor:
        last = logits[:, -1]
        return (last[rows, right] - last[rows, wrong]).mean()

    with torch.no_grad():
        _, cache = lens.run_with_cache(clean)
    for site in sites:
        sweep, positions = SWEEPS[site]
        with torch.no_grad():
            expected = sweep(lens, corrupted, cache, metric).numpy()
        table = patch(model, clean, corrupted, LogitDifference(right, wrong), site, positions)
        found = table.values[: len(expected)]  # theirs has no row past the last layer
        size_of = np.abs(table.effects).max()
        print(f"\n{site}: {np.abs(found - expected).max():.1e} of effects up to {size_of:.2f}")
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=AGREES)
        assert size_of > 0.01


@pytest.mark.parametrize("name", RANDOM)
def test_sweeps_over_random_models_agree(name):
    model = RANDOM[name]()
    compare(model, bridge(model), VOCABULARY)


def test_sweeps_over_a_native_llama_agree():
    model = llama()
    compare(
        model, native_llama(model).eval(), VOCABULARY, ("residual", "attention", "mlp", "heads")
    )


def test_sweeps_over_the_story_teller_agree(assets):
    model = LlamaForCausalLM.from_pretrained(assets / "stories260K" / "hf").eval()
    compare(model, bridge(model), 512, ("residual", "attention", "mlp", "heads"))
