"""Real weights: a speech model, a sorter and a story teller."""

import importlib.util

import pytest
import torch

from headwise.models import observe, view
from tests.models.families import transformers


def loader(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def observed(model, run):
    readings = []

    def read(r):
        key = (r.attention.stack, r.attention.kind, r.attention.layer)
        readings.append((key, r.map.entropy(), r.map.dense()))

    with torch.no_grad():
        before = run(model)
        with observe(view(model), read):
            during = run(model)
    torch.testing.assert_close(during, before, atol=1e-4, rtol=1e-4)
    return readings


def test_moonshine(assets):
    model = loader(assets / "moonshine_tiny" / "load_moonshine.py").load()
    seen = view(model)
    assert seen.stacks == ("encoder", "decoder")
    assert len(seen.attentions) == 18
    assert {a.heads for a in seen.attentions} == {8}
    assert {a.head_dim for a in seen.attentions} == {36}
    sound = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[1, 306, 17, 42]])
    readings = observed(model, lambda m: m(input_values=sound, decoder_input_ids=tokens).logits)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        own = model(input_values=sound, decoder_input_ids=tokens, output_attentions=True)
    matrices = {
        ("encoder", "self"): own.encoder_attentions,
        ("decoder", "self"): own.decoder_attentions,
        ("decoder", "cross"): own.cross_attentions,
    }
    for (stack, kind, layer), _, dense in readings:
        torch.testing.assert_close(dense, matrices[stack, kind][layer], atol=1e-4, rtol=1e-3)


def test_nanogpt_sort_still_sorts(assets):
    model = loader(assets / "nanogpt_sort" / "load_nanogpt_sort.py").load()
    numbers = torch.tensor([[2, 0, 1, 1, 0, 2]])
    how = {"attention_mask": torch.ones_like(numbers), "pad_token_id": 0}
    with observe(view(model), lambda r: None):
        out = model.generate(numbers, max_new_tokens=6, do_sample=False, **how)
    assert out[0, 6:].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_stories(assets, implementation):
    model = transformers.LlamaForCausalLM.from_pretrained(
        assets / "stories260K" / "hf", attn_implementation=implementation
    ).eval()
    seen = view(model)
    assert [(a.heads, a.kv_heads, a.head_dim) for a in seen.attentions] == [(8, 4, 8)] * 5
    assert seen.embedding.shape == seen.unembedding.shape == (512, 64)
    ids = torch.randint(3, 500, (2, 60), generator=torch.Generator().manual_seed(1))
    readings = observed(model, lambda m: m(ids).logits)
    for _, entropy, dense in readings:
        want = -(dense * dense.clamp_min(1e-30).log()).sum(-1)
        torch.testing.assert_close(entropy, want, atol=1e-4, rtol=1e-4)
