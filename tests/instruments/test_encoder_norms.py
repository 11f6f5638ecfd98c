"""Norm-based maps and GlobEnc: what moves, added up; lengths against the vectors themselves."""

from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.instruments.encoder_norms import globenc, norm_maps
from headwise.instruments.norm_maps import INCLUDE
from headwise.instruments.targets import LogitOf
from headwise.models import UnsupportedModelError, view
from headwise.models.backbones import Decoder
from headwise.models.sites import recording, sites_of
from headwise.parts import Attention
from headwise.parts.position.rotary import Rotary
from headwise.parts.wiring.post import PostNorm
from tests.instruments import tiny


def own(wiring: Any = None) -> Any:
    torch.manual_seed(0)
    model = Decoder(
        60, 16, 2, lambda layer: Attention(16, 4, position=Rotary(), causal=True), wiring=wiring
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    return model.eval()


MODELS: dict[str, Any] = {
    "bert": tiny.bert,
    "gpt2": tiny.gpt2,
    "llama": tiny.llama,
    "vit": tiny.vit,
    "own": own,
    "own, norms behind": lambda: own(PostNorm()),
}
BEHIND = ("bert", "own, norms behind")


def given(name: str, n: int = 7) -> dict[str, Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.manual_seed(0))}
    return {"input_ids": tiny.ids(n, batch=2)}


def biased(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.manual_seed(3)))
    return model


def states(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    look = view(model)
    with torch.no_grad(), recording(look, sites_of(look, "residual")) as kept:
        model(**inputs)
    return list(kept.values())


@pytest.mark.parametrize("name", MODELS)
def test_vectors_add_up_to_what_the_layer_gives(name: str) -> None:
    model, inputs = biased(MODELS[name]()), given(name)
    residual = states(model, inputs)
    for layer, one in enumerate(norm_maps(view(model), inputs)):
        assert len(one.norms) == (2 if name in BEHIND else 0)
        for place in (0, 3, 6):
            whole = one.vectors(place).sum(1) + one.rest[:, place]
            expected = residual[layer + 1][:, place].double()
            scale = float(expected.abs().max())
            torch.testing.assert_close(whole, expected, atol=1e-5 * scale, rtol=1e-4)


def test_parts_of_a_bert_layer_add_up() -> None:
    """Attention's output, the sum with the residual, the first norm: each by its own module."""
    model, inputs = biased(tiny.bert()), given("bert")
    layer = model.bert.encoder.layer[0].attention.output
    seen: dict[str, Tensor] = {}
    layer.dense.register_forward_hook(lambda m, a, o: seen.update(attention=o))
    layer.LayerNorm.register_forward_hook(lambda m, a, o: seen.update(residual=a[0], norm=o))
    for include in ("attention", "residual", "norm"):
        one = norm_maps(view(model), inputs, include=include)[0]
        whole = one.vectors(2).sum(1) + one.rest[:, 2]
        expected = seen[include][:, 2].double().detach()
        scale = float(expected.abs().max())
        torch.testing.assert_close(whole, expected, atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("include", INCLUDE)
@pytest.mark.parametrize("name", MODELS)
def test_lengths_are_those_of_the_vectors(
    name: str, include: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwise.instruments.norm_maps.TILE", 64)
    monkeypatch.setattr("headwise.instruments.norm_maps.KEYS", 3)
    model, inputs = biased(MODELS[name]()), given(name)
    if include == "norm" and name not in BEHIND:
        with pytest.raises(ValueError, match="no norm stands behind"):
            norm_maps(view(model), inputs, include=include)
        return
    for one in norm_maps(view(model), inputs, include=include):
        n = one.stream.shape[1]
        slow = torch.stack([one.vectors(place).norm(dim=-1) for place in range(n)], 1)
        places = torch.tensor([4, 0, n - 1])
        scale = float(slow.max())
        torch.testing.assert_close(one.rows(places), slow[:, places], atol=1e-5 * scale, rtol=1e-3)
        shares = slow / slow.sum(-1, keepdim=True)
        weights = torch.rand(2, n, generator=torch.manual_seed(1))
        expected = (weights.double()[:, None] @ shares)[:, 0]
        torch.testing.assert_close(one.carry(weights), expected, atol=1e-5, rtol=1e-4)


def test_globenc_by_whole_matrices() -> None:
    model, inputs = tiny.bert(), given("bert")
    product = torch.eye(7).double().expand(2, 7, 7)
    for one in norm_maps(view(model), inputs):
        slow = torch.stack([one.vectors(i).norm(dim=-1) for i in range(7)], 1)
        product = slow / slow.sum(-1, keepdim=True) @ product
    torch.testing.assert_close(product.sum(-1), torch.ones(2, 7).double())
    for place in (0, 4, -1):
        found = globenc(view(model), inputs, LogitOf(3), at=place)
        torch.testing.assert_close(found, product[:, place], atol=1e-5, rtol=1e-4)
    # the last token's logit is read from the last position alone
    found = globenc(view(model), inputs, LogitOf(3))
    torch.testing.assert_close(found, product[:, -1], atol=1e-5, rtol=1e-4)


def test_without_values_everything_stays_where_it_is() -> None:
    model, inputs = tiny.bert(), given("bert")
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.self.value.weight.zero_()
            layer.attention.self.value.bias.zero_()
    every = torch.arange(7)
    for one in norm_maps(view(model), inputs):
        torch.testing.assert_close(one.shares(every), torch.eye(7).double().expand(2, 7, 7))


def test_padding_gets_nothing() -> None:
    model = tiny.bert()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    inputs = {**given("bert"), "attention_mask": mask}
    found = globenc(view(model), inputs, LogitOf(3))
    torch.testing.assert_close(found[0, 5:], torch.zeros(2).double())
    torch.testing.assert_close(found.sum(1), torch.ones(2).double())
    short = {"input_ids": inputs["input_ids"][:1, :5]}
    alone = globenc(view(model), short, LogitOf(3))
    torch.testing.assert_close(found[:1, :5], alone, atol=1e-5, rtol=1e-4)


def test_an_encoder_under_a_decoder() -> None:
    model = tiny.bart()
    inputs = {"input_ids": tiny.ids(6, batch=2), "decoder_input_ids": tiny.ids(4, 5, batch=2)}
    found = globenc(view(model), inputs, LogitOf(3))
    assert found.shape == (2, 6)
    torch.testing.assert_close(found.sum(1), torch.ones(2).double())
    with pytest.raises(UnsupportedModelError, match="the decoder attends to another stack"):
        globenc(view(model), inputs, LogitOf(3), of="decoder")


def test_refusals_and_nothing_left() -> None:
    model, inputs = tiny.bert(), given("bert")
    with pytest.raises(ValueError, match="include='all'"):
        globenc(view(model), inputs, LogitOf(3), include="all")
    with pytest.raises(ValueError, match="of='decoder'"):
        globenc(view(model), inputs, LogitOf(3), of="decoder")
    globenc(view(model), inputs, LogitOf(3))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    odd = tiny.bert()
    layer = odd.bert.encoder.layer[0]
    layer.register_forward_hook(
        lambda m, a, o: (o[0] * 2, *o[1:]) if isinstance(o, tuple) else 2 * o
    )
    with pytest.raises(UnsupportedModelError, match="gives neither the sum"):
        globenc(view(odd), inputs, LogitOf(3))
