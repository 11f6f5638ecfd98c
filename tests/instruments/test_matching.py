"""Mass on keys chosen by token, against eager matrices and loops over pairs."""

import numpy as np
import pytest

from headwise.instruments.matching import Matching
from tests.instruments import tiny

N = 75


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_matching_equals_eager(name: str) -> None:
    model = getattr(tiny, name)()
    ids = tiny.ids(N)
    tokens = ids[0].tolist()
    (result,), _ = tiny.measure(model, [Matching()], ids, tokenizer=tiny.Words())
    places = range(N)
    same = np.array([[a == b for b in tokens] for a in tokens])
    np.fill_diagonal(same, False)
    follows = np.zeros((N, N), dtype=bool)
    for i in places:
        for j in places[1:]:
            # the token before j is the query's; the query itself, and what always follows it,
            # say nothing
            follows[i, j] = tokens[j - 1] == tokens[i] and j != i and j - 1 != i
    marks = np.array([tiny.Words.letters[t] in "\x00.\n," for t in tokens])
    assert marks.any()
    assert (same & np.tri(N, k=-1, dtype=bool)).any()
    for layer, dense in enumerate(tiny.maps(model, {"input_ids": ids})):
        p = dense[0]
        wanted = {
            "same_token": (p * same).sum((1, 2)) / N,
            "induction_text": (p * follows).sum((1, 2)) / N,
            "delimiter_mass": (p * marks).sum((1, 2)) / N,
        }
        for column, values in wanted.items():
            mine = result.heads[column][layer * 4 : layer * 4 + 4]
            assert np.allclose(mine, values, atol=1e-5), column


def test_what_rests_on_a_first_token_that_is_a_delimiter_is_the_sinks() -> None:
    model, ids = tiny.llama(), tiny.ids(N)
    ids[0, 0] = tiny.Words.letters.index(".")
    (result,), _ = tiny.measure(model, [Matching()], ids, tokenizer=tiny.Words())
    marks = np.array([tiny.Words.letters[t] in "\x00.\n," for t in ids[0].tolist()])
    for layer, dense in enumerate(tiny.maps(model, {"input_ids": ids})):
        mine = result.heads["delimiter_mass"][layer * 4 : layer * 4 + 4]
        rest = (dense[0] * marks)[..., 1:].sum((1, 2)) / N
        assert np.allclose(mine, rest, atol=1e-5)
        assert ((dense[0] * marks).sum((1, 2)) / N > rest + 1e-3).all()


def test_cross_attention_matches_the_encoders_tokens() -> None:
    model = tiny.bart()
    ids = tiny.ids(30)
    (result,), batch = tiny.measure(model, [Matching()], ids)
    queries, keys = batch.inputs["decoder_input_ids"][0].numpy(), ids[0].numpy()
    same = queries[:, None] == keys
    follows = np.zeros_like(same)
    follows[:, 1:] = same[:, :-1]
    for layer, dense in enumerate(tiny.maps(model, batch.inputs, "cross_attentions")):
        at = slice(12 + 8 * layer, 16 + 8 * layer)
        assert np.allclose(
            result.heads["same_token"][at], (dense[0] * same).sum((1, 2)) / 30, atol=1e-5
        )
        assert np.allclose(
            result.heads["induction_text"][at], (dense[0] * follows).sum((1, 2)) / 30, atol=1e-5
        )


def test_delimiters_need_a_tokenizer() -> None:
    (result,), _ = tiny.measure(tiny.llama(), [Matching()], tiny.ids(20))
    assert "delimiter_mass" not in result.heads
