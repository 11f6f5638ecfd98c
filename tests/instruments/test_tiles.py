"""Tiles are pieces of the real map, with the tokens they stand for."""

import numpy as np

from headwise.instruments.tiles import SIZE, Tiles, liveliest
from tests.instruments import tiny


def test_tiles_equal_eager() -> None:
    model = tiny.llama()
    ids = tiny.ids(200)
    results, _ = tiny.measure(model, [Tiles()], ids, tokenizer=tiny.Words())
    tiles = results[0].tiles
    assert [tile["head"] for tile in tiles] == list(range(8))
    dense = np.concatenate([layer[0] for layer in tiny.maps(model, {"input_ids": ids})])
    for tile in tiles:
        places = tile["positions"]
        assert len(places) == SIZE
        assert places[0] == 0
        assert places[1] == tile["start"]
        assert places[1:] == list(range(places[1], places[1] + SIZE - 1))
        assert tile["tokens"] == [tiny.Words.letters[i] for i in ids[0, places].tolist()]
        wanted = dense[tile["head"]][np.ix_(places, places)]
        assert tile["weights"].dtype == np.float16
        assert np.allclose(tile["weights"], wanted, atol=1e-3)


def test_a_short_input_is_shown_whole() -> None:
    results, _ = tiny.measure(tiny.llama(), [Tiles()], tiny.ids(7))
    assert results[0].tiles[0]["weights"].shape == (7, 7)
    assert np.allclose(results[0].tiles[0]["weights"].sum(-1), 1, atol=1e-2)
    one, _ = tiny.measure(tiny.llama(), [Tiles()], tiny.ids(1))
    assert one[0].tiles[0]["weights"].shape == (1, 1)


def test_cross_attention_names_the_keys() -> None:
    results, batch = tiny.measure(tiny.bart(), [Tiles()], tiny.ids(25), tokenizer=tiny.Words())
    cross = results[0].tiles[12]
    letters = tiny.Words.letters
    assert cross["keys"] == [letters[i] for i in batch.inputs["input_ids"][0].tolist()]
    assert cross["tokens"] == [letters[i] for i in batch.inputs["decoder_input_ids"][0].tolist()]
    assert "keys" not in results[0].tiles[0]


def test_the_liveliest_run_holds_the_repetition() -> None:
    quiet, lively = list(range(100, 180)), [1, 2, 3, 4, 5] * 3
    ids = quiet + lively + list(range(200, 260))
    start = liveliest(ids, 20)
    assert start <= 80 + 5
    assert start + 20 >= 80 + 10
    assert liveliest(quiet, 20) == 0
    assert liveliest([1, 2], 20) == 0
    assert liveliest([9] * 50 + lively, 15) > 30  # one token over and over is no repetition
    marks = [token <= 5 for token in ids]
    assert liveliest(ids, 20, marks) == 0  # nor are delimiters
