import copy
import json

import pytest
import torch
from torch import nn

from headwise.compress import (
    merge_layers,
    reorder_layers,
    share_layers,
    steps_of,
    take,
)
from headwise.compress.step import read_step, write_step
from headwise.compress.structure.sharing import ShareLayers, resolved, tied_to
from headwise.models import view
from headwise.models.backbones import Decoder
from headwise.parts import Attention
from tests.instruments import tiny

torch.set_num_threads(1)

IDS = tiny.ids(14, batch=2)


def _four(name):
    if name == "llama":
        return tiny.llama(num_hidden_layers=4)
    if name == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(vocab_size=60, n_embd=32, n_layer=4, n_head=4, n_positions=64)
        return GPT2LMHeadModel(config).eval()
    torch.manual_seed(0)
    return Decoder(60, 32, 4, mixer=lambda layer: Attention(32, 4, causal=True)).eval()


def _logits(model):
    with torch.no_grad():
        found = model(IDS)
    return getattr(found, "logits", found)


def _layers(model):
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def _copied(name, roots):
    """The slow twin: weights copied from root to layer."""
    model = _four(name)
    for place, root in enumerate(roots):
        if name == "own":
            pairs = [(model.stack.mixers, 1), (model.stack.feeds, 1)]
            pairs += [(model.stack.wiring.norms[p], 1) for p in model.stack.wiring.norms]
            for modules, _ in pairs:
                modules[place].load_state_dict(modules[root].state_dict())
        else:
            _layers(model)[place].load_state_dict(_layers(model)[root].state_dict())
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "own"])
def test_shared_layers_compute_what_copies_compute_and_count_once(name):
    model = _four(name)
    before = sum(p.numel() for p in model.parameters())
    one = sum(p.numel() for p in _blocks(model, 0))
    share_layers(model, [(0, 1), (2, 3)])
    torch.testing.assert_close(_logits(model), _logits(_copied(name, (0, 0, 2, 2))))
    assert before - sum(p.numel() for p in model.parameters()) == 2 * one
    assert tied_to(model) == (0, 0, 2, 2)
    assert len(view(model).layers) == 4


def _blocks(model, layer):
    if isinstance(model, Decoder):
        stack = model.stack
        modules = [stack.mixers[layer], stack.feeds[layer]]
        modules += [stack.wiring.norms[p][layer] for p in stack.wiring.norms]
        return [p for m in modules for p in m.parameters()]
    return list(_layers(model)[layer].parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "own"])
def test_gradient_of_a_tied_weight_is_the_sum_over_its_places(name):
    model, apart = _four(name), _copied(name, (0, 1, 1, 1))
    share_layers(model, [(1, 2, 3)])
    for one in (model, apart):
        found = one(IDS)
        getattr(found, "logits", found).square().mean().backward()
    sums = [
        sum(p.grad for p in same)
        for same in zip(*(_blocks(apart, layer) for layer in (1, 2, 3)), strict=True)
    ]
    for parameter, want in zip(_blocks(model, 1), sums, strict=True):
        torch.testing.assert_close(parameter.grad, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_parts_alone(part):
    model = _four("llama")
    share_layers(model, [(0, 2)], parts=part)
    layers = model.model.layers
    mine = {"attention": "self_attn", "mlp": "mlp"}[part]
    for name, child in layers[2].named_children():
        same = all(
            a is b
            for a, b in zip(child.parameters(), getattr(layers[0], name).parameters(), strict=True)
        )
        assert same == (name == mine)
    other = _four("llama")
    getattr(other.model.layers[2], mine).load_state_dict(
        getattr(other.model.layers[0], mine).state_dict()
    )
    torch.testing.assert_close(_logits(model), _logits(other))


def test_untying_leaves_the_answer_and_parts_the_weights():
    model = _four("llama")
    share_layers(model, [(0, 1, 2, 3)])
    want = _logits(model)
    take(model, ShareLayers((0, 0, 2, 2)))
    torch.testing.assert_close(_logits(model), want, atol=0, rtol=0)
    assert tied_to(model) == (0, 0, 2, 2)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.zero_()
    assert float(model.model.layers[3].mlp.down_proj.weight.abs().sum()) == 0
    assert float(model.model.layers[1].mlp.down_proj.weight.abs().sum()) > 0


def test_chains_lead_to_their_beginning():
    assert resolved((0, 0, 1)) == (0, 0, 0)
    assert resolved((0, 1, 1, 2, 4, 4)) == (0, 1, 1, 1, 4, 4)


def test_generation_of_shared_and_reordered_layers_uses_the_cache_rightly():
    model = _four("llama")
    share_layers(model, [(1, 2)])
    reorder_layers(model, [3, 1, 0, 2])
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(IDS, **given)
    plain = model.generate(IDS, use_cache=False, **given)
    assert torch.equal(cached, plain)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["llama", "gpt2", "own"])
def test_reordered_layers_run_in_the_new_order(name):
    model, order = _four(name), [2, 0, 3, 1]
    other = _four(name)
    if name == "own":
        for modules in (other.stack.mixers, other.stack.feeds, *other.stack.wiring.norms.values()):
            held = [copy.deepcopy(m.state_dict()) for m in modules]
            for place, was in enumerate(order):
                modules[place].load_state_dict(held[was])
    else:
        held = [copy.deepcopy(m.state_dict()) for m in _layers(other)]
        for place, was in enumerate(order):
            _layers(other)[place].load_state_dict(held[was])
    reorder_layers(model, order)
    torch.testing.assert_close(_logits(model), _logits(other))
    back = [order.index(n) for n in range(4)]
    reorder_layers(model, back)
    torch.testing.assert_close(_logits(model), _logits(_four(name)))


def test_windows_move_with_their_layers():
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        **{**tiny.SIZE, "num_hidden_layers": 3},
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=kinds,
    )
    model = Qwen2ForCausalLM(config).eval()
    reorder_layers(model, [1, 2, 0])
    assert list(model.config.layer_types) == [kinds[1], kinds[2], kinds[0]]
    cached = model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)
    plain = model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(cached, plain)


def test_steps_are_done_again_without_data():
    model = _four("llama")
    share_layers(model, [(0, 1)])
    reorder_layers(model, [0, 2, 1, 3])
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(_four("llama").config))
    for step in steps_of(model):
        take(empty, read_step(json.loads(json.dumps(write_step(step)))))
    assert tied_to(empty) == tied_to(model) == (0, 1, 0, 3)
    assert {n: p.shape for n, p in empty.state_dict().items()} == {
        n: p.shape for n, p in model.state_dict().items()
    }


@pytest.mark.parametrize("method", ["delta", "average"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "own"])
def test_merged_layers(name, method):
    model = _four(name)
    kept = [[p.detach().clone() for p in _blocks(model, layer)] for layer in range(4)]
    merge_layers(model, 1, 3, method)
    assert len(view(model).layers) == 2
    for place, parameter in enumerate(_blocks(model, 1)):
        one, two, three = (kept[layer][place].double() for layer in (1, 2, 3))
        want = one + (two - one) + (three - one) if method == "delta" else (one + two + three) / 3
        torch.testing.assert_close(parameter.detach().double(), want, atol=1e-5, rtol=1e-5)
    for parameter, was in zip(_blocks(model, 0), kept[0], strict=True):
        assert torch.equal(parameter, was)
    _logits(model)


def test_refusals_change_nothing():
    model = _four("llama")
    state = {n: p.clone() for n, p in model.state_dict().items()}
    for call, words in (
        (lambda: share_layers(model, [(0, 4)]), "layers 0 to 3"),
        (lambda: share_layers(model, [(0, 1), (1, 2)]), "in one group"),
        (lambda: share_layers(model, [(0, 1)], parts="heads"), "parts="),
        (lambda: take(model, ShareLayers((0, 2, 2, 3))), "earlier"),
        (lambda: reorder_layers(model, [0, 1, 2]), "each of 0 to 3 once"),
        (lambda: merge_layers(model, 3, 2), "2 or more"),
        (lambda: merge_layers(model, 0, 2, "sum"), "method="),
        (lambda: share_layers(tiny.bart(), [(0, 1)]), "stack="),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert not steps_of(model)
    assert all(torch.equal(p, state[n]) for n, p in model.state_dict().items())
    model.model.layers[2].mlp.up_proj = nn.Linear(32, 40, bias=False)
    with pytest.raises(ValueError, match="differ"):
        share_layers(model, [(1, 2)])
