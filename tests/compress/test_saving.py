"""What is saved is what is loaded, to the bit, and nothing else is ever loaded silently."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import headwise
import headwise.compress.folder as folder
import headwise.compress.tensors as tensors
from headwise.compress import drop_layers, factorise, prune_channels, prune_heads, steps_of
from headwise.compress.folder import remains_of
from headwise.models import UnsupportedModelError, view
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


# -- what must not happen ------------------------------------------------------------------------


def test_changes_that_no_step_made_are_refused(tmp_path: Path) -> None:
    model = tiny.llama()
    mlp: Any = model.model.layers[0].mlp
    mlp.down_proj = torch.nn.Linear(48, 32, bias=True)
    with pytest.raises(UnsupportedModelError, match=r"mlp\.down_proj.*no Step"):
        headwise.save(model, tmp_path / "it")
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    headwise.save(_smaller("llama"), tmp_path / "it")
    file = tmp_path / "it" / "headwise.safetensors"
    right = load_file(file)
    manifest = tmp_path / "it" / "headwise.json"

    def wrong(tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, file)
        said = json.loads(manifest.read_text())
        said["weights"]["hash"] = weights_hash(file)
        manifest.write_text(json.dumps(said))

    wrong({n: t for n, t in right.items() if n != "model.norm.weight"})
    with pytest.raises(ValueError, match=r"missing: model\.norm\.weight"):
        headwise.load(tmp_path / "it")
    wrong({**right, "model.more": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"no place for: model\.more"):
        headwise.load(tmp_path / "it")
    wrong({**right, "model.norm.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight is \(3,\)"):
        headwise.load(tmp_path / "it")


def test_damage_is_noticed(tmp_path: Path) -> None:
    place = tmp_path / "it"
    headwise.save(tiny.llama(), place)
    file = place / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is not what was saved"):
        headwise.load(place)
    said = json.loads((place / "headwise.json").read_text())
    (place / "headwise.json").write_text(json.dumps({**said, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        headwise.load(place)
    (place / "headwise.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        headwise.load(place)
    with pytest.raises(FileNotFoundError, match="not written by save"):
        headwise.load(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("class", "os.path.join", "no model class of transformers"),
        ("class", "transformers.AutoTokenizer", "no model class of transformers"),
        ("steps", [{"step": "os.system", "command": "true"}], "is not known"),
        ("weights", {"file": "../../secret", "hash": ""}, "no version wrote"),
    ],
)
def test_a_manifest_runs_and_reads_nothing_else(
    key: str, value: Any, said: str, tmp_path: Path
) -> None:
    place = tmp_path / "it"
    headwise.save(tiny.llama(), place)
    manifest = json.loads((place / "headwise.json").read_text())
    (place / "headwise.json").write_text(json.dumps({**manifest, key: value}))
    with pytest.raises(ValueError, match=said):
        headwise.load(place)


def test_a_folder_that_is_there_stays_unless_it_is_to_go(tmp_path: Path) -> None:
    place = tmp_path / "it"
    place.mkdir()
    (place / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        headwise.save(tiny.llama(), place)
    assert [f.name for f in place.iterdir()] == ["mine.txt"]
    headwise.save(tiny.llama(), place, overwrite=True)
    assert not (place / "mine.txt").exists()
    headwise.load(place)
    assert [f.name for f in tmp_path.iterdir()] == ["it"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("killed_at", range(9))
def test_death_at_any_moment_loses_nothing(
    killed_at: int, before: bool, exchange: bool, tmp_path: Path
) -> None:
    """A process ends without a word at its n-th step on the disk; what was there is there."""
    place = tmp_path / "it"
    first, second = tiny.llama(num_hidden_layers=1), tiny.llama()
    if before:
        headwise.save(first, place)
    child = os.fork()
    if child == 0:
        try:
            _save_and_die(second, place, killed_at, exchange)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, 9)
    if place.exists():
        found: Any = headwise.load(place)
        assert found.config.num_hidden_layers in ((1, 2) if before else (2,))
        headwise.save(first, place, overwrite=True)  # and whatever was left is in nobody's way
    elif before:  # between two renames, where folders cannot be exchanged at once
        assert not exchange
        with pytest.raises(FileNotFoundError, match=r"\.old holds what stood there"):
            headwise.load(place)
        found = headwise.load(remains_of(place)[-1])
        assert found.config.num_hidden_layers == 1


def _save_and_die(model: Any, place: Path, killed_at: int, exchange: bool) -> None:
    count = 0

    def dying(what: Any) -> Any:
        def done(*args: Any, **more: Any) -> Any:
            nonlocal count
            if count == killed_at:
                os._exit(9)
            count += 1
            return what(*args, **more)

        return done

    swapped: Any = folder._exchange if exchange else lambda one, other: False
    folder._exchange = dying(swapped)  # type: ignore[assignment]
    tensors.save_file = dying(tensors.save_file)  # type: ignore[assignment]
    Path.write_text = dying(Path.write_text)  # type: ignore[method-assign]
    Path.rename = dying(Path.rename)  # type: ignore[method-assign]
    shutil.rmtree = dying(shutil.rmtree)  # type: ignore[assignment]
    headwise.save(model, place, overwrite=True)
    os._exit(0)
