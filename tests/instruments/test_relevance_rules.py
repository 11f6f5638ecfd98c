"""Attention-aware relevance: against every rule by hand, against lxt, and in what is conserved."""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headwise.instruments.input_places import InputPlace
from headwise.instruments.metrics import metric_of
from headwise.instruments.relevance_functions import scaled
from headwise.instruments.relevance_linear import shared_linear
from headwise.instruments.relevance_propagation import lrp, pa_lrp, propagate
from headwise.instruments.relevance_rules import Rules
from headwise.instruments.targets import LogitOf
from headwise.models import UnsupportedModelError, view
from headwise.models.backbones import Decoder, VisionPatches
from headwise.models.heads import Classify
from headwise.parts import Attention
from headwise.parts.feed.gated import Gated
from headwise.parts.feed.mlp import Mlp
from headwise.parts.position.absolute import Learned, Sinusoidal
from headwise.parts.position.rotary import Rotary
from tests.instruments import explicit_relevance, tiny

TARGET = 5


def words(n: int = 7, batch: int = 2) -> dict[str, Tensor]:
    return {"input_ids": tiny.ids(n, batch=batch)}


@pytest.mark.parametrize("positions", [False, True])
def test_llama_by_hand(positions: bool) -> None:
    model = tiny.llama().double()
    inputs = words(6)
    found = propagate(view(model), inputs, LogitOf(TARGET), positions=positions)
    for row in range(2):
        tokens, places = explicit_relevance.llama(
            model, inputs["input_ids"][row], TARGET, positions
        )
        # the model's own norms compute in float32
        torch.testing.assert_close(found.tokens[row], tokens, atol=1e-5, rtol=1e-4)
        if positions:
            assert found.positions is not None
            torch.testing.assert_close(found.positions[row], places, atol=1e-5, rtol=1e-4)


def lxt_patches() -> Any:
    """lxt's own rules. Its package cannot be imported beside transformers 5 (its BERT asks for a
    name that is gone), so its __init__ is passed over."""
    package = pytest.importorskip("lxt")
    place = Path(package.__file__ or next(iter(package.__path__))).parent / "efficient"
    if not place.exists():
        place = Path(next(iter(package.__path__))) / "efficient"
    if "lxt.efficient" not in sys.modules:
        stub = ModuleType("lxt.efficient")
        stub.__path__ = [str(place)]
        sys.modules["lxt.efficient"] = stub
    return importlib.import_module("lxt.efficient.patches")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_same_as_lxt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patches = lxt_patches()
    model: Any = getattr(tiny, name)().double()
    inputs = words()
    ours = lrp(view(model), inputs, LogitOf(TARGET))
    where = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    sdpa = importlib.import_module("transformers.integrations.sdpa_attention")
    attend = patches.wrap_attention_forward(sdpa.sdpa_attention_forward)
    chosen = SimpleNamespace(get_interface=lambda *args: attend)
    monkeypatch.setattr(where, "ALL_ATTENTION_FUNCTIONS", chosen)
    if name == "llama":
        monkeypatch.setattr(where.LlamaRMSNorm, "forward", patches.rms_norm_forward)
        monkeypatch.setattr(where.LlamaMLP, "forward", patches.gated_mlp_forward)
    else:
        monkeypatch.setattr(nn.LayerNorm, "forward", patches.layer_norm_forward)
        activation = type(model.transformer.h[0].mlp.act)
        monkeypatch.setattr(activation, "original_forward", activation.forward, raising=False)
        monkeypatch.setattr(activation, "forward", patches.non_linear_forward)
    x = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_(True)
    logits = model(inputs_embeds=x, use_cache=False).logits
    logits[:, -1, TARGET].sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(ours, (x * x.grad).sum(-1).detach(), atol=1e-6, rtol=1e-5)


def without_biases(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.zero_()
            elif parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model.double().eval()


def decoder(position: Any, feed: Any) -> nn.Module:
    torch.manual_seed(0)
    mixer = lambda layer: Attention(16, 4, position=position(), causal=True)  # noqa: E731
    return without_biases(Decoder(20, 16, 2, mixer=mixer, feed=lambda layer: feed(16)))


@pytest.mark.parametrize("feed", [Mlp, Gated])
@pytest.mark.parametrize("position", [Rotary, Sinusoidal, lambda: Learned(12)])
def test_nothing_is_lost_in_our_own(position: Any, feed: Any) -> None:
    """Constant maps, no biases: tokens and positions together are the logit, tokens alone are
    not, where positions are added."""
    model = decoder(position, feed)
    inputs = {"input_ids": torch.randint(20, (3, 8), generator=torch.manual_seed(1))}
    found = propagate(view(model), inputs, LogitOf(TARGET), maps="constant", positions=True)
    torch.testing.assert_close(found.lost, torch.zeros(3).double(), atol=1e-9, rtol=0)
    assert found.positions is not None
    turned = position is Rotary  # constant maps: nothing comes to the angles
    assert bool((found.positions.abs().sum(1) == 0).all()) is turned
    if not turned:
        assert bool((found.positions.sum(1).abs() > 1e-3).all())


def test_angles_take_from_tokens_what_they_get() -> None:
    """The uniform rule at the rotation, in one layer: place by place, nothing is made."""
    mixer = lambda layer: Attention(16, 4, position=Rotary(), causal=True)  # noqa: E731
    look = view(without_biases(Decoder(20, 16, 1, mixer, feed=lambda layer: None)))
    inputs = {"input_ids": torch.randint(20, (2, 6), generator=torch.manual_seed(1))}
    alone = propagate(look, inputs, LogitOf(TARGET))
    both = propagate(look, inputs, LogitOf(TARGET), positions=True)
    torch.testing.assert_close(both.total, alone.tokens)
    assert both.positions is not None
    assert bool((both.positions.abs().sum(1) > 1e-6).all())
    by_part = [
        pa_lrp(look, inputs, LogitOf(TARGET), part=part) for part in ("tokens", "positions", "both")
    ]
    torch.testing.assert_close(by_part[0] + by_part[1], by_part[2])
    torch.testing.assert_close(by_part[1], both.positions)


def test_image_positions() -> None:
    torch.manual_seed(0)
    ours = without_biases(
        VisionPatches(
            16, 4, 16, 2, lambda layer: Attention(16, 4), Classify(16, classes=3), class_token=True
        )
    )
    for model, size in ((ours, 16), (tiny.vit().double(), 32)):
        inputs = {"pixel_values": torch.randn(2, 3, size, size).double()}
        plain = propagate(view(model), inputs, LogitOf(1), maps="constant")
        found = propagate(view(model), inputs, LogitOf(1), maps="constant", positions=True)
        torch.testing.assert_close(found.total, plain.tokens)
        # the table is added to what is read: table x gradient, and the gradient is parts / read
        table = next(p for n, p in model.named_parameters() if "position" in n).detach()
        read = InputPlace(view(model), inputs).read()
        expected = (plain.parts / read * table).sum(-1)
        assert found.positions is not None
        torch.testing.assert_close(found.positions, expected, atol=1e-8, rtol=1e-6)


def test_both_sides_of_an_encoder_decoder() -> None:
    look = view(tiny.bart().double())
    inputs = {"input_ids": tiny.ids(7, batch=2), "decoder_input_ids": tiny.ids(4, 3, batch=2)}
    sides = [
        propagate(look, inputs, LogitOf(TARGET), of=of, maps="constant", positions=True)
        for of in ("encoder", "decoder")
    ]
    assert [side.tokens.shape for side in sides] == [(2, 7), (2, 4)]
    whole = sides[0].total.sum(1) + sides[1].total.sum(1)
    torch.testing.assert_close(whole, sides[0].score, atol=1e-8, rtol=1e-8)


def test_nothing_changes_but_gradients() -> None:
    inputs = words()
    for make in (tiny.llama, tiny.gpt2, tiny.bert, tiny.gpt_oss):
        model: Any = make()
        before = model(**inputs, use_cache=False).logits if make is not tiny.bert else None
        before = model(**inputs).logits if before is None else before
        model.train()
        found = propagate(view(model), inputs, metric_of(lambda logits, given: logits.sum((1, 2))))
        expected = before.sum((1, 2))
        torch.testing.assert_close(found.score, expected.detach(), atol=1e-2, rtol=1e-4)
        assert model.training
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert not any("forward" in vars(m) for m in model.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        torch.testing.assert_close(model.eval()(**inputs).logits, before)


def test_gamma_by_hand() -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*s).double() for s in ((4, 5), (3, 5), (3,)))
    r = torch.randn(4, 3).double()
    given = x.clone().requires_grad_(True)
    z = shared_linear(given, weight, bias, 0.25)
    torch.testing.assert_close(z, x @ weight.T + bias)
    (grad,) = torch.autograd.grad(z, given, r / z.detach())
    expected = explicit_relevance.gamma_linear(x, weight, bias, r, 0.25)
    torch.testing.assert_close(x * grad, expected, atol=1e-8, rtol=1e-6)


def test_epsilon_takes_and_gamma_keeps() -> None:
    inputs = words()
    look = view(tiny.llama().double())
    keep = propagate(look, inputs, LogitOf(TARGET), maps="constant", gamma=0.1)
    torch.testing.assert_close(keep.lost, torch.zeros(2).double(), atol=1e-4, rtol=0)
    plain = lrp(look, inputs, LogitOf(TARGET), maps="constant")
    assert not torch.allclose(keep.tokens, plain)
    little = lrp(look, inputs, LogitOf(TARGET), maps="constant", epsilon=1e-9)
    torch.testing.assert_close(little, plain, atol=1e-4, rtol=1e-4)
    much = lrp(look, inputs, LogitOf(TARGET), maps="constant", epsilon=1e3)
    assert much.abs().sum() < 1e-3 * plain.abs().sum()


def rule_of(function: Any, *values: Tensor) -> list[Tensor]:
    """Relevance of each argument, from a relevance of function's own value."""
    given = [v.clone().requires_grad_(True) for v in values]
    with Rules():
        out = function(*given)
    torch.testing.assert_close(out.detach(), function(*values))
    grads = torch.autograd.grad(out.sum(), given)
    return [v * g for v, g in zip(values, grads, strict=True)]


def test_each_rule() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 3).double()
    for x in rule_of(lambda s, t: s * t, a, b):
        torch.testing.assert_close(x, a * b / 2)
    for x in rule_of(lambda s, t: s @ t, a, b):
        torch.testing.assert_close(x.sum(), (a @ b).sum() / 2)
    for x in rule_of(lambda s, t: torch.einsum("ij,jk->ik", s, t), a, b):
        torch.testing.assert_close(x.sum(), (a @ b).sum() / 2)
    for f in (torch.relu, torch.tanh, nn.functional.gelu, nn.functional.silu, torch.square):
        torch.testing.assert_close(rule_of(f, a)[0], f(a))
    for f in (nn.LayerNorm(3), nn.RMSNorm(3)):
        torch.testing.assert_close(rule_of(f.double(), a)[0].sum(), f(a).sum())
    top, bottom = rule_of(lambda s, t: s / t.norm() + 0 * t, a, b)
    torch.testing.assert_close(top, a / b.norm())
    assert not bottom.any()
    glu = rule_of(lambda s: nn.functional.glu(s, -1), torch.randn(2, 4).double())[0]
    assert glu.shape == (2, 4)
    q, k, v = torch.randn(3, 1, 2, 4, 3).double()
    fused = rule_of(nn.functional.scaled_dot_product_attention, q, k, v)
    slow = rule_of(lambda q, k, v: (q @ k.mT / 3**0.5).softmax(-1) @ v, q, k, v)
    for one, other in zip(fused, slow, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(scaled(a, 2.0), a)


def test_refusals() -> None:
    look, inputs, metric = view(tiny.llama()), words(), LogitOf(TARGET)
    with pytest.raises(ValueError, match="maps='flat'"):
        lrp(look, inputs, metric, maps="flat")
    with pytest.raises(ValueError, match="epsilon=-1"):
        lrp(look, inputs, metric, epsilon=-1)
    with pytest.raises(ValueError, match="part='all'"):
        pa_lrp(look, inputs, metric, part="all")
    with pytest.raises(ValueError, match="has no gradient"):
        lrp(look, inputs, metric_of("accuracy"))
    flexible: Any = tiny.llama()
    flexible.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="'flex_attention', into which no rule"):
        lrp(view(flexible), inputs, metric)
    bare = Decoder(20, 16, 1, mixer=lambda layer: Attention(16, 2, causal=True))
    with pytest.raises(UnsupportedModelError, match="no positional encoding of Decoder"):
        pa_lrp(view(bare), {"input_ids": torch.randint(20, (1, 4))}, metric)
    with pytest.raises(UnsupportedModelError, match="torch's exp"), Rules():
        torch.exp(torch.ones(2, requires_grad=True))
    x, fused = torch.randn(2, 3, 4, requires_grad=True), nn.MultiheadAttention(4, 2)
    with pytest.raises(UnsupportedModelError, match="multi_head_attention_forward"), Rules():
        fused(x, x, x)
