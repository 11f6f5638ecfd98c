"""Composition scores of all pairs of heads: TransformerLens 4 gives the same numbers.

TransformerLens takes weights as they are, headwise folds the norm's gain in front of the reader
in: so the gains are folded into a copy of the model by hand, which is the same model. See
transformerlens/README.md for its environment.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip(
    "transformer_lens", reason="TransformerLens is absent: see tests/proof/transformerlens"
)

from transformers import LlamaForCausalLM

from headwise.instruments.composition_scores import composition
from tests.proof.lens import bridge, llama


@torch.no_grad()
def folded(model: Any) -> Any:
    """The same model, its gains in front of attentions one."""
    made = copy.deepcopy(model)
    for layer in made.model.layers:
        gain = layer.input_layernorm.weight
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight.mul_(gain)
        gain.fill_(1.0)
    return made


@pytest.fixture(params=["random", "stories260K"])
def model(request: pytest.FixtureRequest) -> Any:
    if request.param == "random":
        made = llama()
        with torch.no_grad():
            for layer in made.model.layers:
                layer.input_layernorm.weight.uniform_(0.2, 3.0)
        return made
    assets = request.getfixturevalue("assets")
    return LlamaForCausalLM.from_pretrained(assets / "stories260K" / "hf", dtype=torch.float32)


@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_all_scores_agree(model: Any, kind: str) -> None:
    theirs = bridge(folded(model)).all_composition_scores(kind.upper())
    expected = getattr(theirs, "scores", theirs).detach().double().flatten(2).flatten(0, 1).numpy()
    found = composition(model, (kind,)).scores[kind]
    asked = ~np.isnan(found)
    assert asked.sum() > 0
    assert (expected[~asked] == 0).all()
    difference = np.abs(found - expected)[asked].max()
    print(f"\n{kind}: {asked.sum()} pairs, largest difference {difference:.1e}")
    assert difference < 1e-5
