import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwise.compress import drop_layers, fuse_layer, steps_of
from headwise.compress.structure.fusing import _Injected
from headwise.models import view
from headwise.models.backbones import Decoder
from headwise.models.default import default_model_path, default_text
from headwise.parts import Attention
from tests.instruments import tiny

torch.set_num_threads(1)

INPUTS = {"input_ids": tiny.ids(16, batch=16)}


def test_the_formula():
    torch.manual_seed(0)
    weight, other = torch.randn(5, 4), torch.randn(5, 4)
    injected = _Injected(other, 2, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(injected(weight), weight, atol=0, rtol=0)
    with torch.no_grad():
        for parameter in injected.parameters():
            parameter.normal_()
    for row in range(5):
        for column in range(4):
            c = sum(injected.left[row, k] * injected.right[k, column] for k in range(2))
            add = sum(injected.add_left[row, k] * injected.add_right[k, column] for k in range(3))
            want = weight[row, column] + c * other[row, column] + add
            torch.testing.assert_close(injected(weight)[row, column], want)


@pytest.mark.parametrize("name", ["llama", "own"])
def test_without_steps_it_is_removal(name):
    if name == "llama":
        model = tiny.llama(num_hidden_layers=5)
    else:
        torch.manual_seed(0)
        model = Decoder(60, 32, 5, mixer=lambda layer: Attention(32, 4, causal=True)).eval()
    other = copy.deepcopy(model)
    found = fuse_layer(model, INPUTS, 2, group=2, steps=0)
    drop_layers(other, [2])
    with torch.no_grad():
        a, b = model(INPUTS["input_ids"]), other(INPUTS["input_ids"])
    torch.testing.assert_close(getattr(a, "logits", a), getattr(b, "logits", b))
    assert found.group == (1, 3)
    assert found.before == pytest.approx(found.after)
    assert [type(s).__name__ for s in steps_of(model)] == ["DropLayers"]


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_groups_at_the_ends_and_only_they_change(layer):
    model = tiny.llama(num_hidden_layers=6)
    kept = copy.deepcopy(model)
    kept.model.layers[1].requires_grad_(False)
    model.model.layers[1].requires_grad_(False)
    found = fuse_layer(model, INPUTS, layer, group=2, steps=3)
    assert found.group == {0: (1, 2), 3: (2, 4), 5: (3, 4)}[layer]
    assert len(view(model).layers) == 5
    places = [n for n in range(6) if n != layer]
    for now, was in enumerate(places):
        mine = dict(model.model.layers[now].named_parameters())
        for name, before in kept.model.layers[was].named_parameters():
            same = torch.equal(mine[name], before)
            assert same != (was in found.group and "proj" in name)
            assert mine[name].requires_grad == (was != 1)
            assert mine[name].grad is None
    assert not any("parametrizations" in name for name, _ in model.named_modules())
    assert not any(m._forward_hooks for m in model.modules())
    model.generate(INPUTS["input_ids"][:1], max_new_tokens=3, pad_token_id=0)


def test_fused_is_nearer_to_the_model_than_removed():
    path = default_model_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(default_text(12000)[0], return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)
    cut = len(rows) * 2 // 3
    fused, removed = copy.deepcopy(model), copy.deepcopy(model)
    middle = len(model.model.layers) // 2
    found = fuse_layer(fused, {"input_ids": rows[:cut]}, middle, group=2, steps=60)
    drop_layers(removed, [middle])
    assert found.after < 0.8 * found.before
    with torch.no_grad():
        clean = model(rows[cut:]).logits.log_softmax(-1)

        def price(other):
            now = other(rows[cut:]).logits.log_softmax(-1)
            return float((clean.exp() * (clean - now)).sum(-1).mean())

        assert price(fused) < 0.8 * price(removed)


def test_gpt2_with_its_biases():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=4, n_head=4, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    found = fuse_layer(model, INPUTS, 1, group=2, steps=20, update=2)
    assert found.after < found.before


def test_refusals():
    model = tiny.llama(num_hidden_layers=3)
    with pytest.raises(ValueError, match="layers 0 to 2"):
        fuse_layer(model, INPUTS, 3)
    with pytest.raises(ValueError, match="group of 1 to 2"):
        fuse_layer(model, INPUTS, 1, group=3)
    model.model.layers[2].mlp.up_proj = torch.nn.Linear(32, 40, bias=False)
    with pytest.raises(ValueError, match="differs"):
        fuse_layer(model, INPUTS, 1, group=2)
