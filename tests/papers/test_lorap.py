import torch

from headwise.compress import LowRank
from headwise.models import view
from headwise.papers.compress import lorap as paper
from tests.instruments import tiny

torch.set_num_threads(1)

INPUTS = {"input_ids": tiny.ids(30, batch=4)}


def test_channels_against_loops():
    model = tiny.llama()
    mlp = model.model.layers[1].mlp
    seen = {}
    handles = [
        getattr(mlp, name).register_forward_pre_hook(
            lambda m, args, name=name: seen.update({name: args[0].reshape(-1, args[0].shape[-1])})
        )
        for name in ("gate_proj", "up_proj", "down_proj")
    ]
    with torch.no_grad():
        model(**INPUTS)
    for handle in handles:
        handle.remove()
    scores = []
    for channel in range(48):
        total = 0.0
        for name in ("gate_proj", "up_proj"):
            for j in range(32):
                size = float(seen[name][:, j].double().square().mean().sqrt())
                total += (float(getattr(mlp, name).weight[channel, j].detach()) * size) ** 2
        size = float(seen["down_proj"][:, channel].double().square().mean().sqrt())
        for i in range(32):
            total += (float(mlp.down_proj.weight[i, channel].detach()) * size) ** 2
        scores.append(total)
    order = sorted(range(48), key=scores.__getitem__)
    found = paper.pruned_channels(view(model), INPUTS, 0.75, 0.05)
    assert found[1] == sorted(order[2 : 2 + 12])


def test_parameters_are_those_that_were_asked_for():
    model = tiny.llama()

    def count(one, part):
        return sum(p.numel() for n, p in one.named_parameters() if part in n)

    for keep in (0.3, 0.5, 0.8):
        small = paper.lorap(model, INPUTS, keep)
        for part in ("self_attn", "mlp"):
            share = count(small, part) / count(model, part)
            assert keep - 0.08 <= share <= keep + 0.01
        assert isinstance(small.model.layers[0].self_attn.q_proj, LowRank)
    assert not any(isinstance(m, LowRank) for m in model.modules())


def test_queries_and_keys_get_a_quarter():
    ranks = paper.attention_ranks(view(tiny.llama(num_key_value_heads=4)), 0.5, 0.25)
    layer = {n.split(".")[-1]: r for n, r in ranks.items() if ".0." in n}
    assert layer == {"q_proj": 4, "k_proj": 4, "v_proj": 12, "o_proj": 12}
