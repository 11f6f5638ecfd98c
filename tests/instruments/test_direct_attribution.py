"""Contributions against loops in float64, their sum against the model's logits, and refusals."""

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from headwise.instruments.direct_attribution import direct_effects
from headwise.instruments.metrics import LogitDifference
from headwise.instruments.targets import LogitOf
from headwise.models import UnsupportedModelError, view
from headwise.models.backbones import Decoder
from headwise.models.sites import Site, recording
from headwise.parts import Attention, Rotary
from tests.instruments import tiny


def gemma2():
    config = Gemma2Config(
        **tiny.SIZE, num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0
    )
    return tiny._sharp(Gemma2ForCausalLM(config))


def granite():
    config = GraniteConfig(
        **tiny.SIZE, num_key_value_heads=2, residual_multiplier=0.3, logits_scaling=5.0
    )
    return tiny._sharp(GraniteForCausalLM(config))


def biased():
    model = tiny.llama(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def own(**more):
    torch.manual_seed(0)
    return Decoder(
        tiny.VOCABULARY,
        32,
        3,
        mixer=lambda layer: Attention(32, 4, position=Rotary(), causal=True),
        **more,
    ).eval()


def gpt2():
    model = tiny.gpt2()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "ln_f" in name:
                parameter.normal_(0.3, 0.5)
    return model


MODELS = {
    "llama": tiny.llama,
    "biased": biased,
    "gpt2": gpt2,
    "gemma2": gemma2,
    "granite": granite,
    "gpt_oss": tiny.gpt_oss,
    "own": own,
    "own without mlps": lambda: own(feed=lambda layer: None),
}


@pytest.mark.parametrize("name", MODELS)
def test_everything_adds_up_to_the_logit(name):
    model, ids = MODELS[name](), tiny.ids(11, batch=5)
    found = direct_effects(model, ids, torch.tensor([7, 3, 9, 9, 30]), batch_size=2)
    with torch.no_grad():
        out = model(ids)
    logits = getattr(out, "logits", out)[range(5), -1, [7, 3, 9, 9, 30]]
    if name == "gemma2":
        logits = 3 * torch.atanh(logits / 3)
        assert "before the soft cap of 3" in found.target
        assert model.config.final_logit_softcapping == 3.0
    assert found.score == pytest.approx(logits.numpy(), abs=1e-4 if name != "gemma2" else 1e-2)
    assert found.total == pytest.approx(found.score, abs=1e-4)
    assert found.heads.shape == (5, len(found.places))
    if name == "own without mlps":
        assert (found.mlps == 0).all()


def test_a_classifier_falls_into_the_same_sum():
    model, pixels = tiny.vit(), torch.randn(3, 3, 32, 32)
    found = direct_effects(model, pixels, LogitDifference(1, 0))
    with torch.no_grad():
        logits = model(pixels).logits
    assert found.total == pytest.approx((logits[:, 1] - logits[:, 0]).numpy(), abs=1e-4)


def test_heads_by_hand_with_grouped_values_biases_and_a_layer_norm():
    """The head's vector through the norm whose mean and size are the sum's, on one unembedding."""
    for model in (biased(), gpt2()):
        look, ids = view(model), tiny.ids(9)
        found = direct_effects(model, ids, LogitOf(12, at=4))
        sites = [Site("heads", 1), Site("residual", 2)]
        with recording(look, sites) as seen, torch.no_grad():
            model(ids)
        outputs, last = seen[sites[0]][0, 4].double(), seen[sites[1]][0, 4].double()
        weight = look.attentions[1].output_weight().detach().double()
        gain = look.final_norm.weight.detach().double()
        row = look.unembedding[12].detach().double()
        is_layer_norm = isinstance(look.final_norm, torch.nn.LayerNorm)
        middle = last - last.mean() if is_layer_norm else last
        eps = look.final_norm.eps if is_layer_norm else look.final_norm.variance_epsilon
        size = (middle.pow(2).mean() + eps).sqrt()
        for head in range(4):
            vector = [
                sum(float(weight[head, i, d] * outputs[head, d]) for d in range(8))
                for i in range(32)
            ]
            mean = sum(vector) / 32 if is_layer_norm else 0.0
            expected = sum(
                float(row[i] * gain[i]) * (vector[i] - mean) / float(size) for i in range(32)
            )
            assert found.heads[0, 4 + head] == pytest.approx(expected, abs=1e-4)


def test_a_head_that_is_silent_writes_nothing_and_the_others_stay():
    model = tiny.llama()
    last = model.model.layers[1].self_attn.o_proj
    with torch.no_grad():
        last.weight[:, 8:16] = 0
    found = direct_effects(model, tiny.ids(9), 5)
    assert found.heads[0, 5] == pytest.approx(0, abs=1e-9)
    assert np.abs(found.heads[0, [4, 6, 7]]).min() > 1e-4


def test_it_comes_as_an_atlas():
    atlas = direct_effects(tiny.llama(), tiny.ids(9, batch=4)).atlas()
    assert atlas.heads["direct_effect"].shape == (8,)
    assert atlas.spread["direct_effect"].min() > 0
    assert atlas.columns["direct_effect"].unit == "logits"
    assert set(atlas.layers) == {"layer", "direct_attention", "direct_mlp"}
    assert atlas.name(5) == "L1H1"


@pytest.mark.filterwarnings("error")
def test_what_is_no_sum_is_refused():
    with pytest.raises(UnsupportedModelError, match="head of BertForMaskedLM is not linear"):
        direct_effects(tiny.bert(), tiny.ids(9))
    both = {"input_ids": tiny.ids(9), "decoder_input_ids": tiny.ids(7)}
    with pytest.raises(UnsupportedModelError, match="layer 0"):
        direct_effects(tiny.bart(), both)
    with pytest.raises(ValueError, match="not linear in the logits"):
        direct_effects(tiny.llama(), tiny.ids(9), "loss")
