"""Sites: reading them gives what the model computes, writing them changes just that."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from headwise.models import Site, UnsupportedModelError, recording, sites_of, touching, view
from headwise.models.backbones import Decoder
from headwise.models.sites import KINDS
from headwise.models.spots import down_projection
from headwise.parts import Attention
from headwise.parts.wiring.post import PostNorm
from tests.instruments import tiny

SMALL = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}


def own() -> Any:
    return tiny._sharp(Decoder(tiny.VOCABULARY, 16, 3, lambda layer: Attention(16, 4, causal=True)))


def albert() -> Any:
    return tiny._sharp(AlbertForMaskedLM(AlbertConfig(**SMALL, embedding_size=8)))


def neox() -> Any:
    return tiny._sharp(GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)))


def bloom() -> Any:
    """Its feed-forward part adds the residual itself."""
    config = BloomConfig(vocab_size=tiny.VOCABULARY, hidden_size=16, n_layer=3, n_head=4)
    return tiny._sharp(BloomForCausalLM(config))


def falcon() -> Any:
    """It adds what the attention gives to what the feed-forward part gives, in place."""
    config = FalconConfig(**SMALL, num_kv_heads=2, new_decoder_architecture=True)
    return tiny._sharp(FalconForCausalLM(config))


def t5() -> Any:
    config = T5Config(
        vocab_size=tiny.VOCABULARY, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4
    )
    return tiny._sharp(T5ForConditionalGeneration(config))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "gpt_oss": tiny.gpt_oss,
    "bert": tiny.bert,
    "vit": tiny.vit,
    "bart": tiny.bart,
    "albert": albert,
    "neox": neox,
    "bloom": bloom,
    "t5": t5,
    "own": own,
}


def inputs_of(model: Any, batch: int = 3) -> dict[str, Tensor]:
    if type(model).__name__.startswith("ViT"):
        random = torch.Generator().manual_seed(1)
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=random)}
    inputs = {"input_ids": tiny.ids(9, batch=batch)}
    if getattr(model.config, "is_encoder_decoder", False) if hasattr(model, "config") else False:
        inputs["decoder_input_ids"] = tiny.ids(5, seed=2, batch=batch)
    return inputs


def answer(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        given = model(**inputs)
    return given if isinstance(given, Tensor) else given.logits


def shifted(value: Tensor) -> Tensor:
    random = torch.Generator().manual_seed(5)
    return value + 0.5 * torch.randn(value.shape, generator=random)


@pytest.mark.parametrize("name", MODELS)
def test_every_site_is_read_and_written(name: str) -> None:
    model = MODELS[name]()
    look, inputs = view(model), inputs_of(model)
    before = answer(model, inputs)
    for kind in KINDS:
        if name == "gpt_oss" and kind == "neurons":
            continue  # a mixture of experts has no one last projection
        found = sites_of(look, kind)
        assert len(found) >= len(look.layers)
        for site in found:
            with touching(look, {site: shifted}):
                changed = answer(model, inputs)
            assert (changed - before).abs().max() > 1e-5, site
            with touching(look, {site: lambda value: value.clone()}):
                same = answer(model, inputs)
            assert torch.equal(same, before), site
    assert torch.equal(answer(model, inputs), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "bart", "own"])
def test_what_is_read_has_the_shapes_that_are_promised(name: str) -> None:
    model = MODELS[name]()
    look, inputs = view(model), inputs_of(model)
    wanted = [site for kind in KINDS for site in sites_of(look, kind)]
    with recording(look, wanted) as kept:
        answer(model, inputs)
    assert set(kept) == set(wanted)
    by_place = {(a.stack, a.layer, a.kind): a for a in look.attentions}
    for site, value in kept.items():
        if site.kind in ("residual", "attention", "mlp"):
            assert value.shape[-1] == look.width
        elif site.kind != "neurons":
            a = by_place[site.stack or look.stacks[0], site.layer, site.attention]
            heads = a.kv_heads if site.kind in ("keys", "values") else a.heads
            assert value.shape[2:] == (heads, a.head_dim), site


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "bloom", "falcon", "own"])
def test_parts_add_up_to_the_residual(name: str) -> None:
    model = {**MODELS, "falcon": falcon}[name]()
    look, inputs = view(model), inputs_of(model)
    kinds = ("residual", "attention", "mlp")
    wanted = [site for kind in kinds for site in sites_of(look, kind)]
    for detach in (True, False):
        with recording(look, wanted, detach) as kept:
            answer(model, inputs)
        for layer in range(len(look.layers)):
            parts = [kept[Site(kind, layer)] for kind in kinds]
            assert torch.allclose(sum(parts), kept[Site("residual", layer + 1)], atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "own"])
def test_heads_times_output_weights_are_what_attention_adds(name: str) -> None:
    """The sites fit together: residual + attention + mlp = next residual, heads W_O = attention."""
    model = MODELS[name]()
    look, inputs = view(model), inputs_of(model)
    wanted = [s for kind in ("residual", "attention", "mlp", "heads") for s in sites_of(look, kind)]
    with recording(look, wanted) as kept:
        answer(model, inputs)
    for a in look.attentions:
        added = torch.einsum(
            "bnhd,hwd->bnw", kept[Site("heads", a.layer)], a.output_weight().detach()
        )
        bias = a.output_bias()
        added = added if bias is None else added + bias.detach()
        assert torch.allclose(added, kept[Site("attention", a.layer)], atol=1e-4)
        whole = kept[Site("residual", a.layer)] + added + kept[Site("mlp", a.layer)]
        assert torch.allclose(whole, kept[Site("residual", a.layer + 1)], atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bart", "own"])
def test_neurons_times_the_down_projection_are_the_mlp(name: str) -> None:
    model = MODELS[name]()
    look, inputs = view(model), inputs_of(model)
    wanted = [s for kind in ("mlp", "neurons") for s in sites_of(look, kind)]
    with recording(look, wanted) as kept:
        answer(model, inputs)
    for layer in look.layers:
        stack = layer.stack if len(look.stacks) > 1 else None
        with torch.no_grad():
            given = down_projection(layer)(kept[Site("neurons", layer.index, stack)])
        assert torch.allclose(given, kept[Site("mlp", layer.index, stack)], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_queries_keys_and_values_are_projections_of_the_normed_residual(name: str) -> None:
    model = MODELS[name]()
    look, inputs = view(model), inputs_of(model)
    wanted = [s for kind in ("residual", "queries", "keys", "values") for s in sites_of(look, kind)]
    with recording(look, wanted) as kept:
        answer(model, inputs)
    for a in look.attentions:
        assert a.norm is not None
        with torch.no_grad():
            x = a.norm(kept[Site("residual", a.layer)])
            for kind, weight, bias in (
                ("queries", a.query_weight(), a.query_bias()),
                ("keys", a.key_weight(), a.key_bias()),
                ("values", a.value_weight(), a.value_bias()),
            ):
                made = torch.einsum("bnw,hdw->bnhd", x, weight)
                made = made if bias is None else made + bias
                assert torch.allclose(made, kept[Site(kind, a.layer)], atol=1e-4)


def test_gradients_pass_through_what_is_read_and_written() -> None:
    model = tiny.llama()
    look, inputs = view(model), inputs_of(model)
    site = Site("heads", 1)
    scale = torch.ones(4, requires_grad=True)
    with (
        touching(look, {site: lambda out: out * scale[:, None]}),
        recording(look, [site], detach=False) as kept,
    ):
        model(**inputs).logits[:, -1, 7].sum().backward()
    read = kept[site]
    assert read.requires_grad
    assert scale.grad is not None
    assert bool((scale.grad != 0).all())
    step = 1e-2
    with torch.no_grad():
        for head in range(4):
            sides = []
            for sign in (1, -1):
                factor = torch.ones(4)
                factor[head] += sign * step
                with touching(look, {site: lambda out, f=factor: out * f[:, None]}):
                    sides.append(model(**inputs).logits[:, -1, 7].sum())
            slope = (sides[0] - sides[1]) / (2 * step)
            assert float(slope) == pytest.approx(float(scale.grad[head]), rel=2e-2, abs=2e-3)


@pytest.mark.parametrize("make", [tiny.gpt2, own])
def test_gradients_with_respect_to_parts_are_those_of_finite_differences(make: Any) -> None:
    model = make().double()
    ids, look = tiny.ids(5), view(model)

    def answer() -> Tensor:
        output = model(ids)
        return (output if isinstance(output, Tensor) else output.logits)[0, -1, 3]

    for kind in ("heads", "queries", "keys", "values"):
        site = Site(kind, 1)
        with recording(look, [site], detach=False) as kept:
            found = answer()
        (slope,) = torch.autograd.grad(found, kept[site])
        place = (0, 4, 1, 2) if kind in ("heads", "queries") else (0, 2, 1, 2)

        def more(there: Tensor, place: tuple[int, ...] = place) -> Tensor:
            made = there.clone()
            made[place] += 1e-5
            return made

        with torch.no_grad():
            before = answer()
            with touching(look, {site: more}):
                after = answer()
        assert torch.allclose((after - before) / 1e-5, slope[place], rtol=1e-3, atol=1e-7)
        assert slope[place] != 0


def test_a_shared_layer_is_touched_at_the_place_that_is_named() -> None:
    model = albert()
    look, inputs = view(model), inputs_of(model)
    seen: list[Tensor] = []
    wanted = sites_of(look, "residual")
    with recording(look, wanted) as kept:
        out = model.albert(**inputs, output_hidden_states=True).hidden_states
    for site, value in zip(wanted, out, strict=True):
        assert torch.allclose(kept[site], value, atol=1e-6), site
    with touching(look, {Site("heads", 1): lambda value: seen.append(value)}):
        for _ in range(2):
            answer(model, inputs)
    assert len(seen) == 2  # once a pass, though the module runs three times in it


def test_nested_uses_see_what_outer_ones_wrote() -> None:
    model = tiny.gpt2()
    look, inputs = view(model), inputs_of(model)
    site = Site("mlp", 0)
    with touching(look, {site: torch.zeros_like}), recording(look, [site]) as kept:
        answer(model, inputs)
    assert not kept[site].any()


def test_generation_is_touched_at_every_step() -> None:
    model = tiny.llama()
    seen: list[int] = []
    with touching(view(model), {Site("heads", 0): lambda value: seen.append(value.shape[1])}):
        model.generate(tiny.ids(5), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert seen == [5, 1, 1]


def test_everything_is_taken_off_after_an_exception() -> None:
    model = tiny.llama()
    look = view(model)
    with pytest.raises(RuntimeError, match="stop"), touching(look, {Site("mlp", 0): lambda x: x}):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bad_sites_are_refused_before_anything_runs() -> None:
    look = view(tiny.llama())
    with pytest.raises(ValueError, match="no kind of site; there are residual"):
        Site("logits", 0)
    with pytest.raises(ValueError, match="layers 0 to 1"), touching(look, {Site("heads", 2): id}):
        pass
    with pytest.raises(ValueError, match="no cross-attention"):
        touching(look, {Site("heads", 0, attention="cross"): id}).__enter__()
    both = view(tiny.bart())
    with pytest.raises(ValueError, match="stacks encoder, decoder"):
        touching(both, {Site("heads", 0): id}).__enter__()
    with pytest.raises(UnsupportedModelError, match="experts"):
        touching(view(tiny.gpt_oss()), {Site("neurons", 0): id}).__enter__()
    post = Decoder(20, 16, 2, lambda layer: Attention(16, 4, causal=True), wiring=PostNorm())
    with pytest.raises(UnsupportedModelError, match="adds to the residual is not known"):
        touching(view(post), {Site("attention", 0): id}).__enter__()


def test_another_shape_is_refused() -> None:
    model = tiny.llama()
    with (
        pytest.raises(ValueError, match=r"L0 heads: .* was written in place of"),
        touching(view(model), {Site("heads", 0): lambda value: value[:, :1]}),
    ):
        answer(model, inputs_of(model))


def test_a_module_that_gets_no_tensor_is_named() -> None:
    model = tiny.llama()
    model.model.layers[0].mlp.forward = lambda x: {"x": x}
    with (
        pytest.raises(UnsupportedModelError, match="gives dict, no tensor"),
        touching(view(model), {Site("mlp", 0): lambda value: value}),
    ):
        answer(model, inputs_of(model))
