import itertools
import json

import pytest
import torch
from torch import Tensor, nn

from headwise.compress import LowRank, factorise, steps_of, take
from headwise.compress.step import read_step, write_step
from headwise.compress.structure.low_rank import Factorise
from headwise.compress.structure.matrices import matrices_of
from headwise.compress.structure.moments import input_moments
from headwise.compress.structure.ranks import largest_rank, share_out, spectrum
from headwise.instruments.examples import read_examples
from headwise.models import view
from headwise.models.backbones import Decoder
from headwise.models.projections import features_first
from headwise.parts import Attention
from tests.instruments import tiny

torch.set_num_threads(1)


def _skewed(n: int, wide: int, seed: int = 0) -> Tensor:
    """Inputs `(n, wide)` that are correlated, of scales that span 100x, and not centred."""
    torch.manual_seed(seed)
    mixing = torch.randn(wide, wide, dtype=torch.float64) * 0.3 + torch.eye(wide)
    return torch.randn(n, wide, dtype=torch.float64) * torch.logspace(-1, 1, wide) @ mixing + 0.5


def _alternating(x: Tensor, y: Tensor, rank: int) -> float:
    """Least mean square of y - x A B over A, B of this rank: each solved in turn, from a random
    start. The problem has no other local minima."""
    torch.manual_seed(3)
    right = torch.randn(rank, y.shape[1], dtype=torch.float64)
    for _ in range(300):
        left = torch.linalg.lstsq(x, y @ torch.linalg.pinv(right)).solution
        right = torch.linalg.lstsq(x @ left, y).solution
    return float((y - x @ left @ right).square().mean())


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9)])
@pytest.mark.parametrize("rank", [1, 3])
def test_full_weighting_is_the_optimum_of_the_output_error(shape, rank):
    x = _skewed(200, shape[1])
    weight = torch.randn(*shape, dtype=torch.float64)
    y = x @ weight.T
    errors = {}
    for weighting in ("full", "diagonal", "none"):
        up, down = spectrum(weight, x.T @ x / 200, weighting).factors(weight, rank)
        errors[weighting] = float((y - x @ (up @ down).T).square().mean())
    assert errors["full"] == pytest.approx(_alternating(x, y, rank), rel=1e-5)
    assert errors["full"] < 0.99 * min(errors["diagonal"], errors["none"])


def test_error_that_is_told_is_the_error_of_the_output():
    x = _skewed(100, 7)
    weight = torch.randn(6, 7, dtype=torch.float64)
    found = spectrum(weight, x.T @ x / 100)
    up, down = found.factors(weight, 2)
    y = x @ weight.T
    lost = (y - x @ (up @ down).T).square().sum() / y.square().sum()
    assert found.error(2) == pytest.approx(float(lost), rel=1e-9)
    assert found.error(6) == pytest.approx(0, abs=1e-12)


def test_diagonal_weighting_is_the_svd_of_the_scaled_weight_scaled_back():
    x = _skewed(50, 8)
    weight, scale = torch.randn(6, 8, dtype=torch.float64), x.norm(dim=0)
    u, s, v = torch.linalg.svd(weight * scale)
    want = (u[:, :2] * s[:2]) @ v[:2] / scale
    up, down = spectrum(weight, x.T @ x / 50, "diagonal").factors(weight, 2)
    torch.testing.assert_close(up @ down, want)


def _kept(energies, shapes, ranks):
    return sum(
        sum(values[: len(values) if ranks[n] is None else ranks[n]])
        for n, values in energies.items()
    )


def _cost(shapes, ranks):
    return sum(
        shapes[n][0] * shapes[n][1] if r is None else r * sum(shapes[n]) for n, r in ranks.items()
    )


def test_ranks_are_shared_out_as_well_as_by_trying_all():
    torch.manual_seed(0)
    shapes = {"a": (6, 6), "b": (12, 4), "c": (5, 9)}
    choices = [[*range(1, largest_rank(*shapes[n]) + 1), None] for n in shapes]
    exact = 0
    for trial in range(20):
        energies = {
            n: (torch.rand(min(s)) ** (1 + trial % 4)).sort(descending=True).values.tolist()
            for n, s in shapes.items()
        }
        for budget in range(43, 130, 13):
            ranks = share_out(energies, shapes, budget)
            assert _cost(shapes, ranks) <= budget
            got = _kept(energies, shapes, ranks)
            tried = [dict(zip(shapes, rs, strict=True)) for rs in itertools.product(*choices)]
            fitting = [t for t in tried if _cost(shapes, t) <= budget]
            best = max(_kept(energies, shapes, t) for t in fitting)
            exact += got >= best - 1e-9
            # what does not fit is less than the dearest single piece, a whole matrix
            assert got >= 0.85 * best
    assert exact >= 0.55 * 20 * 7


def test_of_equal_shapes_the_largest_energies_are_taken():
    energies = {"a": [5.0, 3.0, 1.0, 0.1, *[0.0] * 6], "b": [4.0, 3.5, 0.2, 0.1, *[0.0] * 6]}
    shapes = {"a": (10, 10), "b": (10, 10)}
    assert share_out(energies, shapes, 80) == {"a": 2, "b": 2}
    assert share_out(energies, shapes, 100) == {"a": 3, "b": 2}
    with pytest.raises(ValueError, match="at least 40"):
        share_out(energies, shapes, 30)


def test_flat_spectra_stay_whole():
    energies = {"steep": [10.0, *[0.0] * 9], "flat": [1.0] * 10}
    ranks = share_out(energies, {"steep": (10, 10), "flat": (10, 10)}, 130)
    assert ranks["flat"] is None
    assert ranks["steep"] is not None


MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "vit": tiny.vit}


def _inputs(name: str) -> dict[str, Tensor]:
    if name == "vit":
        torch.manual_seed(0)
        return {"pixel_values": torch.randn(4, 3, 32, 32)}
    return {"input_ids": tiny.ids(40, batch=4)}


@pytest.mark.parametrize("name", MODELS)
def test_models_shrink_and_compute_with_the_factors(name):
    model, inputs = MODELS[name](), _inputs(name)
    before = sum(p.numel() for p in model.parameters())
    weights = {n: features_first(m).detach().clone() for n, m in matrices_of(view(model)).items()}
    lost = factorise(model, inputs, rank=8)
    assert set(lost) == set(weights)
    assert len(lost) >= 8
    saved = sum(w.numel() - 8 * sum(w.shape) for w in weights.values())
    assert before - sum(p.numel() for p in model.parameters()) == saved > 0
    for n, weight in weights.items():
        module = model.get_submodule(n)
        assert isinstance(module, LowRank)
        assert module.rank == 8
        assert torch.linalg.matrix_rank(module.weight) == 8
        assert module.weight.shape == weight.shape
    with torch.no_grad():
        model(**inputs)
    assert len(view(model).attentions) == 2
    assert view(model).attentions[0].query_weight().shape == (4, 8, 32)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_bias_takes_up_the_mean_of_what_is_lost(name):
    model, inputs = MODELS[name](), _inputs(name)
    at = next(n for n in matrices_of(view(model), "attention"))
    matrix = model.get_submodule(at)
    batches = read_examples(model, inputs)
    seen = input_moments(model, {at: matrix}, batches)[at]
    weight, bias = features_first(matrix).detach().clone(), matrix.bias.detach().clone()
    factorise(model, inputs, rank=2, which=(at,))
    new = model.get_submodule(at)
    mean = seen.mean
    torch.testing.assert_close(
        (new.weight.double() @ mean + new.bias.double()).float(),
        (weight.double() @ mean + bias.double()).float(),
        atol=1e-3,
        rtol=1e-3,
    )


def test_moments_are_sums_over_the_real_tokens():
    model = tiny.llama()
    ids = tiny.ids(12, batch=3)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    at = "model.layers.1.self_attn.q_proj"
    kept: list[Tensor] = []
    hook = model.get_submodule(at).register_forward_pre_hook(lambda m, a: kept.append(a[0]))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    hook.remove()
    want = torch.zeros(32, 32, dtype=torch.float64)
    count = 0
    for row in range(3):
        for place in range(12):
            if mask[row, place]:
                x = kept[0][row, place].double()
                want += torch.outer(x, x)
                count += 1
    given = {"input_ids": ids, "attention_mask": mask}
    batches = read_examples(model, given, batch_size=2)
    found = input_moments(model, {at: model.get_submodule(at)}, batches)[at]
    assert found.count == count
    torch.testing.assert_close(found.square, want, rtol=1e-4, atol=1e-4)


def test_keep_is_a_budget_of_parameters():
    model, inputs = tiny.llama(), _inputs("llama")
    matrices = matrices_of(view(model))
    total = sum(features_first(m).numel() for m in matrices.values())
    rest = sum(p.numel() for p in model.parameters()) - total
    factorise(model, inputs, keep=0.6)
    after = sum(p.numel() for p in model.parameters()) - rest
    assert 0.5 * total < after <= 0.6 * total


def test_weighting_by_inputs_beats_plain_svd_on_the_models_answers():
    errors = {}
    for weighting in ("full", "none"):
        model, inputs = tiny.llama(), _inputs("llama")
        with torch.no_grad():
            want = model(**inputs).logits
            factorise(model, inputs, rank=10, weighting=weighting, which="mlp")
            errors[weighting] = float((model(**inputs).logits - want).square().mean())
    assert errors["full"] < errors["none"]


def test_own_backbones():
    torch.manual_seed(0)
    model = Decoder(30, 32, 2, mixer=lambda layer: Attention(32, 4, causal=True)).eval()
    lost = factorise(model, {"input_ids": tiny.ids(20, batch=2) % 30}, rank=6)
    assert len(lost) == 12
    look = view(model)
    assert look.attentions[0].query_weight().shape == (4, 8, 32)
    model(tiny.ids(20) % 30)


def test_the_step_is_done_again_without_data():
    model, inputs = tiny.gpt2(), _inputs("gpt2")
    factorise(model, inputs, rank=5, which="attention")
    (step,) = steps_of(model)
    again = read_step(json.loads(json.dumps(write_step(step))))
    assert again == step
    with torch.device("meta"):
        empty = type(model)(model.config)
    take(empty, again)
    assert {n: p.shape for n, p in empty.state_dict().items()} == {
        n: p.shape for n, p in model.state_dict().items()
    }
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.tie_weights()
    with torch.no_grad():
        torch.testing.assert_close(empty.eval()(**inputs).logits, model(**inputs).logits)


def test_refusals_change_nothing():
    model, inputs = tiny.llama(), _inputs("llama")
    state = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(ValueError, match="largest that does is 15"):
        factorise(model, inputs, rank=16, which="attention")
    with pytest.raises(ValueError, match="one of them"):
        factorise(model, inputs)
    with pytest.raises(ValueError, match="needs inputs"):
        factorise(model, rank=2)
    with pytest.raises(ValueError, match="no module"):
        factorise(model, inputs, rank=2, which=("model.nothing",))
    with pytest.raises(ValueError, match="expected one of"):
        factorise(model, inputs, rank=2, which="queries")
    gpt2 = tiny.gpt2()
    with pytest.raises(ValueError, match="shares its weight"):
        factorise(gpt2, inputs, rank=2, which=("lm_head",))
    with pytest.raises(ValueError, match="no smaller"):
        take(model, Factorise((("model.layers.0.mlp.up_proj", 40),)))
    assert not steps_of(model)
    for name, kept in model.state_dict().items():
        assert torch.equal(kept, state[name])


def test_modules_that_stand_in_two_places_stay_one():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared})
    take(model, Factorise((("a", 2),)))
    assert model["a"] is model["b"]
    assert isinstance(model["a"], LowRank)
