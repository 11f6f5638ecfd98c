"""The view's weights are the model's own, by head, and its parts are where it says."""

import pytest
import torch
from torch import nn

from headwise.models import UnsupportedModelError, observe, view
from headwise.models.stacks import stack_labels
from tests.models import families
from tests.models.families import FAMILIES, inputs, transformers


class Calls:
    """What went into and came out of a module, call by call."""

    def __init__(self, module):
        self.inputs, self.outputs = [], []
        module.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, module, args, kwargs, output):
        self.inputs.append(args[0] if args else kwargs.get("hidden_states"))
        self.outputs.append(output[0] if isinstance(output, tuple) else output)


def run(model, **more):
    """Readings of one forward pass, with what flowed through the projections of each."""
    seen = view(model)
    readings, layers = [], []
    parts = {}
    for attention in seen.attentions:
        found = attention.projections
        for part in (found.query.module, found.key.module, found.value.module, found.output):
            if id(part) not in parts:
                parts[id(part)] = Calls(part)
    with torch.no_grad(), observe(seen, readings.append, layers.append):
        model(**inputs(model, **more))
    return seen, readings, layers, parts


def call_of(seen, attention):
    """Which run of its module an attention is (ALBERT runs one module several times)."""
    return [a for a in seen.attentions if a.module is attention.module].index(attention)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_the_projections(name):
    model = FAMILIES[name]()
    seen, readings, _, parts = run(model)
    assert len(readings) == len(seen.attentions)
    for r in readings:
        a, found = r.attention, r.attention.projections
        at = call_of(seen, a)
        assert a.query_weight().shape == (a.heads, a.head_dim, a.width)
        assert a.key_weight().shape[:2] == (a.kv_heads, a.head_dim)

        def project(weight, bias, module, at=at):
            x = parts[id(module)].inputs[at]
            made = torch.einsum("bnw,hdw->bhnd", x, weight)
            return made if bias is None else made + bias[:, None]

        value = project(a.value_weight(), a.value_bias(), found.value.module)
        torch.testing.assert_close(value, r.value, atol=1e-5, rtol=1e-5)
        # rotary embedding leaves position 0 as it is: there, queries and keys are projections
        query = project(a.query_weight(), a.query_bias(), found.query.module)
        key = project(a.key_weight(), a.key_bias(), found.key.module)
        query, key = normed(a.module, "q_norm", query), normed(a.module, "k_norm", key)
        if r.map.scores.scale == 1.0:  # OPT and Whisper scale their queries, not their scores
            query = query * a.module.scaling
        torch.testing.assert_close(query[:, :, 0], r.query[:, :, 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(key[:, :, 0], r.key[:, :, 0], atol=1e-5, rtol=1e-5)

        out = torch.einsum("bhnd,hwd->bnw", r.out, a.output_weight())
        if a.output_bias() is not None:
            out = out + a.output_bias()
        torch.testing.assert_close(out, parts[id(found.output)].outputs[at], atol=1e-5, rtol=1e-5)


def normed(module, name, heads):
    """The query or key norm of a module: by head (Qwen 3, Gemma 3) or over all heads (OLMo 2)."""
    norm = getattr(module, name, None)
    if norm is None:
        return heads
    if norm.weight.numel() == heads.shape[-1]:
        return norm(heads)
    flat = heads.transpose(1, 2).flatten(2)
    return norm(flat).unflatten(2, (heads.shape[1], -1)).transpose(1, 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_views(name):
    seen = view(FAMILIES[name]())
    own = {p.untyped_storage().data_ptr() for p in seen.model.parameters()}
    for a in seen.attentions:
        for slices in (a.query_weight(), a.key_weight(), a.value_weight(), a.output_weight()):
            assert slices.untyped_storage().data_ptr() in own


@pytest.mark.parametrize("name", FAMILIES)
def test_norm_feeds_the_attention(name):
    model = FAMILIES[name]()
    seen = view(model)
    calls = {
        id(a.projections.query.module): Calls(a.projections.query.module) for a in seen.attentions
    }
    norms = {id(a.norm): Calls(a.norm) for a in seen.attentions if a.norm is not None}
    layers = []
    with torch.no_grad(), observe(seen, None, layers.append):
        model(**inputs(model))
    for a in seen.attentions:
        fed = calls[id(a.projections.query.module)].inputs[call_of(seen, a)]
        if a.norm is not None:
            torch.testing.assert_close(fed, norms[id(a.norm)].outputs[call_of(seen, a)])
        elif a.kind == "self":
            layer = next(r for r in layers if a in r.layer.attentions)
            torch.testing.assert_close(fed, layer.residual_in)


def test_post_norm_families_have_no_norm_before():
    for name in ("bert", "distilbert", "albert", "bart", "marian", "olmo2"):
        assert all(a.norm is None for a in view(FAMILIES[name]()).attentions), name
    for name in ("llama", "gpt2", "whisper", "t5", "opt", "vit", "clip"):
        assert all(a.norm is not None for a in view(FAMILIES[name]()).attentions), name


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "llama", "qwen3", "phi3", "whisper"])
def test_final_norm_and_unembedding_give_the_logits(name):
    model = FAMILIES[name]()
    seen = view(model)
    layers = []
    with torch.no_grad(), observe(seen, None, layers.append):
        logits = model(**inputs(model)).logits
        mine = seen.final_norm(layers[-1].residual_out) @ seen.unembedding.T
    torch.testing.assert_close(mine, logits, atol=1e-4, rtol=1e-4)


def test_embedding_is_none_where_it_is_not_of_the_residual_width():
    assert view(FAMILIES["llama"]()).embedding.shape == (families.VOCABULARY, 40)
    for name in ("albert", "electra", "vit"):
        assert view(FAMILIES[name]()).embedding is None


def test_stacks_and_kinds():
    stacks = {name: view(FAMILIES[name]()).stacks for name in ("llama", "bert", "clip", "t5")}
    assert stacks == {
        "llama": ("decoder",),
        "bert": ("encoder",),
        "clip": ("text", "vision"),
        "t5": ("encoder", "decoder"),
    }
    seen = view(FAMILIES["whisper"]())
    kinds = [(a.stack, a.layer, a.kind) for a in seen.attentions]
    assert kinds == [("encoder", n, "self") for n in range(2)] + [
        ("decoder", n, kind) for n in range(3) for kind in ("self", "cross")
    ]
    assert [layer.index for layer in seen.layers] == [0, 1, 0, 1, 2]
    assert seen.causal
    assert not view(FAMILIES["bert"]()).causal


def test_stacks_are_named_by_what_their_paths_say():
    def names(*paths):
        return list(stack_labels(list(paths), [], {}).values())

    assert names("model.encoder.layers", "model.decoder.layers") == ["encoder", "decoder"]
    assert names("encoder.encoder.layer", "decoder.bert.encoder.layer") == ["encoder", "decoder"]
    assert names("text_encoder.layers", "text_decoder.layers") == ["encoder", "decoder"]
    assert names("vision_tower.encoder.layers", "language_model.layers") == ["vision", "text"]
    towers = ("vision_model.encoder.layers", "qformer.encoder.layer", "language_model.layers")
    assert names(*towers) == ["vision", "qformer", "text"]
    assert names("a.x.layers", "a.y.layers") == ["a.x.layers", "a.y.layers"]


def test_shared_layers_are_counted_by_run():
    seen = view(FAMILIES["albert_groups"]())
    assert [a.layer for a in seen.attentions] == [0, 1, 2, 3]
    modules = [a.module for a in seen.attentions]
    assert modules[0] is modules[1]
    assert modules[2] is modules[3]
    assert modules[1] is not modules[2]


def test_counts_come_from_the_weights_of_a_pruned_model():
    model = FAMILIES["llama"]()
    attention = model.model.layers[1].self_attn
    with torch.no_grad():  # take out the second key-value group
        for name, rows in (("q_proj", 12), ("k_proj", 6), ("v_proj", 6)):
            linear = getattr(attention, name)
            linear.weight = nn.Parameter(linear.weight[:rows].clone())
        attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, :12].clone())
    counts = [(a.heads, a.kv_heads) for a in view(model).attentions]
    assert counts == [(4, 2), (2, 1), (4, 2)]


def test_latent_attention_is_seen_but_its_weights_are_refused():
    made = transformers.DeepseekV3Config(
        **{**families.DECODER, "num_key_value_heads": 4, "num_hidden_layers": 2},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=6,
        first_k_dense_replace=2,
    )
    made._attn_implementation = "eager"
    seen = view(transformers.DeepseekV3ForCausalLM(made).eval())
    assert [a.heads for a in seen.attentions] == [4, 4]
    with pytest.raises(UnsupportedModelError, match=r"DeepseekV3Attention.*kv_a_proj"):
        seen.attentions[0].key_weight()


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(width, 3 * width)
        self.attn.proj = nn.Linear(width, width)
        self.attn.num_heads = heads
        self.mlp = nn.Sequential(nn.Linear(width, width))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(12, 3) for _ in range(2))
        self.norm = nn.LayerNorm(12)


def test_a_module_of_no_library_is_viewed_but_not_observed():
    model = Plain()
    seen = view(model)
    first = seen.attentions[0]
    assert (first.heads, first.head_dim, first.name) == (3, 4, "blocks.0.attn")
    assert first.norm is model.blocks[0].norm1
    assert seen.final_norm is model.norm
    torch.testing.assert_close(first.key_weight()[1], model.blocks[0].attn.qkv.weight[16:20])
    with (
        pytest.raises(
            UnsupportedModelError, match=r"Plain cannot be observed.*attention interface"
        ),
        observe(seen, print),
    ):
        pass


def test_models_without_a_sequence_of_their_own_are_refused():
    swin = transformers.SwinModel(
        transformers.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2], image_size=32)
    )
    with pytest.raises(UnsupportedModelError, match=r"SwinModel.*windows.*folded into the batch"):
        view(swin)
    with pytest.raises(UnsupportedModelError, match="Linear: no attention was found"):
        view(nn.Linear(2, 2))


def test_a_fused_layout_that_no_rule_tells_is_refused():
    falcon = transformers.FalconForCausalLM(
        transformers.FalconConfig(
            vocab_size=61, hidden_size=40, num_hidden_layers=1, num_attention_heads=4
        )
    )
    with pytest.raises(UnsupportedModelError, match="layout of query_key_value"):
        view(falcon).attentions[0].query_weight()
