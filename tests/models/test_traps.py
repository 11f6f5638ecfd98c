"""What goes wrong silently elsewhere: each of these is a way to measure the wrong thing."""

import subprocess
import sys

import pytest
import torch

from headwise.models import (
    UnknownAttentionArgumentError,
    UnobservedError,
    UnsupportedModelError,
    observe,
    view,
)
from headwise.models.interface import attention_function
from tests.models import families
from tests.models.families import FAMILIES, inputs, transformers


def nothing(reading):
    pass


# -- the attention is registered without its mask ------------------------------------------------


def logits(model, ids, **more):
    with torch.no_grad(), observe(view(model), nothing):
        return model(input_ids=ids, **more).logits


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt"])
def test_causality_survives(name):
    model = FAMILIES[name]()
    ids = inputs(model)["input_ids"]
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 7) % families.VOCABULARY
    a, b = logits(model, ids), logits(model, changed)
    torch.testing.assert_close(a[:, :-1], b[:, :-1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(a[:, -1], b[:, -1])


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "distilbert"])
def test_padding_survives(name):
    model = FAMILIES[name]()
    given = inputs(model, padding="right")
    changed = given["input_ids"].clone()
    changed[1, -3:] = 9
    a = logits(model, given["input_ids"], attention_mask=given["attention_mask"])
    b = logits(model, changed, attention_mask=given["attention_mask"])
    torch.testing.assert_close(a[1, :-3], b[1, :-3], atol=1e-5, rtol=1e-5)


def test_the_window_of_mistral_survives():
    model = FAMILIES["mistral"](num_hidden_layers=1)
    ids = inputs(model)["input_ids"]
    changed = ids.clone()
    changed[:, 0] = 9
    a, b = logits(model, ids), logits(model, changed)
    assert not torch.allclose(a[:, 3], b[:, 3])  # a window of 4 counts the query itself
    torch.testing.assert_close(a[:, 4:], b[:, 4:], atol=1e-6, rtol=1e-6)


# -- arguments that nobody reads -----------------------------------------------------------------


def with_argument(model, **given):
    """The model, its attentions handing further arguments to whatever attends."""
    for layer in model.model.layers:
        own = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, own=own, **k: own(*a, **k, **given)
    return model


def test_unknown_arguments_raise_by_name():
    model = with_argument(FAMILIES["llama"](), block_indices=torch.ones(1))
    with (
        pytest.raises(UnknownAttentionArgumentError, match=r"LlamaAttention hands block_indices"),
        torch.no_grad(),
        observe(view(model), nothing),
    ):
        model(**inputs(model))
    assert model.config._attn_implementation == "eager"


def test_known_and_empty_arguments_do_not():
    model = with_argument(FAMILIES["llama"](), block_indices=None, deterministic=True)
    with torch.no_grad(), observe(view(model), nothing):
        model(**inputs(model))


def test_packing_lengths_matter_to_flash_kernels_only():
    module = view(FAMILIES["llama"]()).attentions[0].module
    from headwise.models.interface import interpret

    q, k = torch.randn(1, 4, 5, 6), torch.randn(1, 2, 5, 6)
    given = {"cu_seq_lens_q": torch.tensor([0, 5])}
    interpret(module, q, k, None, None, given, "sdpa")
    with pytest.raises(UnknownAttentionArgumentError, match="cu_seq_lens_q"):
        interpret(module, q, k, None, None, given, "flash_attention_2")


def test_learned_sinks_and_softcap_are_used():
    for name, field in (("gpt_oss", "sinks"), ("gemma2", "softcap")):
        model = FAMILIES[name]()
        found = []
        with (
            torch.no_grad(),
            observe(
                view(model), lambda r, to=found: to.append((r.map.scores, r.map.dense().sum(-1)))
            ),
        ):
            model(**inputs(model))
        assert all(getattr(scores, field) is not None for scores, _ in found)
        if name == "gpt_oss":
            assert all((mass < 1 - 1e-4).all() for _, mass in found)


# -- what an argument does not tell --------------------------------------------------------------


def test_an_eager_function_that_does_something_else_is_noticed(monkeypatch):
    from transformers.models.llama import modeling_llama

    own = modeling_llama.eager_attention_forward

    def sharper(module, query, key, value, attention_mask, scaling, **more):
        return own(module, query, key, value, attention_mask, scaling * 1.5, **more)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", sharper)
    model = FAMILIES["llama"]()
    with (
        pytest.raises(
            UnsupportedModelError, match=r"LlamaAttention: its own eager attention gives"
        ),
        torch.no_grad(),
        observe(view(model), nothing),
    ):
        model(**inputs(model))


def test_no_mask_means_what_it_meant_to_the_implementation_before():
    """Eager functions go by the mask alone, SDPA by is_causal where there is none."""
    from headwise.maps import Causal, Full, Window
    from headwise.models.interface import interpret

    module = view(FAMILIES["llama"]()).attentions[0].module
    q, k = torch.randn(1, 4, 5, 6), torch.randn(1, 2, 8, 6)

    def pattern(n_q, n_k, before, **given):
        return interpret(module, q[:, :, :n_q], k[:, :, :n_k], None, None, given, before).pattern

    assert pattern(5, 5, "eager") == Full()
    assert pattern(5, 5, "sdpa") == Causal()
    assert pattern(5, 5, "sdpa", is_causal=False) == Full()
    assert pattern(1, 8, "sdpa") == Full()
    assert pattern(5, 8, "sdpa") == Window(None, -3)  # SDPA aligns at the first key
    assert pattern(5, 8, "flash_attention_2") == Causal()


# -- models that do not take part ----------------------------------------------------------------

SMALL = {
    "vocab_size": 61,
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
GPT = {"vocab_size": 61, "n_embd": 40, "n_layer": 2, "n_head": 4}
REFUSED = {
    "GPTJForCausalLM": ("GPTJConfig", {**GPT, "rotary_dim": 4}, "GPTJAttention"),
    "BloomForCausalLM": (
        "BloomConfig",
        {"vocab_size": 61, "hidden_size": 40, "n_layer": 2, "n_head": 4},
        "BloomAttention",
    ),
    "FalconForCausalLM": ("FalconConfig", SMALL, "FalconAttention"),
    "GPTNeoForCausalLM": (
        "GPTNeoConfig",
        {
            "vocab_size": 61,
            "hidden_size": 40,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
        },
        "GPTNeoSelfAttention",
    ),
    "MptForCausalLM": (
        "MptConfig",
        {"vocab_size": 61, "d_model": 40, "n_heads": 4, "n_layers": 2},
        "MptAttention",
    ),
    "CodeGenForCausalLM": ("CodeGenConfig", {**GPT, "rotary_dim": 4}, "CodeGenAttention"),
    "DebertaV2Model": ("DebertaV2Config", SMALL, "DisentangledSelfAttention"),
    "MPNetModel": ("MPNetConfig", SMALL, "MPNetSelfAttention"),
    "LongformerModel": (
        "LongformerConfig",
        {**SMALL, "attention_window": 8},
        "LongformerSelfAttention",
    ),
    "BigBirdModel": ("BigBirdConfig", SMALL, "BigBird"),
    "DebertaModel": ("DebertaConfig", SMALL, "no attention was found"),
    "XLNetModel": (
        "XLNetConfig",
        {"vocab_size": 61, "d_model": 40, "n_layer": 2, "n_head": 4},
        "no attention was found",
    ),
    "RwkvModel": (
        "RwkvConfig",
        {"vocab_size": 61, "hidden_size": 40, "num_hidden_layers": 2},
        "no attention was found",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_outside_the_interface_are_refused_by_name(name, caplog):
    config, settings, reason = REFUSED[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError) as caught, observe(view(model), nothing):
        pass
    assert name in str(caught.value)
    assert reason in str(caught.value)
    assert model.config._attn_implementation == before
    assert not caplog.records  # transformers would only have logged a warning


def test_a_config_that_does_not_take_is_noticed(monkeypatch):
    model = FAMILIES["llama"]()
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    with (
        pytest.raises(UnsupportedModelError, match=r"did not take.*model\.layers\.0\.self_attn"),
        observe(view(model), nothing),
    ):
        pass


def test_an_attention_that_goes_its_own_way_is_noticed():
    model = FAMILIES["llama"]()
    stray = model.model.layers[1].self_attn
    stray.forward = lambda hidden_states, **more: (hidden_states, None)
    with (
        pytest.raises(
            UnobservedError, match=r"1 of 3 .*model\.layers\.1\.self_attn: it ran, but did not call"
        ),
        torch.no_grad(),
        observe(view(model), nothing),
    ):
        model(**inputs(model))
    assert model.config._attn_implementation == "eager"


def test_a_layer_that_is_left_out_is_noticed():
    model = FAMILIES["llama"]()
    model.model.layers[2].forward = lambda hidden_states, **more: hidden_states
    with (
        pytest.raises(UnobservedError, match=r"layers\.2\.self_attn: its module ran 0 times"),
        torch.no_grad(),
        observe(view(model), nothing),
    ):
        model(**inputs(model))


def test_an_attention_that_attends_twice_is_noticed():
    settings = families.DECODER | {"num_hidden_layers": 1}
    made = transformers.DiffLlamaConfig(**settings)
    model = transformers.DiffLlamaForCausalLM(made).eval()
    model.set_attn_implementation("sdpa")
    with (
        pytest.raises(UnobservedError, match="attended 2 times in one forward pass"),
        torch.no_grad(),
        observe(view(model), nothing),
    ):
        model(**inputs(model))


def test_exchanged_modules_are_noticed():
    model = FAMILIES["gpt2"]()
    seen = view(model)
    model.transformer = FAMILIES["gpt2"]().transformer
    with (
        pytest.raises(RuntimeError, match="inside `with"),
        torch.no_grad(),
        observe(seen, nothing),
    ):
        model(**inputs(model))


# -- and what we must not do ourselves -----------------------------------------------------------


def test_dropout_of_attention_weights_is_refused():
    model = FAMILIES["llama"](attention_dropout=0.5).train()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"), observe(view(model), nothing):
        model(**inputs(model))


def test_the_attention_works_inside_observe_only():
    q = torch.randn(1, 4, 5, 6)
    with pytest.raises(RuntimeError, match="inside `with"):
        attention_function(torch.nn.Linear(1, 1), q, q, q, None)


def test_import_brings_in_neither_torch_nor_transformers_and_registers_nothing():
    code = """
import sys
import headwise.models
assert "torch" not in sys.modules and "transformers" not in sys.modules
from headwise.models import view, observe
assert "torch" in sys.modules and "transformers" not in sys.modules
import transformers
assert "headwise" not in transformers.AttentionInterface().valid_keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
