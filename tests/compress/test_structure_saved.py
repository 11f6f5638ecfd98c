"""Every change of structure of this part, saved and loaded."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from headwise.compress import (
    LowRank,
    compensate,
    factorise,
    fuse_layer,
    load,
    merge_layers,
    mixture_to_dense,
    prune_channels,
    prune_heads,
    reorder_layers,
    save,
    share_layers,
    take,
)
from headwise.compress.structure.sharing import ShareLayers, tied_to
from headwise.models import UnsupportedModelError
from tests.instruments import tiny

torch.set_num_threads(1)

IDS = tiny.ids(24, batch=4)
INPUTS = {"input_ids": IDS}


def _llama(**more):
    return tiny.llama(num_hidden_layers=4, **more)


def _mixtral():
    config = MixtralConfig(
        **tiny.SIZE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    )
    return tiny._sharp(MixtralForCausalLM(config))


def _untied(model):
    share_layers(model, [(0, 1, 2)])
    take(model, ShareLayers((0, 0, 2, 3)))


CHANGES = {
    "factorised": (_llama, lambda m: factorise(m, INPUTS, keep=0.5)),
    "factorised gpt2": (tiny.gpt2, lambda m: factorise(m, INPUTS, rank=4, which="attention")),
    "shared": (_llama, lambda m: share_layers(m, [(0, 1), (2, 3)])),
    "untied": (_llama, _untied),
    "reordered": (_llama, lambda m: reorder_layers(m, [2, 0, 1, 3])),
    "merged": (_llama, lambda m: merge_layers(m, 1, 2)),
    "fused": (_llama, lambda m: fuse_layer(m, INPUTS, 1, group=2, steps=3)),
    "with biases": (_llama, lambda m: compensate(m, _llama(), INPUTS, bias=True)),
    "dense": (_mixtral, lambda m: mixture_to_dense(m, INPUTS, keep=2)),
}


def _logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", CHANGES)
def test_saved_and_loaded(name, tmp_path):
    make, change = CHANGES[name]
    model = make()
    change(model)
    save(model, tmp_path / "small")
    again = load(tmp_path / "small").eval()
    torch.testing.assert_close(_logits(again), _logits(model), atol=0, rtol=0)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())


def test_shared_weights_are_saved_once_and_shared_again(tmp_path):
    sizes = {}
    for groups in ((), ((0, 1, 2, 3),)):
        model = _llama()
        share_layers(model, groups)
        path = save(model, tmp_path / f"of{len(groups)}")
        sizes[len(groups)] = sum(f.stat().st_size for f in path.glob("*.safetensors"))
    one = 4 * sum(p.numel() for p in _llama().model.layers[0].parameters())
    assert sizes[0] - sizes[1] == pytest.approx(3 * one, rel=0.05)
    again = load(tmp_path / "of1")
    assert tied_to(again) == (0, 0, 0, 0)


@pytest.mark.parametrize("parts", ["layer", "attention", "mlp"])
def test_shared_weights_are_nothing_that_transformers_alone_could_load(parts, tmp_path):
    model = _llama()
    share_layers(model, [(1, 2)], parts=parts)
    path = save(model, tmp_path / "small")
    assert not (path / "model.safetensors").exists()
    assert "are one parameter" in (path / "README.md").read_text()


def test_nor_is_a_model_whose_config_ties_what_is_not_tied(tmp_path):
    model = _llama(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    with pytest.raises(UnsupportedModelError, match="several parameters"):
        save(model, tmp_path / "small")


def test_factors_after_heads(tmp_path):
    model = _llama()
    prune_heads(model, [(0, 0), (0, 1), (2, 3)])
    factorise(model, INPUTS, rank=3, which="attention")
    save(model, tmp_path / "small")
    again = load(tmp_path / "small").eval()
    torch.testing.assert_close(_logits(again), _logits(model), atol=0, rtol=0)


def test_heads_after_factors():
    """Heads and channels of factorised matrices go as they would from the product."""
    model, other = _llama(), _llama()
    for one in (model, other):
        factorise(one, INPUTS, rank=6)
    for layer in other.model.layers:  # the slow twin: products in place of factors
        for owner in (layer.self_attn, layer.mlp):
            for name, factors in list(owner.named_children()):
                if isinstance(factors, LowRank):
                    whole = torch.nn.Linear(factors.in_features, factors.out_features, bias=False)
                    whole.weight.data = factors.weight.detach().clone()
                    setattr(owner, name, whole)
    for one in (model, other):
        prune_heads(one, [(1, 2), (1, 3), (0, 1)], how="mean", inputs=INPUTS)
        prune_channels(one, {0: [3, 4, 40]})
    assert model.model.layers[1].self_attn.q_proj.out_features == 16
    torch.testing.assert_close(_logits(model), _logits(other), atol=1e-4, rtol=1e-4)
