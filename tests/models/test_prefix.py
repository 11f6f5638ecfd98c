"""A run from a layer on gives what a whole run gives."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headwise.models import Prefix, Site, sites_of, touching, view
from headwise.models.backbones import Decoder
from headwise.models.sites import KINDS
from headwise.parts import Attention
from headwise.parts.wiring.taps import Taps
from tests.instruments import tiny
from tests.models.test_sites import MODELS, answer, inputs_of


def written(value: Tensor, salt: int) -> Tensor:
    random = torch.Generator().manual_seed(salt)
    return value + 0.5 * torch.randn(value.shape, generator=random)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_copies_from_a_layer_on_equal_whole_runs(name: str, data: Any) -> None:
    model = MODELS[name]()
    look = view(model)
    inputs = inputs_of(model, data.draw(st.integers(1, 3)))
    prefix = Prefix(look, inputs)
    assert prefix.reuses == (name != "albert")
    kinds = [kind for kind in KINDS if (name, kind) != ("gpt_oss", "neurons")]
    choice = [site for kind in kinds for site in sites_of(look, kind)]
    chosen = data.draw(st.lists(st.sampled_from(choice), min_size=1, max_size=3, unique=True))
    copies = data.draw(st.integers(1, 3))

    def change(value: Tensor) -> Tensor:  # every copy in its own way
        return torch.cat([written(part, n) for n, part in enumerate(value.chunk(copies))])

    with torch.no_grad():
        found = prefix.run(dict.fromkeys(chosen, change), copies=copies)
    for n, part in enumerate(found.chunk(copies)):
        with touching(look, {site: lambda value, n=n: written(value, n) for site in chosen}):
            whole = answer(model, inputs)
        assert torch.allclose(part, whole, atol=3e-4, rtol=1e-3)
    assert torch.equal(answer(model, inputs), prefix.output)  # nothing is left behind


def test_only_the_layers_from_the_change_on_are_computed() -> None:
    model = tiny.llama(num_hidden_layers=5)
    prefix = Prefix(view(model), inputs_of(model))
    ran: list[int] = []
    handles = [
        layer.mlp.register_forward_hook(lambda *_, n=n: ran.append(n))
        for n, layer in enumerate(model.model.layers)
    ]
    prefix.run({Site("heads", 3): torch.zeros_like})
    assert ran == [3, 4]
    ran.clear()
    prefix.run({Site("residual", 5): torch.zeros_like})
    assert ran == [4]
    for handle in handles:
        handle.remove()


def test_the_encoder_is_not_run_again_for_a_change_of_the_decoder() -> None:
    model = tiny.bart()
    prefix = Prefix(view(model), inputs_of(model))
    ran: list[str] = []
    for name, module in model.named_modules():
        if name.endswith("fc1"):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    prefix.run({Site("heads", 1, "decoder", "cross"): torch.zeros_like})
    assert ran == ["model.decoder.layers.1.fc1"]


def test_gradients_pass_from_the_change_on() -> None:
    model = tiny.gpt2()
    prefix = Prefix(view(model), inputs_of(model))
    gate = torch.ones(2, 1, 1, 4, 1, requires_grad=True)

    def gated(out: Tensor) -> Tensor:
        return (out.view(2, -1, *out.shape[1:]) * gate).view(out.shape)

    prefix.run({Site("heads", 1): gated}, copies=2)[:, -1, 3].sum().backward()
    assert gate.grad is not None
    assert torch.allclose(gate.grad[0], gate.grad[1], atol=1e-4)
    assert bool((gate.grad != 0).all())


def test_wirings_that_hand_on_more_than_the_residual_are_run_whole() -> None:
    model = Decoder(60, 16, 3, lambda layer: Attention(16, 4, causal=True), wiring=Taps()).eval()
    prefix = Prefix(view(model), inputs_of(model))
    assert not prefix.reuses
    with torch.no_grad():
        found = prefix.run({Site("heads", 2): torch.zeros_like})
    with touching(view(model), {Site("heads", 2): torch.zeros_like}):
        assert torch.equal(found, answer(model, inputs_of(model)))


def test_a_model_that_remembers_more_than_layers_give_is_run_whole() -> None:
    """A layer that reads what another one left beside the stream: the trial notices."""
    model = tiny.llama(num_hidden_layers=3)
    left: list[Tensor] = []
    first, last = model.model.layers[0], model.model.layers[2]
    first.mlp.register_forward_hook(lambda m, args, out: left.__setitem__(slice(None), [out + 0]))
    count = []

    def add(module: Any, args: Any, out: Tensor) -> Tensor:
        count.append(1)
        return out + (left.pop() if left else 0)

    last.mlp.register_forward_hook(add)
    prefix = Prefix(view(model), inputs_of(model))
    assert not prefix.reuses
    assert torch.allclose(prefix.run({Site("heads", 2): lambda v: v}), prefix.output, atol=1e-5)


def test_labels_are_no_inputs_of_the_model() -> None:
    """A model of our own takes none, and one of transformers would compute a loss with them."""
    ids = tiny.ids(7, batch=2)
    for make in (MODELS["own"], MODELS["llama"]):
        model = make()
        prefix = Prefix(view(model), {"input_ids": ids, "labels": ids})
        assert torch.equal(prefix.output, answer(model, {"input_ids": ids}))
