import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwise.compress import compensate, factorise, steps_of
from headwise.compress.structure.least_squares import Problem
from headwise.models.default import default_model_path, default_text
from headwise.models.errors import UnsupportedModelError
from tests.instruments import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def small():
    path = default_model_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(default_text(16000)[0], return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // 128 * 128].view(-1, 128)
    half = len(rows) // 2
    return model, {"input_ids": rows[:half]}, {"input_ids": rows[half:]}


@pytest.mark.parametrize("bias", [True, False])
def test_fit_is_ridge_regression_about_the_weights(bias):
    torch.manual_seed(0)
    x, y = torch.randn(60, 5) + 0.5, torch.randn(60, 3)
    matrix = nn.Linear(5, 3, bias=bias)
    start = matrix.weight.detach().double().clone()
    problem = Problem()
    problem.add(x[:30], y[:30])
    problem.add(x[30:], y[30:])
    fit = problem.solve(matrix, ridge=0.1)
    # by rows of data: the pull is five more examples
    wide, goal = x.double(), y.double()
    pull = (0.1 * wide.square().sum(0).mean()).sqrt()
    rows = torch.cat([wide, pull * torch.eye(5, dtype=torch.float64)])
    goals = torch.cat([goal, pull * start.T])
    if bias:
        rows = torch.cat([rows, torch.cat([torch.ones(60, 1), torch.zeros(5, 1)]).double()], 1)
    want = torch.linalg.lstsq(rows, goals).solution
    torch.testing.assert_close(matrix.weight.double(), want[:5].T, atol=1e-5, rtol=1e-4)
    if bias:
        torch.testing.assert_close(matrix.bias.double(), want[5], atol=1e-5, rtol=1e-4)
    left = goal - wide @ matrix.weight.double().T - (matrix.bias.double() if bias else 0)
    error = float(left.square().sum() / goal.square().sum())
    assert fit.after == pytest.approx(error, rel=1e-4)
    assert fit.after < fit.before


def test_noise_is_not_fitted():
    torch.manual_seed(0)
    x = torch.randn(80, 30)
    matrix = nn.Linear(30, 4)
    y = matrix(x).detach() + torch.randn(80, 4)
    kept = matrix.weight.detach().clone()
    problem = Problem()
    problem.add(x, y)
    fit = problem.solve(matrix)
    assert fit.ridge is None or fit.ridge >= 0.1
    assert float((matrix.weight - kept).norm()) < 0.5 * float(kept.norm())


def _without_neurons(model, layer, gone):
    with torch.no_grad():
        model.model.layers[layer].mlp.down_proj.weight[:, gone] = 0


def test_what_others_carry_is_recovered():
    """Neurons that are copies of others: their weights can be taken over."""
    model, inputs = tiny.llama(), {"input_ids": tiny.ids(60, batch=6)}
    with torch.no_grad():
        mlp = model.model.layers[0].mlp
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight[24:] = projection.weight[:24]
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for projection in (
            pruned.model.layers[0].mlp.gate_proj,
            pruned.model.layers[0].mlp.up_proj,
        ):
            projection.weight[24:] = 0
    found = compensate(pruned, model, inputs, parts=("mlp",), ridge=1e-9)
    assert found.before > 0.1
    assert found.after < 1e-4
    name = "model.layers.0.mlp.down_proj"
    assert found.fits[name].after < 1e-6 < found.fits[name].before


@pytest.mark.parametrize("target", ["residual", "output"])
def test_price_falls_on_text_that_was_not_seen(small, target):
    model, inputs, test = small
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for layer in pruned.model.layers:
            layer.self_attn.o_proj.weight[:, : layer.self_attn.head_dim] = 0
            layer.mlp.down_proj.weight[:, ::3] = 0
            layer.mlp.up_proj.weight[::3] = 0
            layer.mlp.gate_proj.weight[::3] = 0
    found = compensate(pruned, model, inputs, test, target=target)
    assert found.after < 0.8 * found.before
    assert not found.skipped
    assert all(fit.after <= fit.before + 1e-9 for fit in found.fits.values())


def test_dropped_layers_are_made_up_for(small):
    model, inputs, test = small
    pruned = copy.deepcopy(model)
    depth = len(pruned.model.layers)
    del pruned.model.layers[depth // 2]
    for number, layer in enumerate(pruned.model.layers):
        layer.self_attn.layer_idx = number
    pruned.config.num_hidden_layers -= 1
    kept = [n for n in range(depth) if n != depth // 2]
    with pytest.raises(ValueError, match="layers="):
        compensate(pruned, model, inputs)
    found = compensate(pruned, model, inputs, test, layers=kept)
    assert found.after < 0.8 * found.before


def test_factorised_models_are_recovered_through_their_second_factor(small):
    model, inputs, test = small
    pruned = copy.deepcopy(model)
    factorise(pruned, inputs, keep=0.4, weighting="none")
    found = compensate(pruned, model, inputs, test)
    assert found.after < found.before


def test_a_bias_is_a_step():
    model, inputs = tiny.llama(), {"input_ids": tiny.ids(40, batch=4)}
    pruned = copy.deepcopy(model)
    _without_neurons(pruned, 0, slice(0, 20))
    compensate(pruned, model, inputs, parts=("mlp",), bias=True)
    assert pruned.model.layers[0].mlp.down_proj.bias is not None
    assert pruned.model.layers[1].mlp.down_proj.bias is not None
    assert [type(step).__name__ for step in steps_of(pruned)] == ["AddBias"]


def test_post_norm_models_go_by_the_output():
    model, inputs = tiny.bert(), {"input_ids": tiny.ids(30, batch=6)}
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        pruned.bert.encoder.layer[0].output.dense.weight[:, :16] = 0
    with pytest.raises(UnsupportedModelError, match="target='output'"):
        compensate(pruned, model, inputs)
    found = compensate(pruned, model, inputs, target="output")
    assert found.after < found.before
    assert len(found.fits) == 4


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_other_families(name):
    model = getattr(tiny, name)()
    torch.manual_seed(0)
    inputs = {"input_ids": tiny.ids(40, batch=4)}
    if name == "vit":
        inputs = {"pixel_values": torch.randn(32, 3, 32, 32)}
    pruned = copy.deepcopy(model)
    factorise(pruned, inputs, rank=6, which="attention")
    found = compensate(pruned, model, inputs)
    assert len(found.fits) == 4
    assert all(fit.after <= fit.before for fit in found.fits.values())
    assert any(fit.after < fit.before for fit in found.fits.values())


def test_an_unchanged_model_stays_as_it_is():
    model, inputs = tiny.llama(), {"input_ids": tiny.ids(40, batch=4)}
    again = copy.deepcopy(model)
    found = compensate(again, model, inputs)
    assert found.before == pytest.approx(0, abs=1e-6)
    assert found.after == pytest.approx(0, abs=1e-4)


def test_words_that_do_not_fit():
    model = tiny.llama()
    with pytest.raises(ValueError, match="target"):
        compensate(model, model, {"input_ids": tiny.ids(9)}, target="logits")
    with pytest.raises(ValueError, match="parts"):
        compensate(model, model, {"input_ids": tiny.ids(9)}, parts=("heads",))


@pytest.mark.parametrize("dropped", [(), (2,)])
def test_passes_that_go_on_where_the_last_was_give_what_whole_ones_give(
    small, monkeypatch, dropped
):
    """Also where layers are missing, and a layer's attention."""
    from headwise.compress.structure import recovery
    from headwise.compress.structure.layers import drop_layers

    model, given, _ = small
    found, ran = [], []
    for reuse in (True, False):
        if not reuse:
            monkeypatch.setattr(recovery, "can_go_on", lambda look, batch: False)
        cut, calls = copy.deepcopy(model), []
        drop_layers(cut, [0], parts="attention")
        if dropped:
            drop_layers(cut, list(dropped))
        first = cut.get_submodule("model.layers.0.mlp")
        first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        layers = [n for n in range(model.config.num_hidden_layers) if n not in dropped]
        done = compensate(cut, model, given, layers=layers)
        assert any(fit.ridge is not None for fit in done.fits.values())
        found.append(dict(cut.named_parameters()))
        ran.append(len(calls))
    assert all(torch.allclose(p, found[1][name], atol=1e-4) for name, p in found[0].items())
    assert ran[0] < ran[1] - 4  # not once more for each of the layers behind
