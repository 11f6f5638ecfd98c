"""Patches of weights: what is added, that it comes off to the bit, and what a file keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headwise.edits import Full, LowRank, Patch, patches_in
from headwise.edits.deltas import Delta, added, low_rank
from headwise.models import view
from headwise.models.backbones import Decoder
from headwise.models.identity import weights_hash
from headwise.models.projections import features_first
from headwise.models.spots import down_projection
from headwise.parts import Attention, Mlp
from tests.instruments import tiny


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(
        20, 16, 2, mixer=lambda i: Attention(16, 2, causal=True), feed=lambda i: Mlp(16, 24)
    ).eval()


def model_of(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, str]:
    made = decoder() if name == "decoder" else getattr(tiny, name)()
    module = down_projection(view(made).layers[1])
    known = {id(m): n for n, m in made.named_modules()}
    return made.to(dtype), f"{known[id(module)]}.weight"


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def some_delta(shape: torch.Size, seed: int = 0) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(shape[0], 2, generator=g), torch.randn(2, shape[1], generator=g))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gpt2", "decoder"])
def test_it_is_added_and_comes_off_to_the_bit(name: str, dtype: torch.dtype) -> None:
    model, where = model_of(name, dtype)
    before = numbers(model)
    delta = some_delta(before[where].shape)
    patch = Patch.of(model, {where: delta})
    assert same(numbers(model), before)
    with patch:
        assert patches_in(model) == [patch]
        now = numbers(model)
        wide = torch.promote_types(dtype, torch.float32)
        slow = before[where].to(wide).clone()
        for i in range(2):
            slow += torch.outer(delta.left[:, i].to(wide), delta.right[i].to(wide))
        torch.testing.assert_close(now[where], slow.to(dtype), rtol=1e-2, atol=1e-5)
        assert not torch.equal(now[where], before[where])
        assert same({k: v for k, v in now.items() if k != where}, before)
    assert same(numbers(model), before)
    assert patches_in(model) == []


def test_it_comes_off_after_an_exception() -> None:
    model, where = model_of("llama")
    before = numbers(model)
    with pytest.raises(KeyError), Patch.of(model, {where: some_delta(before[where].shape)}):
        raise KeyError
    assert same(numbers(model), before)


def test_undoing_is_no_subtraction() -> None:
    """Adding 1e6 to numbers near 1 and subtracting it loses them."""
    model, where = model_of("llama")
    before = numbers(model)
    patch = Patch.of(model, {where: Full(torch.full(before[where].shape, 1e6))}).apply()
    by_subtraction = numbers(model)[where] - 1e6
    assert not torch.equal(by_subtraction, before[where])
    patch.undo()
    patch.undo()
    assert same(numbers(model), before)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_several_compose_and_come_off_in_any_order(order: tuple[int, ...]) -> None:
    model, where = model_of("gpt2")
    before = numbers(model)
    deltas = [some_delta(before[where].shape, seed) for seed in range(3)]
    patches = [Patch.of(model, {where: delta}) for delta in deltas]
    for patch in patches:
        patch.apply()
    left = list(range(3))
    for which in order:
        patches[which].undo()
        left.remove(which)
        wanted = before[where]
        for one in left:
            wanted = added(wanted, deltas[one])
        assert torch.equal(numbers(model)[where], wanted)
        assert patches_in(model) == [patches[one] for one in left]
    assert same(numbers(model), before)


def test_tied_weights_change_together() -> None:
    model = decoder()
    name = "embed.weight"
    patch = Patch.of(model, {name: some_delta(model.embed.weight.shape)})
    ids = torch.arange(6)[None]
    plain = model(ids)
    with patch:
        tied = dict(model.named_parameters(remove_duplicate=False))
        others = [n for n, p in tied.items() if p is model.embed.weight]
        assert len(others) == 2
        assert (model(ids) - plain).abs().max() > 1e-3
    assert torch.equal(model(ids), plain)
    other = next(n for n in others if n != name)
    both = {n: some_delta(model.embed.weight.shape) for n in (name, other)}
    with pytest.raises(ValueError, match="are one tensor"):
        Patch.of(model, both)


@pytest.mark.parametrize("name", ["llama", "gpt2", "decoder"])
def test_low_rank_of_a_projection_is_in_its_own_orientation(name: str) -> None:
    model, where = model_of(name)
    module = down_projection(view(model).layers[1])
    out, into = features_first(module).shape
    left, right = torch.randn(out, 1), torch.randn(1, into)
    wanted = features_first(module).detach() + left @ right
    with Patch.of(model, {where: low_rank(module, left, right)}):
        torch.testing.assert_close(features_first(module), wanted)


def test_a_file_keeps_everything(tmp_path: Path) -> None:
    model, where = model_of("llama")
    before = numbers(model)
    file = tmp_path / "new" / "patch.safetensors"
    deltas: dict[str, Delta] = {
        where: some_delta(before[where].shape),
        "lm_head.weight": Full(torch.randn(before["lm_head.weight"].shape)),
    }
    record = {"method": "by hand", "effects": {"loss": 0.5}}
    patch = Patch.of(model, deltas, record, {"L0H1": "scale(0.5)"})
    patch.save(file)
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    again = Patch.load(file, model)
    assert again.record == patch.record
    assert again.record["model"]["weights"] == weights_hash(model)
    assert again.changes == {"L0H1": "scale(0.5)"}
    ids = torch.arange(8)[None]
    with patch:
        wanted, weights = model(ids).logits, numbers(model)
    with again:
        assert same(numbers(model), weights)
        assert torch.equal(model(ids).logits, wanted)
    assert same(numbers(model), before)


def test_attention_is_changed_and_put_back_too() -> None:
    model = tiny.llama()
    ids = torch.arange(8)[None]
    plain = model(ids).logits
    with Patch.of(model, {}, changes={"L0": "silence()"}):
        assert (model(ids).logits - plain).abs().max() > 1e-3
    assert torch.equal(model(ids).logits, plain)
    with pytest.raises(ValueError, match="layer"):
        Patch.of(model, {}, changes={"L7": "silence()"})


def test_a_file_of_nothing_but_changes(tmp_path: Path) -> None:
    model = tiny.llama()
    Patch.of(model, {}, changes={"all": "window(3)"}).save(tmp_path / "p")
    assert Patch.load(tmp_path / "p", model).changes == {"all": "window(3)"}


def test_another_models_weights_are_refused_with_both_hashes(tmp_path: Path) -> None:
    model, where = model_of("llama")
    patch = Patch.of(model, {where: some_delta(model.state_dict()[where].shape)})
    patch.save(tmp_path / "p")
    other = tiny.llama()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="made for") as error:
        Patch.load(tmp_path / "p", other)
    for one in (model, other):
        assert weights_hash(one) in str(error.value)
    with pytest.raises(ValueError, match="made for"):
        Patch.load(tmp_path / "p", tiny.llama().bfloat16())


def test_files_of_patches_made_apart_and_upon_each_other(tmp_path: Path) -> None:
    model, where = model_of("llama")
    shape = model.state_dict()[where].shape
    first = Patch.of(model, {where: some_delta(shape, 1)})
    apart = Patch.of(model, {where: some_delta(shape, 2)})
    with first:
        upon = Patch.of(model, {where: some_delta(shape, 3)})
        apart.on(model), upon.on(model)
        with apart:
            apart.on(model), upon.on(model)
    apart.on(model)
    with pytest.raises(ValueError, match="made upon"):
        upon.on(model)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    model, where = model_of("llama")
    shape = model.state_dict()[where].shape
    with pytest.raises(ValueError, match="no parameter 'nothing'"):
        Patch.of(model, {"nothing": some_delta(shape)})
    with pytest.raises(ValueError, match="shape"):
        Patch.of(model, {where: Full(torch.zeros(3, 3))})
    with pytest.raises(ValueError, match="do not multiply"):
        LowRank(torch.zeros(3, 2), torch.zeros(1, 3))
    with pytest.raises(RuntimeError, match="no model"):
        Patch({}).apply()
    patch = Patch.of(model, {where: some_delta(shape)}).apply()
    with pytest.raises(RuntimeError, match="already"):
        patch.apply()
    patch.undo()
    with pytest.raises(FileNotFoundError, match="no patch file"):
        Patch.load(tmp_path / "none")
    (tmp_path / "words").write_text("hello")
    with pytest.raises(ValueError, match="no patch file"):
        Patch.load(tmp_path / "words")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="header"):
        Patch.load(tmp_path / "other")
