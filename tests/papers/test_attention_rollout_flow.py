"""Rollout and flow: the claims' own oracles against other people's code."""

import pytest
import torch

from headwise.instruments.kept_maps import keep
from headwise.instruments.targets import LogitOf
from headwise.models import view
from headwise.papers.lens import attention_rollout_flow as paper


def test_cuts_are_what_networkx_finds() -> None:
    networkx = pytest.importorskip("networkx")
    _, _, maps = paper._small(3, 4, 3)
    graph = networkx.DiGraph()
    for layer, one in enumerate(maps):
        for i in range(4):
            for j in range(i + 1):
                graph.add_edge((layer + 1, i), (layer, j), capacity=float(one[i, j]))
    for sink in range(4):
        right, _ = networkx.minimum_cut(graph, (3, 3), (0, sink))
        assert paper._cut(maps, 3, sink) == pytest.approx(right, abs=1e-12)


def test_spearman_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.randn(2, 5, 9).unbind()
    right = [stats.spearmanr(x, y)[0] for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert paper.spearman(a, b).tolist() == pytest.approx(right, abs=1e-9)


def test_the_relay_copies_and_reads_where_it_says() -> None:
    kept, row = keep(view(paper._relay(2, 5)), {"input_ids": paper.IDS}, LogitOf(0))
    first, second = (one.map.dense()[0, 0] for one in kept)
    assert first[5, 2] > 0.95
    assert second[7, 5] > 0.95
    assert row.argmax() == 7


def test_both_are_rows_of_relevance() -> None:
    model, ids, _ = paper._small(0, 6, 2)
    found = paper.followed(view(model), ids, LogitOf(1))
    assert found["rollout"].sum().item() == pytest.approx(1.0, abs=1e-5)
    assert found["flow"].shape == (1, 6)
    assert (found["flow"] >= found["rollout"] - 1e-6).all()  # every path is a flow
