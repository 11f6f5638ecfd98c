"""Steps of an Elastic-Cache on an untrained model."""

from __future__ import annotations

from itertools import pairwise

import torch

from headwise.papers.cache.elastic_cache import Chains, ElasticCache, MaskedModel, decode
from headwise.train import seeded


def model() -> MaskedModel:
    with seeded(0):
        return MaskedModel(8, 16, 2, 3).eval()


@torch.no_grad()
def test_the_first_step_is_the_model_and_renewing_it_stays_so() -> None:
    made, net = ElasticCache(model(), -1.0, period=1), model()
    ids = torch.randint(9, (12,), generator=torch.Generator().manual_seed(0))
    window = torch.arange(8, 12)
    for at in (torch.arange(12), torch.tensor([3])):
        ids = ids.clone()
        ids[at[0]] = 5
        found = made.step(ids, at, window, window)
        torch.testing.assert_close(found, net(ids[None])[0, 8:], atol=1e-5, rtol=1e-4)


def test_what_is_computed_is_counted_and_renewed_layers_are_the_last_ones() -> None:
    net, prompt = model(), torch.tensor([0, 3, 1])
    for gamma, least, most in ((-1.0, 3, 3), (1.01, 1, 1)):
        made = ElasticCache(net, gamma)
        text = decode(net, made, prompt, 12, window=4, sure=1.0)
        assert text[:3].tolist() == [0, 3, 1]
        assert int(text.max()) < 8
        assert made.starts[0] == 0
        assert all(least <= start <= most for start in made.starts[1:])
        whole = len(made.starts) * 12 * 3
        assert made.computed < whole
        if gamma > 1:  # all of two layers, a part of the first
            assert made.computed > 12 * 3 + (len(made.starts) - 1) * 12 * 2
    everything = ElasticCache(net, -1.0, period=1)
    decode(net, everything, prompt, 12, window=4, sure=1.0)
    assert everything.computed == len(everything.starts) * 12 * 3


def test_chains_follow_the_rule_that_the_first_token_names() -> None:
    task = Chains()
    for line in task.whole(6, task.generator(0, "test")).tolist():
        for now, then in pairwise(line[1:]):
            assert then == int(task.next[line[0], now])
