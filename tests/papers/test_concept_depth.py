"""The task of the concept depth paper in plain Python, and what the claims do not ask."""

import torch

from headwise.papers.lens.concept_depth import Arrows, concept_scores, rounded, untrained


def test_arrows_lead_where_the_table_says():
    task = Arrows(nodes=5)
    batch = task.batch(0, 30)
    for row in range(30):
        ids = batch.inputs["input_ids"][row].tolist()
        leads = {token // 5: token % 5 for token in ids[:-1]}
        assert sorted(leads) == list(range(5))
        arrows, node = divmod(ids[-1] - 25, 5)
        assert batch.facts["node"][row] == node
        assert batch.facts["one arrow"][row] == leads[node]
        assert batch.facts["two arrows"][row] == leads[leads[node]]
        wanted = leads[node] if arrows == 0 else leads[leads[node]]
        assert batch.targets[row].tolist() == [-100] * 5 + [wanted]


def test_the_node_asked_for_is_in_the_embedding():
    scores = concept_scores(untrained(0), "node", examples=80).score
    assert scores.shape == (5,)
    assert scores[0] == 1


def test_rounding_leaves_so_many_levels():
    weight = torch.randn(50, 50)
    assert len(rounded(weight, 2).unique()) <= 4
    assert (rounded(weight, 8) - weight).abs().max() <= weight.abs().max() / 127.5 / 2 + 1e-6
