"""What the page is told: sentences, pieces of maps and similarities."""

import base64
from typing import Any

import numpy as np
import pytest

from headwise.instruments.atlas import Atlas
from headwise.instruments.kinds import KINDS, RULES, THRESHOLDS
from headwise.report.naming import DOING, GROUPS, MEANING, rules
from headwise.report.payload import Detail, payload
from headwise.report.pieces import alike, neighbours, tiles
from headwise.report.sentence import duration, memory, sentences
from tests.report.synthetic import decoder, encoder_decoder


def heads(**columns: Any) -> Atlas:
    count = len(next(iter(columns.values())))
    return Atlas(heads={"layer": np.zeros(count, int), "head": np.arange(count), **columns})


def test_the_sentence_counts_what_the_table_holds() -> None:
    atlas = heads(
        sink_mass=np.array([0.9, 0.8, 0.5, np.nan, 0.1, 0.2]),
        kind=np.array(["sink", "sink", "induction", "induction", "local", "mixed"]),
        induction_score=np.array([0, 0, 0.83, 0.5, 0, 0]),
    )
    assert sentences(atlas) == [
        "2 of 5 heads park more than half of their attention on the first token; 2 do induction, "
        "1 stays local and 1 meets no single rule.",
        "The strongest induction head is L0H2, at 0.83.",
    ]


def test_the_sentence_says_only_what_was_measured() -> None:
    assert sentences(heads(entropy=np.ones(2))) == ["2 heads in 1 layer."]
    one = heads(sink_mass=np.array([0.6, 0.1]))
    assert sentences(one) == [
        "1 of 2 heads parks more than half of its attention on the first token."
    ]
    none = heads(sink_mass=np.array([0.2, 0.1]), induction_score=np.array([0.1, np.nan]))
    assert sentences(none) == [
        "None of 2 heads park more than half of their attention on the first token."
    ]


def test_every_kind_has_words_and_its_rule() -> None:
    assert set(MEANING) >= set(KINDS)
    assert set(DOING) == set(KINDS) - {"sink"}  # sinks are counted by mass
    written = {entry["kind"]: entry["rules"] for entry in rules()}
    assert list(written) == list(KINDS)
    for rule in RULES:
        for condition in rule.conditions:
            limit = f"{getattr(THRESHOLDS, condition.threshold):.2f}"
            assert any(condition.column in words and limit in words for words in written[rule.kind])


def test_groups_name_columns_once() -> None:
    names = [name for members in GROUPS.values() for name in members]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0421, "0.042 s"), (9.96, "10 s"), (41.3, "41 s"), (119, "119 s"), (200, "3 min 20 s"),
     (7500, "2 h 5 min")],
)  # fmt: skip
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_memory() -> None:
    assert memory(1_234_000_000) == "1.23 GB"
    assert memory(45_600_000) == "46 MB"


def decoded(tile: dict[str, Any], texts: list[Any]) -> np.ndarray:
    """The weights as the page's script reads them."""
    raw = np.frombuffer(base64.b64decode(tile["weights"]), np.uint8)
    rows, columns = len(texts[tile["tokens"]][0]), len(texts[tile["keys"]][0])
    levels = np.zeros((rows, columns), np.uint8)
    if tile["causal"]:
        levels[np.tril_indices(rows)] = raw
    else:
        levels[:] = raw.reshape(rows, columns)
    return (levels / 255.0) ** 2


def test_tiles_come_back_nearly_as_they_were() -> None:
    rng = np.random.default_rng(0)
    causal = np.tril(rng.dirichlet(np.ones(5), 5)).astype(np.float16)
    full = rng.dirichlet(np.ones(5), 5).astype(np.float32)
    cross = rng.dirichlet(np.ones(3), 5)
    words = list("abcde")
    atlas = Atlas(
        heads={"layer": np.zeros(3, int), "head": np.arange(3)},
        tiles=[
            {"head": 0, "start": 7, "positions": [0, 7, 8, 9, 10], "tokens": words,
             "weights": causal},
            {"head": 1, "start": 4, "tokens": words, "weights": full},
            {"head": 2, "start": 0, "tokens": words, "keys": list("xyz"), "weights": cross},
        ],
    )  # fmt: skip
    told = tiles(atlas, 64)
    entries, texts = told["entries"], told["texts"]
    assert [tile["causal"] for tile in entries] == [True, False, False]
    for tile, weights in zip(entries, (causal, full, cross), strict=True):
        np.testing.assert_allclose(
            np.sqrt(decoded(tile, texts)), np.sqrt(weights.astype(np.float64)), atol=0.00197
        )
    assert texts[entries[0]["tokens"]] == (tuple(words), (0, 7, 8, 9, 10))
    assert texts[entries[1]["tokens"]] == (tuple(words), (4, 5, 6, 7, 8))
    assert texts[entries[2]["keys"]] == (("x", "y", "z"), None)
    assert entries[0]["tokens"] == entries[0]["keys"]

    cut = tiles(atlas, 2)
    assert decoded(cut["entries"][1], cut["texts"]).shape == (2, 2)
    assert decoded(cut["entries"][2], cut["texts"]).shape == (2, 2)
    assert tiles(atlas, 0)["entries"] == []


def test_words_that_tiles_share_are_held_once() -> None:
    atlas = decoder(3, 4)
    assert len(tiles(atlas, 64)["texts"]) == 1
    assert len(tiles(atlas, 64)["entries"]) == 12
    assert len(tiles(encoder_decoder(), 64)["texts"]) == 2  # keys of a cross-attention stand alone


def test_a_tile_that_does_not_fit_its_words_is_refused() -> None:
    atlas = decoder(1, 2)
    atlas.tiles[0] = {"head": 0, "start": 0, "tokens": ["a"], "weights": np.eye(3)}
    with pytest.raises(ValueError, match=r"tile of L0H0 has weights \(3, 3\) for 1 tokens"):
        tiles(atlas, 64)


def test_similarities_come_back_in_the_order_of_pairs() -> None:
    atlas = decoder(2, 3)
    matrix = atlas.pairs["similarity"]
    matrix[0, 2] = matrix[2, 0] = np.nan
    matrix[1, 3] = -0.2
    told = np.frombuffer(base64.b64decode(alike(atlas, ("similarity", "no"))["similarity"]), "<u2")
    wanted = matrix[np.triu_indices(6, 1)]
    known = np.isfinite(wanted)
    assert (told[~known] == 65535).all()
    np.testing.assert_allclose(told[known] / 65534, np.clip(wanted[known], 0, 1), atol=1e-5)
    assert list(alike(atlas, ("similarity_rest",))) == ["similarity_rest"]
    assert alike(atlas, ()) == {}


def test_neighbours_are_the_most_similar_others() -> None:
    atlas = decoder(3, 4)
    matrix = atlas.pairs["similarity"].copy()
    np.fill_diagonal(matrix, -1)
    for row, found in enumerate(neighbours(atlas)):
        assert [other for other, *_ in found] == np.argsort(-matrix[row], kind="stable")[
            :4
        ].tolist()
        assert all(error is not None for *_, error in found)
    bare = Atlas(heads=atlas.heads)
    assert [found[0][0] for found in neighbours(bare)] == atlas.heads["similar_to"].tolist()
    assert neighbours(heads(entropy=np.ones(2))) == [[], []]


def test_panels_part_heads_of_the_same_number() -> None:
    atlas = encoder_decoder(2, 3)
    told = payload(atlas, Detail())
    assert [panel["id"] for panel in told["panels"]] == [
        "encoder.self", "decoder.self", "decoder.cross",
    ]  # fmt: skip
    assert told["heads"]["panel"] == [0] * 6 + [1] * 6 + [2] * 6
    assert told["layers"]["stack"] == ["encoder"] * 2 + ["decoder"] * 2
    assert [panel["id"] for panel in payload(decoder(1, 2), Detail())["panels"]] == [""]
