import torch

from headwise.compress import drop_layers
from headwise.models import view
from headwise.papers.compress import fusegpt as paper
from tests.instruments import tiny

torch.set_num_threads(1)

INPUTS = {"input_ids": tiny.ids(12, batch=3)}


def test_influence_against_loops_over_tokens():
    model = tiny.llama(num_hidden_layers=3)
    found = paper.macro_influence(model, INPUTS)
    states = []
    for gone in (None, 0, 1, 2):
        one = tiny.llama(num_hidden_layers=3)
        if gone is not None:
            drop_layers(one, [gone])
        kept = []
        view(one).layers[-1].module.register_forward_hook(lambda m, a, o: kept.append(o))  # noqa: B023
        with torch.no_grad():
            one(**INPUTS)
        states.append(kept[0][0] if isinstance(kept[0], tuple) else kept[0])
    for layer in range(3):
        total = 0.0
        for row in range(3):
            for place in range(12):
                a, b = states[0][row, place].double(), states[layer + 1][row, place].double()
                total += 1 - float(a @ b / a.norm() / b.norm())
        assert abs(total / 36 - float(found[layer])) < 1e-5


def test_as_many_blocks_go_as_were_asked_for():
    model = tiny.llama(num_hidden_layers=5)
    small = paper.fusegpt(model, INPUTS, count=2, steps=1)
    assert len(view(small).layers) == 3
    assert len(view(model).layers) == 5
    sizes = {n: p.shape for n, p in small.named_parameters()}
    assert all(sizes[n] == p.shape for n, p in model.named_parameters() if n in sizes)
