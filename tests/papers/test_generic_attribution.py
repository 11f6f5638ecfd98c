"""Generic relevance: the paper's toy task, its oracle, and two streams that read each other."""

import torch

from headwise.instruments.bimodal import bimodal, fused_slopes
from headwise.instruments.targets import LogitOf
from headwise.models import view
from headwise.papers.lens import generic_attribution as paper


def test_one_token_of_the_scene_decides() -> None:
    batch = paper.Scene().batch(3, 50)
    ids, asked = batch.inputs["input_ids"], batch.inputs["decoder_input_ids"][:, 1]
    place = batch.facts["position"][:, 0]
    for row, question, where, colour in zip(ids, asked, place, batch.targets[:, 1], strict=True):
        shape = int(question) - paper.SHAPES * paper.COLOURS
        holds = [i for i, token in enumerate(row.tolist()) if token // paper.COLOURS == shape]
        assert holds == [int(where)]
        assert int(row[where]) % paper.COLOURS == int(colour)


def test_the_oracle_computes_what_the_model_computes_and_leaves_it_alone() -> None:
    model = paper.untrained(1).eval()
    inputs = paper.Scene().batch(0, 2).inputs
    before = model(**inputs)
    written = paper.Written()
    with paper.swap(model, {"all": written}):
        during = model(**inputs)
    assert torch.allclose(before, during, atol=1e-5)
    assert {where: len(maps) for where, maps in written.maps.items()} == {
        ("encoder", "self"): 2,
        ("decoder", "self"): 2,
        ("decoder", "cross"): 2,
    }
    rows = paper.by_tables(model, inputs, LogitOf(2))
    found = paper.relevance(view(model), inputs, LogitOf(2))
    assert torch.allclose(found, rows["encoder"], atol=1e-5)
    assert torch.equal(before, model(**inputs))


def test_negative_slopes_are_left_out() -> None:
    weights = torch.tensor([[[0.5, 0.5]], [[0.2, 0.8]]])[None]
    slopes = torch.tensor([[[2.0, -4.0]], [[-5.0, 1.0]]])[None]
    assert torch.allclose(fused_slopes(weights, slopes), torch.tensor([[[0.5, 0.4]]]))


def test_one_layer_is_the_identity_and_its_map() -> None:
    bar = torch.rand(3, 3)
    assert torch.allclose(bimodal([[("t", "t", bar)]])["t", "t"], torch.eye(3) + bar)


def test_streams_that_run_side_by_side_read_the_same_tables() -> None:
    a, b = torch.rand(3, 2), torch.rand(2, 3)
    together = bimodal([[("t", "i", a), ("i", "t", b)]])
    after = bimodal([[("t", "i", a)], [("i", "t", b)]])
    assert torch.allclose(together["t", "i"], a)  # nothing was mixed before
    assert torch.allclose(together["i", "t"], b)
    assert torch.allclose(together["i", "i"], torch.eye(2))
    assert torch.allclose(after["i", "i"], torch.eye(2) + b @ a)
