"""Test-time registers on small vision transformers, against the same done by hand."""

import pytest
import torch

from headwise.edits.registers import Neuron, Registers, find_register_neurons
from headwise.models import Site, UnsupportedModelError, recording, view
from tests.instruments import tiny

PLANTED = ((0, 5), (0, 11), (1, 7))


def images(batch=3, seed=0):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def with_outliers():
    """A ViT in which three neurons write a large vector."""
    model = tiny.vit()
    with torch.no_grad():
        for layer, index in PLANTED:
            block = model.vit.layers[layer].mlp
            block.fc1.weight[index] *= 6
            block.fc2.weight[:, index] = 0
            block.fc2.weight[layer, index] = 40
    return model


def test_the_neurons_that_write_outliers_are_found():
    model = with_outliers()
    given = {"pixel_values": images()}
    look = view(model)
    with torch.no_grad(), recording(look, [Site("residual", 2)]) as kept:
        model(**given)
    norms = kept[Site("residual", 2)][:, 1:].norm(dim=-1)
    found = find_register_neurons(model, [given], 3, threshold=float(norms.median() * 1.5))
    assert {(n.layer, n.index) for n in found} == set(PLANTED)
    assert found[0].score >= found[1].score >= found[2].score > 0
    with pytest.raises(ValueError, match="no patch has a norm above 100000"):
        find_register_neurons(model, [given], 3, threshold=1e5)


def test_scores_are_means_over_outliers_of_each_image():
    model, given = with_outliers(), {"pixel_values": images(4, 1)}
    look = view(model)
    wanted = [Site("neurons", 0), Site("neurons", 1), Site("residual", 2)]
    with torch.no_grad(), recording(look, wanted) as kept:
        model(**given)
    limit = float(kept[Site("residual", 2)][:, 1:].norm(dim=-1).quantile(0.8))
    sums, count = torch.zeros(2, 48), 0
    for b in range(4):
        norms = kept[Site("residual", 2)][b].norm(dim=-1)
        places = [p for p in range(1, len(norms)) if norms[p] > limit]
        if places:
            count += 1
            for layer in range(2):
                acts = kept[Site("neurons", layer)][b]
                sums[layer] += sum(acts[p].abs() for p in places) / len(places)
    two = [{"pixel_values": part} for part in given["pixel_values"].split(2)]
    for neuron in find_register_neurons(model, two, 10, limit):
        assert neuron.score == pytest.approx(
            float(sums[neuron.layer, neuron.index]) / count, rel=1e-4
        )


@pytest.mark.parametrize("tokens", [1, 3])
def test_registers_are_what_is_done_by_hand(tokens):
    """Layer by layer with the model's own modules, the tokens appended and activations moved."""
    model, given = with_outliers(), {"pixel_values": images()}
    with torch.no_grad(), Registers(model, [Neuron(*p) for p in PLANTED], tokens):
        got = model(**given).logits
    body = model.vit
    with torch.no_grad():
        x = body.embeddings(given["pixel_values"])
        n = x.shape[1]
        x = torch.cat([x, torch.zeros(len(x), tokens, x.shape[-1])], 1)
        for number, layer in enumerate(body.layers):
            normed = layer.layernorm_before(x)
            mixed = layer.attention(normed)
            mixed = mixed[0] if isinstance(mixed, tuple) else mixed
            x = x + mixed
            hidden = layer.mlp.activation_fn(layer.mlp.fc1(layer.layernorm_after(x)))
            for at, index in PLANTED:
                if at == number:
                    for b in range(len(x)):
                        top = max(float(hidden[b, p, index]) for p in range(1, n))
                        hidden[b, 1:n, index] = 0
                        hidden[b, n:, index] = top
            x = x + layer.mlp.fc2(hidden)
        want = model.classifier(body.layernorm(x[:, :n])[:, 0])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_patches_lose_their_outliers_and_the_model_is_left_as_it_was():
    model, given = with_outliers(), {"pixel_values": images()}
    look, site = view(model), Site("residual", 2)
    with torch.no_grad(), recording(look, [site]) as kept:
        before = model(**given).logits
        plain = kept[site].norm(dim=-1)
    with torch.no_grad(), Registers(model, PLANTED), recording(look, [site]) as kept:
        model(**given)
        shifted = kept[site].norm(dim=-1)
    assert float(shifted[:, 1:].max()) < 0.5 * float(plain[:, 1:].max())
    assert shifted.shape == plain.shape
    with torch.no_grad():
        assert torch.equal(model(**given).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("made", [([], 1), (PLANTED, 0)])
def test_no_neurons_or_no_tokens_change_nothing(made):
    model, given = with_outliers(), {"pixel_values": images()}
    with torch.no_grad():
        before = model(**given).logits
        with Registers(model, *made):
            assert torch.equal(model(**given).logits, before)


def test_what_has_no_place_for_registers_is_refused():
    with pytest.raises(UnsupportedModelError, match="no encoder of one stack"):
        Registers(tiny.llama(), PLANTED)
    with pytest.raises(ValueError, match=r"no layer has the neurons .*layers are \[0, 1\]"):
        Registers(tiny.vit(), [(4, 0)])
    model = tiny.vit()
    with pytest.raises(ValueError, match="neuron 99 of 48"), Registers(model, [(0, 99)]):
        model(pixel_values=images())
    bert = tiny.bert()
    ids = tiny.ids(6)
    with (
        pytest.raises(UnsupportedModelError, match="told masks or positions"),
        Registers(bert, [(0, 1)]),
    ):
        bert(ids, attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]))
    registers = Registers(tiny.vit(), PLANTED)
    with registers, pytest.raises(RuntimeError, match="in force already"):
        registers.__enter__()
