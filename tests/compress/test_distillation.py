import copy

import pytest
import torch
from torch.nn import functional as F

from headwise.compress import distil
from headwise.models.backbones import Decoder
from headwise.parts import Attention
from tests.instruments import tiny

torch.set_num_threads(1)

INPUTS = {"input_ids": tiny.ids(24, batch=16)}


def _pair():
    teacher = tiny.llama()
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, ::2] = 0
    return model, teacher


def _kl(model, teacher, temperature=1.0):
    with torch.no_grad():
        a = teacher(**INPUTS).logits / temperature
        b = model(**INPUTS).logits / temperature
    total = 0.0
    for row in range(len(a)):
        for place in range(a.shape[1]):
            p = a[row, place].double().softmax(-1)
            q = b[row, place].double().softmax(-1)
            total += float((p * (p / q).log()).sum())
    return total / a.shape[0] / a.shape[1]


def test_first_loss_is_the_divergence_and_it_falls():
    model, teacher = _pair()
    before = _kl(model, teacher)
    kept = {n: p.clone() for n, p in teacher.state_dict().items()}
    found = distil(model, teacher, INPUTS, steps=30, batch_size=16, rate=1e-3)
    assert found.losses[0] == pytest.approx(before, rel=1e-4)
    assert _kl(model, teacher) < 0.5 * before
    assert (found.steps, found.stopped) == (30, "steps")
    assert all(torch.equal(p, kept[n]) for n, p in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_temperature():
    model, teacher = _pair()
    want = 4 * _kl(model, teacher, 2.0)
    found = distil(model, teacher, INPUTS, steps=1, batch_size=16, temperature=2.0)
    assert found.losses[0] == pytest.approx(want, rel=1e-4)


def test_hidden_states():
    model, teacher = _pair()
    one = tiny.outputs(model, INPUTS).hidden_states
    two = tiny.outputs(teacher, INPUTS).hidden_states
    want = F.mse_loss(one[1], two[1]) / two[1].square().mean()
    found = distil(model, teacher, INPUTS, steps=1, batch_size=16, hidden=1.0, layers={0: 0})
    assert found.losses[0] - _kl(*_pair()) == pytest.approx(float(want), rel=1e-3)


def test_an_interrupted_run_goes_on_to_the_same_losses(tmp_path):
    model, teacher = _pair()
    whole = distil(model, teacher, INPUTS, steps=8, batch_size=4, rate=1e-3, seed=3)
    again, _ = _pair()

    def stop(step, loss):
        if step == 3:
            raise KeyboardInterrupt

    path = tmp_path / "half.pt"
    more = {"steps": 8, "batch_size": 4, "rate": 1e-3, "seed": 3, "checkpoint": path}
    half = distil(again, teacher, INPUTS, each=stop, **more)
    assert half.stopped == "interrupted"
    assert half.losses == whole.losses[:4]
    fresh, _ = _pair()
    rest = distil(fresh, teacher, INPUTS, **more)
    assert rest.losses == whole.losses
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name])
    with pytest.raises(ValueError, match="the same, or another file"):
        distil(fresh, teacher, INPUTS, **{**more, "steps": 9})


def test_only_what_is_named_is_trained_and_flags_stay():
    model, teacher = _pair()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    one = model.model.layers[0].mlp.down_proj.weight
    kept = {n: p.clone() for n, p in model.named_parameters()}
    distil(model, teacher, INPUTS, steps=2, parameters=[one])
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, kept[n])]
    assert changed == ["model.layers.0.mlp.down_proj.weight"]
    assert not one.requires_grad
    assert one.grad is None


def test_seconds_are_a_budget():
    model, teacher = _pair()
    found = distil(model, teacher, INPUTS, steps=100000, seconds=0.3)
    assert found.stopped == "seconds"
    assert 0 < found.steps < 100000


def test_own_backbones():
    torch.manual_seed(0)
    teacher = Decoder(60, 32, 2, mixer=lambda layer: Attention(32, 4, causal=True))
    model = Decoder(60, 32, 1, mixer=lambda layer: Attention(32, 4, causal=True))
    found = distil(model, teacher, INPUTS, steps=40, rate=5e-3, hidden=0.1, layers={0: 1})
    assert found.losses[-1] < found.losses[0]


def test_refusals():
    model, teacher = _pair()
    with pytest.raises(ValueError, match="budget"):
        distil(model, teacher, INPUTS, steps=0)
    with pytest.raises(ValueError, match="layers="):
        distil(model, tiny.llama(num_hidden_layers=3), INPUTS, hidden=1.0)
    with pytest.raises(ValueError, match="answers"):
        distil(model, tiny.llama(vocab_size=70), INPUTS)
