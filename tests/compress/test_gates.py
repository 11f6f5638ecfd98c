import copy
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwise.compress import head_gates
from headwise.compress.structure.gate_kinds import HardConcrete, Variational
from headwise.models import Site, touching, view
from headwise.models.default import default_model_path, default_text
from headwise.models.spots import down_projection
from tests.instruments import tiny
from tests.models.families import FAMILIES

torch.set_num_threads(1)

INPUTS = {"input_ids": tiny.ids(20, batch=12)}


def _with_dead_parts(seed=0):
    """Heads 1 of layer 0 and 0, 3 of layer 1, and half of the channels, give nothing."""
    model = tiny.llama()
    with torch.no_grad():
        for layer, head in ((0, 1), (1, 0), (1, 3)):
            view(model).attentions[layer].output_weight()[head] = 0
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 24:] = 0
    return model


DEAD = {(0, 1), (1, 0), (1, 3)}


def test_variational_penalty_is_the_divergence_from_the_best_prior():
    torch.manual_seed(0)
    gate = Variational(6)
    with torch.no_grad():
        gate.mu.copy_(torch.randn(6) * 2)
        gate.log_variance.copy_(torch.randn(6))
    normal = torch.distributions.Normal
    mu, sigma = gate.mu.detach(), (gate.log_variance.detach() / 2).exp()
    want = torch.distributions.kl_divergence(
        normal(mu, sigma), normal(torch.zeros(6), (mu**2 + sigma**2).sqrt())
    )
    torch.testing.assert_close(gate.penalty().detach(), want.sum())
    # no other prior variance is better
    for scale in (0.8, 1.25):
        other = normal(torch.zeros(6), scale * (mu**2 + sigma**2).sqrt())
        more = torch.distributions.kl_divergence(normal(mu, sigma), other)
        assert bool((more > want).all())
    torch.testing.assert_close(gate.open().detach(), mu**2 / (mu**2 + sigma**2))


def test_draws_have_the_distribution_that_is_told():
    random = torch.Generator().manual_seed(0)
    for start in (-1.0, 0.5, 2.0):
        gate = HardConcrete(3, start)
        drawn = gate.draw(20000, random).detach()
        assert float(drawn.min()) == 0
        assert float(drawn.max()) == 1
        share = (drawn > 0).float().mean()
        assert float(share) == pytest.approx(float(gate.open()[0].detach()), abs=0.01)
    gate = Variational(2, 0.7, -1.0)
    drawn = gate.draw(40000, random).detach()
    assert float(drawn.mean()) == pytest.approx(0.7, abs=0.01)
    assert float(drawn.var()) == pytest.approx(math.exp(-1), rel=0.03)


@pytest.mark.parametrize("method", ["variational", "l0", "gradient"])
def test_dead_heads_come_last(method):
    model = _with_dead_parts()
    kept = {n: p.clone() for n, p in model.state_dict().items()}
    found = head_gates(model, INPUTS, method, keep=5 / 8, steps=150)
    assert set(found.heads(5 / 8)) == DEAD
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name])
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    column = found.atlas().heads["gate"]
    assert {(int(n) // 4, int(n) % 4) for n in np.argsort(column)[:3]} == DEAD
    if method != "gradient":
        assert found.shares[-1] == pytest.approx(5 / 8, abs=0.06)


@pytest.mark.parametrize("method", ["variational", "l0"])
def test_dead_channels_come_last(method):
    found = head_gates(_with_dead_parts(), INPUTS, method, keep=0.5, what=("neurons",), steps=200)
    gone = found.channels(0.5)
    right = sum(n >= 24 for layer in gone.values() for n in layer)
    assert sum(map(len, gone.values())) == 48
    assert right >= 44


@pytest.mark.parametrize("method", ["variational", "gradient"])
def test_channels_of_layers_that_flatten_their_tokens(method):
    torch.manual_seed(0)
    model = FAMILIES["opt"]()
    ids = torch.randint(3, 30, (4, 9), generator=torch.Generator().manual_seed(0))
    dead = [3, 7]
    for layer in view(model).layers:
        with torch.no_grad():
            down_projection(layer).weight[:, dead] = 0
    found = head_gates(model, {"input_ids": ids}, method, keep=0.5, what=("neurons",), steps=3)
    if method == "gradient":
        for score in found.scores.values():
            assert score[dead].tolist() == [0, 0]
            assert (score > 0).sum() > 4


def test_slopes_against_differences():
    model = tiny.llama().double()
    found = head_gates(model, INPUTS, "gradient", metric="loss")
    ids = INPUTS["input_ids"]

    def loss(layer, head, size, row):
        gate = torch.ones(4, dtype=torch.float64)
        gate[head] = size
        site = Site("heads", layer)
        with torch.no_grad(), touching(view(model), {site: lambda out: out * gate[:, None]}):
            logits = model(ids[row : row + 1]).logits[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits.float().double(), ids[row, 1:]))

    for layer, head in ((0, 2), (1, 1)):
        total = 0.0
        for row in range(12):
            up, down = loss(layer, head, 1.01, row), loss(layer, head, 0.99, row)
            total += abs(up - down) / 0.02
        score = float(found.scores[Site("heads", layer)][head])
        assert score == pytest.approx(total / 12, rel=2e-2)


def test_folding_gives_what_gates_at_their_values_give():
    model = tiny.gpt2()
    found = head_gates(model, INPUTS, "l0", steps=30, what=("heads", "neurons"))
    with torch.no_grad():
        writes = {
            site: (lambda out, v=v: out * (v[:, None] if out.dim() == 4 else v))
            for site, v in found.values.items()
        }
        with touching(view(model), writes):
            want = model(**INPUTS).logits
        found.fold()
        torch.testing.assert_close(model(**INPUTS).logits, want, atol=1e-4, rtol=1e-4)


def test_a_budget_of_parameters_is_kept():
    found = head_gates(tiny.llama(), INPUTS, "gradient", what=("heads", "neurons"))
    total = sum(len(v) * found.costs[s] for s, v in found.scores.items())
    for keep in (0.3, 0.8):
        gone = found.removed(keep)
        left = total - sum(len(units) * found.costs[site] for site, units in gone.items())
        assert left <= keep * total
        assert left > keep * total - max(found.costs.values())
    weights = sum(p.numel() for n, p in tiny.llama().named_parameters() if "proj" in n)
    assert total == pytest.approx(weights)


def test_learned_gates_beat_chance_on_a_trained_model():
    path = default_model_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(default_text(8000)[0], return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)
    cut = len(rows) * 2 // 3
    found = head_gates(model, {"input_ids": rows[:cut]}, "l0", keep=0.6, steps=60)
    look = view(model)
    with torch.no_grad():
        clean = model(rows[cut:]).logits.log_softmax(-1)

    def price(heads):
        pruned = copy.deepcopy(model)
        with torch.no_grad():
            for layer, head in heads:
                view(pruned).attentions[layer].output_weight()[head] = 0
            now = pruned(rows[cut:]).logits.log_softmax(-1)
        return float((clean.exp() * (clean - now)).sum(-1).mean())

    gone = found.heads(0.6)
    every = [(a.layer, h) for a in look.attentions for h in range(a.heads)]
    random = np.random.default_rng(0)
    drawn = [
        price([every[n] for n in random.permutation(len(every))[: len(gone)]]) for _ in range(4)
    ]
    assert price(gone) < min(drawn)


def test_refusals():
    model = tiny.llama()
    with pytest.raises(ValueError, match="method"):
        head_gates(model, INPUTS, "magic")
    with pytest.raises(ValueError, match="what"):
        head_gates(model, INPUTS, what=("layers",))
    with pytest.raises(ValueError, match="keep"):
        head_gates(model, INPUTS, keep=1.5)
    with pytest.raises(ValueError, match="minimised"):
        head_gates(model, INPUTS, metric="accuracy")
