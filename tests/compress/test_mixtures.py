import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from headwise.compress import mixture_to_dense, prune_channels, steps_of, take
from headwise.compress.step import read_step, write_step
from headwise.models import view
from headwise.models.backbones import Decoder
from headwise.models.errors import UnsupportedModelError
from headwise.parts import Attention
from headwise.parts.feed.experts import Experts
from headwise.parts.feed.gated import Gated
from headwise.parts.feed.mlp import Mlp
from tests.instruments import tiny

torch.set_num_threads(1)

INPUTS = {"input_ids": tiny.ids(30, batch=8)}


def _mixtral():
    config = MixtralConfig(
        **tiny.SIZE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    )
    return tiny._sharp(MixtralForCausalLM(config))


def _qwen3():
    config = Qwen3MoeConfig(
        **tiny.SIZE,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        norm_topk_prob=True,
    )
    return tiny._sharp(Qwen3MoeForCausalLM(config))


def _own(gated):
    torch.manual_seed(0)

    def feed(layer):
        return Experts(32, 4, 2, hidden=12, gated=gated, activation=F.silu, normalized=True)

    model = Decoder(60, 32, 2, mixer=lambda layer: Attention(32, 4, causal=True), feed=feed)
    return model.eval()


MODELS = {
    "mixtral": _mixtral,
    "qwen3": _qwen3,
    "own": lambda: _own(False),
    "own_gated": lambda: _own(True),
}


def _answer(model):
    with torch.no_grad():
        found = model(**INPUTS)
    return getattr(found, "logits", found)


def _planted(name, main=2):
    """Every token goes to expert `main` with nearly all weight."""
    model = MODELS[name]()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Experts):
                experts, up, gate, down = module, module.up, module.gate, module.down
            elif hasattr(module, "experts") and isinstance(module.experts, nn.Module):
                experts, up = module.experts, module.experts.gate_up_proj
                gate, down = None, module.experts.down_proj
            else:
                continue
            # the others do what the main one does: whatever the router says, it gives the same
            for table in (up, gate, down):
                if table is not None:
                    table.copy_(table[main].expand_as(table).clone())
            del experts
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["keep", "merge"])
def test_equal_experts_lose_nothing(name, how):
    model = _planted(name)
    want = _answer(model)
    before = sum(p.numel() for p in model.parameters())
    found = mixture_to_dense(model, INPUTS, keep=1, how=how, fitted=False)
    torch.testing.assert_close(_answer(model), want, atol=1e-4, rtol=1e-4)
    assert len(found) == 2
    assert all(one.before < 1e-8 for one in found)
    assert sum(p.numel() for p in model.parameters()) < 0.75 * before
    feeds = [m for m in model.modules() if isinstance(m, (Gated, Mlp))]
    assert len(feeds) == 2
    assert len(view(model).layers) == 2


@pytest.mark.parametrize("name", MODELS)
def test_statistics_and_width_against_loops(name):
    model = MODELS[name]()
    look = view(model)
    mlp = look.layers[0].mlp
    assert mlp is not None
    kept = []
    handle = mlp.register_forward_hook(lambda m, args, out: kept.append((args[0], out)))
    _answer(model)
    handle.remove()
    x = kept[0][0].reshape(-1, 32)
    used, mass = torch.zeros(2, 4, dtype=torch.float64)
    with torch.no_grad():
        for token in x:
            if isinstance(mlp, Experts):
                weights, chosen = mlp.route(token[None])
            else:
                logits = token @ mlp.gate.weight.T
                weights, chosen = logits.softmax(-1).topk(2)
                if getattr(mlp.gate, "norm_topk_prob", True):
                    weights = weights / weights.sum()
            for w, e in zip(weights.flatten(), chosen.flatten(), strict=True):
                used[e] += 1 / len(x)
                mass[e] += float(w) / len(x)
    found = mixture_to_dense(model, INPUTS, keep=2, layers=[0])
    assert len(found) == 1
    torch.testing.assert_close(found[0].used, used)
    torch.testing.assert_close(found[0].mass, mass, atol=1e-5, rtol=1e-4)
    assert set(found[0].kept) == set(mass.topk(2).indices.tolist())
    new = view(model).layers[0].mlp
    wide = {"mixtral": 96, "qwen3": 40, "own": 24, "own_gated": 24}[name]
    assert new.down.in_features == wide


@pytest.mark.parametrize("name", ["mixtral", "own"])
@pytest.mark.parametrize("how", ["keep", "merge"])
def test_fitting_lowers_the_error_that_is_told(name, how):
    model = MODELS[name]()
    mlp = copy.deepcopy(view(model).layers[0].mlp)
    kept = []
    handle = (
        view(model)
        .layers[0]
        .mlp.register_forward_hook(lambda m, args, out: kept.append((args[0], out)))
    )
    _answer(model)
    handle.remove()
    (found,) = mixture_to_dense(model, INPUTS, keep=2, how=how, layers=[0])
    x, y = kept[0]
    with torch.no_grad():
        new = view(model).layers[0].mlp(x)
        torch.testing.assert_close(mlp(x), y)
    error = float((new - y).square().sum() / y.square().sum())
    assert found.after == pytest.approx(error, rel=1e-3)
    assert found.after <= found.before


def test_more_experts_kept_lose_less():
    errors = []
    for keep in (1, 2, 3):
        model = _mixtral()
        errors.append(sum(one.after for one in mixture_to_dense(model, INPUTS, keep=keep)))
    assert errors[0] > errors[1] > errors[2]


def test_dense_models_generate_and_lose_channels():
    model = _mixtral()
    mixture_to_dense(model, INPUTS, keep=1)
    model.generate(INPUTS["input_ids"][:1], max_new_tokens=3, pad_token_id=0)
    prune_channels(model, {0: [1, 2, 3]})
    assert view(model).layers[0].mlp.down.in_features == 45


def test_the_step_is_done_again_without_data():
    model = _mixtral()
    mixture_to_dense(model, INPUTS, keep=2)
    with torch.device("meta"):
        empty = MixtralForCausalLM(model.config)
    for step in steps_of(model):
        take(empty, read_step(json.loads(json.dumps(write_step(step)))))
    assert {n: p.shape for n, p in empty.state_dict().items()} == {
        n: p.shape for n, p in model.state_dict().items()
    }


def test_refusals():
    with pytest.raises(ValueError, match="no mixture"):
        mixture_to_dense(tiny.llama(), INPUTS)
    with pytest.raises(ValueError, match="1 to 3"):
        mixture_to_dense(_mixtral(), INPUTS, keep=4)
    with pytest.raises(ValueError, match="how="):
        mixture_to_dense(_mixtral(), INPUTS, how="best")
    with pytest.raises(UnsupportedModelError, match="plain experts"):
        mixture_to_dense(tiny.gpt_oss(), INPUTS)
    config = Qwen2MoeConfig(
        **tiny.SIZE,
        num_key_value_heads=2,
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    with pytest.raises(UnsupportedModelError, match="shared_expert"):
        mixture_to_dense(Qwen2MoeForCausalLM(config), INPUTS)
