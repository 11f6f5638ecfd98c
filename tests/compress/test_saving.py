"""What is saved is what is loaded, to the bit, and nothing else is ever loaded silently."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import headwise
from headwise.compress import drop_layers, factorise, prune_channels, prune_heads, steps_of
from headwise.models import view
from headwise.models.backbones import Decoder
from headwise.models.default import default_model_path
from headwise.models.identity import weights_hash
from headwise.parts import Attention
from headwise.parts.position.rotary import Rotary
from tests.instruments import tiny
from tests.models.families import FAMILIES, inputs, scores


def _smaller(name: str) -> Any:
    """Different heads in every layer, one without attention, fewer channels, one layer less."""
    model = FAMILIES[name]("eager" if name in ("gemma2", "gpt_oss") else "sdpa")
    look = view(model)
    stack = look.stacks[-1] if len(look.stacks) > 1 else None
    if name != "olmo2" and not name.startswith("albert"):
        gone = [(0, h) for h in range(4)] + [(1, 1)]
        prune_heads(model, gone, stack=stack)
    if name != "gpt_oss" and not name.startswith("albert"):
        prune_channels(model, {1: [0, 3, 47]}, stack=stack)
        drop_layers(model, [0], parts="mlp", stack=stack)
    if sum(layer.stack == look.stacks[-1] for layer in look.layers) > 2 and "albert" not in name:
        drop_layers(model, [2], stack=stack)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_loaded_is_saved_to_the_bit(name: str, tmp_path: Path) -> None:
    model = _smaller(name)
    batch = inputs(model)
    assert headwise.save(model, tmp_path / "it") == tmp_path / "it"
    loaded = headwise.load(tmp_path / "it")
    assert type(loaded) is type(model)
    assert steps_of(loaded) == steps_of(model)
    assert weights_hash(loaded) == weights_hash(model)
    with torch.no_grad():
        assert torch.equal(scores(loaded(**batch)), scores(model(**batch)))
    # and once more, from the loaded one
    headwise.save(loaded, tmp_path / "again")
    one, other = (json.loads((tmp_path / p / "headwise.json").read_text()) for p in ("it", "again"))
    assert one == other


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "vit"])
def test_what_no_config_can_say_is_loaded_by_nobody_else(name: str, tmp_path: Path) -> None:
    model = _smaller(name)
    headwise.save(model, tmp_path / "it")
    assert not (tmp_path / "it" / "model.safetensors").exists()
    assert "`from_pretrained` cannot load it: " in (tmp_path / "it" / "README.md").read_text()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        type(model).from_pretrained(tmp_path / "it")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModel.from_pretrained(tmp_path / "it")


UNIFORM = (
    "llama",
    "mistral",
    "qwen2_window",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt_oss",
    "vit",
)


@pytest.mark.parametrize("name", UNIFORM)
def test_even_results_are_plain_checkpoints(name: str, tmp_path: Path) -> None:
    """A group of heads and as many channels of every layer, and a whole layer."""
    model = FAMILIES[name]("eager" if name in ("gemma2", "gpt_oss") else "sdpa")
    batch = inputs(model)
    prune_heads(
        model, [(layer, h) for layer in range(3) for h in (layer % 2 * 2, layer % 2 * 2 + 1)]
    )
    if name != "gpt_oss":
        prune_channels(model, {layer: range(layer, layer + 16) for layer in range(3)})
    drop_layers(model, [1])
    headwise.save(model, tmp_path / "it")
    with torch.no_grad():
        expected = scores(model(**batch))
    plain, told = type(model).from_pretrained(
        tmp_path / "it",
        attn_implementation=model.config._attn_implementation,
        output_loading_info=True,
    )
    assert not any(told.values())
    assert plain.config.num_attention_heads == 2
    assert plain.config.num_hidden_layers == 2
    with torch.no_grad():
        assert torch.equal(scores(plain.eval()(**batch)), expected)
        assert torch.equal(scores(headwise.load(tmp_path / "it")(**batch)), expected)


def test_without_headwise(tmp_path: Path) -> None:
    """In a process that cannot import headwise."""
    path = default_model_path()
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    look = view(model)
    groups = look.attentions[0].heads // look.attentions[0].kv_heads
    prune_heads(model, [(a.layer, h) for a in look.attentions for h in range(groups)])
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = model(ids).logits[0, -1, :7].tolist()
    headwise.save(model, tmp_path / "it", tokenizer=AutoTokenizer.from_pretrained(path))
    code = (
        "import sys; sys.modules['headwise'] = None\n"
        "import torch, json; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(json.dumps(model(torch.arange(5, 25)[None]).logits[0, -1, :7].tolist()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "it")],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(expected, abs=1e-5)


def test_generation_and_ties_and_steps_of_others(tmp_path: Path) -> None:
    model = tiny.llama(tie_word_embeddings=True)
    model.generation_config.max_new_tokens = 7
    factorise(model, {"input_ids": tiny.ids(16)}, rank=4)
    headwise.save(model, tmp_path / "it")
    loaded: Any = headwise.load(tmp_path / "it")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.generate(tiny.ids(5)), model.generate(tiny.ids(5)))
    assert loaded.generate(tiny.ids(5)).shape == (1, 12)


def test_buffers_are_restored_as_they_were(tmp_path: Path) -> None:
    """Rotary frequencies are in no checkpoint: a model in half precision keeps exact ones."""
    model = FAMILIES["llama"]("sdpa").bfloat16()
    model.model.rotary_emb.inv_freq = torch.tensor([1.0, 0.3, 0.07])
    headwise.save(model, tmp_path / "it")
    loaded: Any = headwise.load(tmp_path / "it")
    assert loaded.model.rotary_emb.inv_freq.tolist() == pytest.approx([1.0, 0.3, 0.07])
    assert loaded.dtype == torch.bfloat16
    single: Any = headwise.load(tmp_path / "it", dtype=torch.float32)
    assert {p.dtype for p in single.parameters()} == {torch.float32}
    assert headwise.load(tmp_path / "it", device="cpu").training is False


def _own(depth: int = 2) -> Decoder:
    return Decoder(
        20, 24, depth, mixer=lambda layer: Attention(24, 4, position=Rotary(), causal=True)
    ).eval()


def test_our_own_models_are_filled_into_what_the_caller_built(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = _own()
    prune_heads(model, [(0, 0), (1, 1), (1, 2)])
    drop_layers(model, [0], parts="mlp")
    headwise.save(model, tmp_path / "it")
    with pytest.raises(ValueError, match="into="):
        headwise.load(tmp_path / "it")
    ids = torch.arange(7)[None]
    loaded = headwise.load(tmp_path / "it", into=_own())
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))
    assert "into=model" in (tmp_path / "it" / "README.md").read_text()
    with pytest.raises(ValueError, match="has been changed already"):
        headwise.load(tmp_path / "it", into=loaded)
    with pytest.raises(ValueError, match="the folder holds a"):
        headwise.load(tmp_path / "it", into=tiny.llama())
    with pytest.raises(ValueError, match=r"no place|missing|layer"):
        headwise.load(tmp_path / "it", into=_own(3))


def test_watching_and_training_settings_do_not_stand_in_the_way(tmp_path: Path) -> None:
    model = _smaller("t5")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.37
    handle = model.register_forward_hook(lambda *a: None)
    headwise.save(model.train(), tmp_path / "it")
    handle.remove()
    batch = inputs(model.eval())
    with torch.no_grad():
        assert torch.equal(scores(headwise.load(tmp_path / "it")(**batch)), scores(model(**batch)))
