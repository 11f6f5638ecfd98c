"""Clusters against trying all of them; the clustered cache against projections written in."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from headwise.compress.cache.clustered_cache import ClusteredCache
from headwise.compress.cache.head_clusters import (
    HeadClusters,
    cluster,
    clustering_error,
    correlation_of,
    elbow,
    find_clusters,
    map_correlations,
)
from headwise.models import Site, UnsupportedModelError, touching, view
from tests.instruments import tiny


def model(kv_heads: int = 4) -> Any:
    return tiny.llama(num_key_value_heads=kv_heads)


def ids(batch: int = 2, n: int = 12) -> Tensor:
    return torch.randint(1, tiny.VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(3))


def alike(net: Any, pairs: list[tuple[int, int, int]]) -> Any:
    """Queries and keys of head `copy` of a layer made those of head `original`."""
    size = 8
    with torch.no_grad():
        for layer, original, copied in pairs:
            attention = net.model.layers[layer].self_attn
            for part in (attention.q_proj, attention.k_proj):
                a, b = original * size, copied * size
                part.weight[b : b + size] = part.weight[a : a + size]
    return net


def by_hand(net: Any, given: Tensor, of: tuple[tuple[int, ...], ...], **more: Any) -> Tensor:
    """Logits with the projected queries and keys of the head that serves."""
    writes = {}
    for layer, table in enumerate(of):
        at = list(table)
        group = 4 // len(at)
        heads = [h * group + g for h in at for g in range(group)]
        writes[Site("keys", layer)] = lambda x, at=at: x[:, :, at]
        writes[Site("queries", layer)] = lambda x, heads=heads: x[:, :, heads]
    with torch.no_grad(), touching(view(net), writes):
        logits: Tensor = net(given, use_cache=False, **more).logits
    return logits


OF = ((0, 0, 2, 2), (1, 1, 1, 3))


@torch.no_grad()
@pytest.mark.parametrize("of", [OF, ((0, 1, 2, 3), (0, 1, 2, 3)), ((3, 3, 3, 3), (0, 1, 0, 1))])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_as_projections_written_in(of: Any, implementation: str) -> None:
    net = model()
    net.set_attn_implementation(implementation)
    want = by_hand(net, ids(), of)
    with ClusteredCache(net, HeadClusters(of)) as cache:
        pieces = [net(part, past_key_values=cache).logits for part in ids().split([7, 1, 4], 1)]
        assert torch.allclose(torch.cat(pieces, 1), want, atol=1e-4)
        keys = sum(len(set(table)) for table in of)
        room = 12 + 64
        entries = 2 * room * 8 * 4 * (keys + 8) + 2 * 2 * room
        assert cache.nbytes() - 2 * 2 * 8 * 4 - 2 * 8 * keys <= entries
    assert net.config._attn_implementation == implementation


@torch.no_grad()
def test_grouped_heads_and_padding() -> None:
    net = model(2)
    of = ((0, 0), (1, 1))
    mask = torch.ones_like(ids())
    mask[0, :4] = 0
    want = by_hand(net, ids(), of, attention_mask=mask)
    with ClusteredCache(net, HeadClusters(of)) as cache:
        first = net(ids()[:, :8], attention_mask=mask[:, :8], past_key_values=cache).logits
        second = net(ids()[:, 8:], attention_mask=mask, past_key_values=cache).logits
    got = torch.cat([first, second], 1)
    assert torch.allclose(got[0, 4:], want[0, 4:], atol=1e-4)
    assert torch.allclose(got[1], want[1], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generation(beams: int) -> None:
    net = alike(model(), [(0, 0, 1), (0, 2, 3), (1, 1, 0), (1, 1, 2)])
    settings = {
        "max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0,
        "eos_token_id": None,
    }  # fmt: skip
    plain = net.generate(ids(), past_key_values=DynamicCache(config=net.config), **settings)
    with ClusteredCache(net, HeadClusters(OF)) as cache:
        assert torch.equal(net.generate(ids(), past_key_values=cache, **settings), plain)
    with ClusteredCache(net, [2, 2]) as cache:
        assert torch.equal(net.generate(ids(), past_key_values=cache, **settings), plain)


@torch.no_grad()
def test_each_sequence_finds_its_own_clusters() -> None:
    net = alike(model(), [(0, 0, 1), (0, 2, 3), (1, 1, 0), (1, 1, 2)])
    want = net(ids(), use_cache=False).logits
    mask = torch.ones_like(ids())
    mask[1, :5] = 0
    with ClusteredCache(net, [2, 2]) as cache:
        assert torch.allclose(net(ids(), past_key_values=cache).logits, want, atol=1e-4)
        layers: Any = cache.layers
        for layer, groups in ((0, [[0, 1], [2, 3]]), (1, [[0, 1, 2], [3]])):
            for table in layers[layer].cluster_of.tolist():
                assert sorted([h for h in range(4) if table[h] == c] for c in (0, 1)) == groups
    want = net(ids(), attention_mask=mask, use_cache=False).logits
    with ClusteredCache(net, [2, 2]) as cache:
        got = net(ids(), attention_mask=mask, past_key_values=cache).logits
        assert torch.allclose(got[1, 5:], want[1, 5:], atol=1e-4)
        short = ClusteredCache(net, [2, 2])
        with pytest.raises(ValueError, match="a prompt of 3 tokens"):
            net(ids()[:, :3], past_key_values=short)


@torch.no_grad()
def test_copies_and_crop() -> None:
    net = model()
    with ClusteredCache(net, HeadClusters(OF)) as cache:
        net(ids(), past_key_values=cache)
        other = copy.deepcopy(cache)
        one = net(ids()[:, :3], past_key_values=cache).logits
        assert torch.allclose(net(ids()[:, :3], past_key_values=other).logits, one, atol=1e-6)
        cache.crop(-3)
        assert cache.get_seq_length() == 12
        assert torch.allclose(net(ids()[:, :3], past_key_values=cache).logits, one, atol=1e-6)
        other.close()


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6])
def test_medoids_are_nearly_the_best_there_are(k: int) -> None:
    random = np.random.default_rng(k)
    for _ in range(10):
        lines = torch.tensor(random.normal(size=(6, 9)))
        correlations = correlation_of(lines)
        assert np.allclose(correlations, np.corrcoef(lines))
        best = min(
            float((1 - correlations)[:, list(m)].amin(1).sum())
            for m in itertools.combinations(range(6), k)
        )
        of = cluster(correlations, k)
        assert len(set(of)) == k
        assert all(of[leader] == leader for leader in of)
        # an exchange of two medoids at once may still help; of one does not
        assert clustering_error(correlations, of) <= 1.1 * best + 1e-9


def test_planted_clusters_are_found_by_the_elbow() -> None:
    net = alike(tiny.llama(num_key_value_heads=4), [(0, 0, 2), (1, 1, 0), (1, 1, 2)])
    found = find_clusters(net, ids(4, 20))
    assert found.counts == (3, 2)
    assert found.of[0][0] == found.of[0][2]
    assert len({found.of[1][h] for h in (0, 1, 2)}) == 1
    assert find_clusters(net, ids(4, 20), keep=0.5).counts == (2, 2)
    assert find_clusters(net, ids(4, 20), keep=[4, 1]).counts == (4, 1)
    assert found.kept_keys == 5 / 8


def test_correlations_are_those_of_the_dense_maps() -> None:
    net = model()
    found = map_correlations(net, ids(3, 9), tokens=6)
    net.set_attn_implementation("eager")
    with torch.no_grad():
        maps = net(ids(3, 9), output_attentions=True).attentions
    for layer, weights in enumerate(maps):
        lines = [
            [
                float(weights[b, h, i, j])
                for b in range(3)
                for i in range(1, 6)
                for j in range(i + 1)
            ]
            for h in range(4)
        ]
        assert np.allclose(found[layer], np.corrcoef(lines), atol=1e-4)


def test_elbows() -> None:
    assert elbow([10, 5, 0, 0, 0]) == 3
    assert elbow([10, 1, 0.9, 0.4, 0]) == 2
    assert elbow([4, 3, 2, 1, 0]) == 5  # nobody stands for anybody
    assert elbow([0, 0, 0]) == 1
    assert elbow([0.3]) == 1


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="head 0 is to be served by 1"):
        HeadClusters(((1, 0),))
    with pytest.raises(ValueError, match="k=5"):
        cluster(torch.eye(4), 5)
    with pytest.raises(ValueError, match=r"keep=1\.5"):
        find_clusters(model(), ids(), keep=1.5)
    with pytest.raises(ValueError, match="clusters of 1 layers"):
        ClusteredCache(model(), [2])
    with pytest.raises(ValueError, match="layer 1 has 4 key-value heads"):
        ClusteredCache(model(), [2, 7])
    with pytest.raises(UnsupportedModelError, match="sliding"):
        ClusteredCache(tiny.mistral(), [1, 1])
    with_sinks = tiny.gpt_oss()
    with (
        ClusteredCache(with_sinks, [2, 2]) as cache,
        pytest.raises(UnsupportedModelError, match="sinks"),
    ):
        with_sinks(ids(), past_key_values=cache)
