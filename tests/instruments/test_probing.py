"""Probes on small models: what is there is found, what is not is not, and rows are never mixed."""

import numpy as np
import pytest
import torch

from headwise.instruments.examples import read_examples
from headwise.instruments.features import collect_features, probed_sites
from headwise.instruments.probe_controls import control_task, untrained_copy
from headwise.instruments.probe_folds import folds_of
from headwise.instruments.probing import probe
from headwise.models import view
from tests.instruments import handmade, tiny


@pytest.fixture(scope="module")
def model():
    return tiny.llama()


@pytest.fixture(scope="module")
def ids():
    return tiny.ids(8, seed=2, batch=200)


def features(model, inputs, kind, position, size=16):
    look, batches = view(model), read_examples(model, inputs, batch_size=size)
    return collect_features(look, batches, probed_sites(look, kind, None, None), position)


@torch.no_grad()
def test_features_are_the_models_hidden_states(model, ids):
    states = model(ids[:5], output_hidden_states=True).hidden_states[:-1]
    last = features(model, ids[:5], "residual", "last", size=2)
    mean = features(model, ids[:5], "residual", "mean")
    each = features(model, ids[:5], "residual", "each")
    numbered = features(model, ids[:5], "residual", torch.tensor([0, 1, 2, 3, -2]))
    for n, site in enumerate(list(last.values)[:2]):
        assert torch.allclose(last.values[site], states[n][:, -1], atol=1e-5)
        assert torch.allclose(mean.values[site], states[n].mean(1), atol=1e-5)
        assert torch.allclose(each.values[site], states[n].flatten(0, 1), atol=1e-5)
        expected = states[n][range(5), [0, 1, 2, 3, 6]]
        assert torch.allclose(numbered.values[site], expected, atol=1e-5)
    assert torch.equal(last.token, ids[:5, -1])
    assert each.example.tolist() == [b for b in range(5) for _ in range(8)]


def test_padding_is_no_position(model, ids):
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:] = 0
    padded = {"input_ids": ids[:3], "attention_mask": mask}
    for position in ("last", "mean"):
        found = features(model, padded, "residual", position)
        alone = features(model, ids[1:2, :5], "residual", position)
        for site, value in found.values.items():
            assert torch.allclose(value[1], alone.values[site][0], atol=1e-5)
    assert len(features(model, padded, "residual", "each").example) == 21
    kept = features(model, [ids[:1, :6], ids[1:2]], "residual", "all")
    assert kept.real.sum(1).tolist() == [6, 8]


def test_what_is_in_the_last_token_is_found_and_what_is_random_is_not(model, ids):
    labels = (ids[:, -1] > 20).long()
    found = probe(model, ids, labels, controls=("shuffled", "task", "untrained"))
    assert found.folds.shape == (3, 5)
    assert found.score[0] > 0.9
    assert np.abs(found.controls["shuffled"].mean(1) - found.chance).max() < 0.15
    assert found.controls["untrained"].shape == (3, 5)
    assert found.names == ["L0 residual", "L1 residual", "L2 residual"]
    random = torch.randint(2, (200,), generator=torch.Generator().manual_seed(0))
    assert np.abs(probe(model, ids, random).score - 0.5).max() < 0.12


def test_what_attention_must_bring_is_not_in_the_embedding():
    """Head 0 of layer 0 of the hand-made model writes the code of the token before."""
    ids = torch.randint(90, (150, 8), generator=torch.Generator().manual_seed(0))
    ids[:, -2] = torch.where(torch.arange(150) % 2 == 0, 11, 12)
    found = probe(handmade.model(), ids, torch.arange(150) % 2, layers=[0, 1])
    assert found.score[0] < 0.65
    assert found.score[1] > 0.95
    heads = probe(handmade.model(), ids, torch.arange(150) % 2, site="heads", layers=[0])
    assert heads.best() == 0


def test_the_control_task_is_easy_where_a_probe_memorises(model):
    """One token of few types: a probe on embeddings learns any label for each, so it selects
    nothing."""
    ids = tiny.ids(6, batch=300) % 12 + 3
    found = probe(model, ids, (ids[:, -1] > 8).long(), controls=("task",), layers=[0])
    assert found.score[0] > 0.95
    assert found.controls["task"].mean() > 0.9
    assert abs(found.selectivity[0]) < 0.1
    types = torch.tensor([4, 4, 7, 4, 7])
    drawn = control_task(torch.tensor([0, 1, 0, 1, 1]), types, 0)
    assert drawn[0] == drawn[1] == drawn[3]
    assert drawn[2] == drawn[4]
    same = torch.full((40, 5), 9)
    same[:, 0] = torch.arange(40) % 20 + 3
    said = probe(model, same, torch.arange(40) % 2, controls=("task",))
    assert "one type" in said.reasons["task"]
    assert np.isnan(said.selectivity).all()


def test_every_head_has_a_probe(model, ids):
    found = probe(model, ids, (ids[:, -1] > 20).long(), site="heads")
    assert found.names == [f"L{la}H{h}" for la in range(2) for h in range(4)]
    atlas = found.atlas()
    assert atlas.heads["probe_score"].shape == (8,)
    assert len(probe(model, ids, ids[:, 0] % 2, site="values").names) == 4
    with pytest.raises(ValueError, match="no heads"):
        probe(model, ids, ids[:, 0] % 2, layers=[0]).atlas()


def test_numbers_are_regressed(model, ids):
    found = probe(model, ids, (ids[:, -1].float() - 30) / 10, position="last", strength=0.1)
    assert found.metric == "r2"
    random = torch.randn(200, generator=torch.Generator().manual_seed(0))
    assert probe(model, ids, random, layers=[0]).score[0] < 0.1 < found.score[0]


def test_each_position_has_a_label(model, ids):
    labels = (ids > 20).long()
    labels[:, 0] = -1
    found = probe(model, ids[:60], labels[:60], position="each", layers=[0], keep=True)
    assert found.provenance["rows"] == 60 * 7
    assert found.score[0] > 0.95
    assert len(found.probes) == 1
    assert found.probes[0].direction().shape == (32,)


def test_attentive_probes_read_what_any_one_position_holds(model):
    ids = tiny.ids(10, batch=160) % 20 + 30
    labels = torch.arange(160) % 2
    at = torch.randint(10, (160,), generator=torch.Generator().manual_seed(1))
    ids[range(160), at] = torch.where(labels == 1, 5, 6)
    pooled = probe(model, ids, labels, kind="attentive", layers=[0], folds=3)
    last = probe(model, ids, labels, layers=[0], folds=3)
    assert pooled.score[0] > 0.9 > 0.7 > last.score[0]


def test_folds_are_whole_and_share_classes_alike():
    target = torch.tensor([0] * 20 + [1] * 10)
    splits = folds_of(target, torch.arange(30), 5, seed=0)
    assert sorted(torch.cat([test for _, test in splits]).tolist()) == list(range(30))
    for train, test in splits:
        assert not set(train.tolist()) & set(test.tolist())
        assert target[test].bincount().tolist() == [4, 2]
    rows = torch.arange(8).repeat_interleave(3)  # three rows an example
    for train, test in folds_of(torch.arange(24) % 2, rows, 4, seed=1):
        assert not set(rows[train].tolist()) & set(rows[test].tolist())


def test_the_untrained_copy_has_the_same_numbers_elsewhere(model):
    before = {name: value.clone() for name, value in model.named_parameters()}
    twin = untrained_copy(model, 0)
    for name, value in twin.named_parameters():
        assert torch.equal(value.flatten().sort().values, before[name].flatten().sort().values)
    assert not torch.equal(twin.lm_head.weight, model.lm_head.weight)
    assert all(torch.equal(v, before[name]) for name, v in model.named_parameters())


def test_what_does_not_fit_is_refused(model, ids):
    with pytest.raises(ValueError, match="one class"):
        probe(model, ids, torch.zeros(200, dtype=torch.long))
    with pytest.raises(ValueError, match="expected \\(200,\\)"):
        probe(model, ids, torch.zeros(20, dtype=torch.long))
    with pytest.raises(ValueError, match="no control"):
        probe(model, ids, ids[:, 0] % 2, controls=("random",))
    with pytest.raises(ValueError, match="layers="):
        probe(model, ids, ids[:, 0] % 2, memory=1000)
    with pytest.raises(ValueError, match="fewer than 5 folds"):
        probe(model, ids[:6], torch.tensor([0, 0, 0, 0, 0, 1]))
    with pytest.raises(ValueError, match="attentive"):
        probe(model, ids, ids[:, 0] % 2, position="all")
    with pytest.raises(ValueError, match="position 9"):
        probe(model, ids, ids[:, 0] % 2, position=9)


def test_it_is_shown_as_a_table_and_a_frame(model, ids):
    found = probe(model, ids[:40], torch.arange(40) % 2)
    assert "shuffled" in repr(found)
    assert "chance 0.500" in repr(found)
    pytest.importorskip("pandas")
    assert list(found.frame().columns)[:4] == ["name", "layer", "head", "accuracy"]
