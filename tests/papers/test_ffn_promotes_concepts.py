"""Sub-updates of models of transformers, by loops, and that nothing stays held."""

import pytest
import torch

from headwise.models import view
from headwise.models.sites import Site, recording
from headwise.papers.lens.ffn_promotes_concepts import (
    Topics,
    by_dominant,
    holding,
    sub_updates,
    untrained,
)
from tests.instruments import tiny


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama])
def test_sub_updates_by_loops(make):
    model, ids = make(), tiny.ids(5)
    look = view(model)
    sites = [Site("neurons", 1), Site("mlp", 1)]
    with recording(look, sites) as seen, torch.no_grad():
        model(ids)
    updates = sub_updates(look, 1)
    m, out = seen[sites[0]][0, 3], seen[sites[1]][0, 3]
    total = torch.zeros(32)
    for i in range(len(m)):
        total = total + m[i] * updates.values[i]
    assert torch.allclose(total, out, atol=1e-4)  # biases are zero in both
    sizes = [float(m[i].abs() * updates.values[i].norm()) for i in range(len(m))]
    assert int(updates.dominant(m)) == sizes.index(max(sizes))
    raised = [float(updates.words[w] @ updates.values[7]) for w in range(tiny.VOCABULARY)]
    assert updates.top_tokens(7, 1) == [raised.index(max(raised))]


def test_scores_are_of_the_tokens_against_the_others():
    updates = sub_updates(view(tiny.llama()), 0)
    mine = torch.tensor([3, 9])
    other = [w for w in range(tiny.VOCABULARY) if w not in (3, 9)]
    expected = updates.promoted[5, mine].mean() - updates.promoted[5, other].mean()
    assert updates.scores(mine)[5] == pytest.approx(float(expected), abs=1e-5)


def test_held_neurons_are_let_go():
    model, ids = untrained(0), Topics().batch(0, 2).inputs["input_ids"]
    with torch.no_grad():
        before = model(ids)
        with holding(model, [(1, 3), (1, 5), (2, 0)], 4.0):
            assert not torch.equal(model(ids), before)
        assert torch.equal(model(ids), before)


def test_only_vectors_that_were_seen_often_and_right_make_it_leave():
    dominant = torch.tensor([0] * 30 + [1] * 30 + [2] * 5)
    settled = torch.ones(65, dtype=torch.bool)
    settled[30:35] = False
    assert by_dominant(dominant, settled, 0).tolist() == [True, False, False]


def test_topics_follow_their_rule():
    batch = Topics().batch(0, 200)
    ids, follow = batch.inputs["input_ids"], batch.targets
    chained = (ids % 8 < 4) & (follow // 8 == ids // 8)
    assert (follow[chained] == ids[chained] + 1).float().mean() > 0.97
    assert 0.02 < (follow // 8 != ids // 8).float().mean() < 0.06


def test_a_model_without_words_is_refused():
    with pytest.raises(ValueError, match="no unembedding"):
        sub_updates(view(tiny.vit()), 0)
