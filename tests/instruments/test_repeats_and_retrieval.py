"""Scores on made inputs: the inputs, and the scores against eager matrices."""

import numpy as np
import pytest

from headwise.instruments.batch import Batch
from headwise.instruments.inputs import read_inputs
from headwise.instruments.repeats import Repeats
from headwise.instruments.retrieval import Retrieval
from headwise.instruments.stimuli import NEEDLES, PERIOD, REPEATS, Stimuli
from headwise.instruments.tokens import Tokens
from headwise.models import view
from tests.instruments import tiny


def stimuli(model: object, n: int = 400, seed: int = 0) -> tuple[list[Batch], list[Batch]]:
    words = Tokens(None, model.config)  # type: ignore[attr-defined]
    (source,) = read_inputs(model, tiny.ids(n, seed=5), words)  # type: ignore[arg-type]
    made = Stimuli(view(model), words, seed)  # type: ignore[arg-type]
    return (
        list(made.repeats(source.samples)),
        list(made.needles(source.samples, [source.content])),
    )


def test_random_tokens_stand_twice_and_differ_by_seed() -> None:
    model = tiny.llama(vocab_size=300)
    (batch,), _ = stimuli(model)
    again = stimuli(model)[0][0]
    other = stimuli(model, seed=1)[0][0]
    assert len(batch) == REPEATS
    rows = batch.inputs["input_ids"]
    repeat = batch.repeat["decoder"]
    assert repeat.period == PERIOD
    once = rows[:, repeat.start : repeat.start + PERIOD]
    assert (once == rows[:, repeat.start + PERIOD :]).all()
    for row in once.tolist():
        assert len(set(row)) == PERIOD  # so that the earlier place is one place
        assert 0 not in row  # the special token
    assert (rows == again.inputs["input_ids"]).all()
    assert (rows != other.inputs["input_ids"]).any()
    assert len({tuple(row) for row in rows.tolist()}) == REPEATS


def test_a_small_vocabulary_or_few_positions_make_it_shorter() -> None:
    assert stimuli(tiny.llama(vocab_size=40))[0][0].repeat["decoder"].period == 38
    assert stimuli(tiny.llama(max_position_embeddings=9), n=9)[0][0].repeat["decoder"].period == 4
    assert stimuli(tiny.llama(max_position_embeddings=5), n=5)[0] == []


@pytest.mark.parametrize("name", ["llama", "bert", "bart"])
def test_repeats_equal_eager(name: str) -> None:
    model = getattr(tiny, name)()
    (batch,), _ = stimuli(model, 100)
    results = tiny.run(model, [Repeats()], batch)
    known = {"decoder": "decoder_attentions", "encoder": "encoder_attentions"}
    start_row = 0
    for stack in view(model).stacks:
        which = known[stack] if name == "bart" else "attentions"
        period, start = batch.repeat[stack].period, batch.repeat[stack].start
        for dense in tiny.maps(model, batch.inputs, which):
            n = dense.shape[-1]
            rows = np.arange(start + period, min(start + 2 * period, n))
            wanted = {
                "induction_score": dense[:, :, rows, rows - period + 1].mean(-1),
                "duplicate_token_score": dense[:, :, rows, rows - period].mean(-1),
                "previous_token_score": dense[:, :, rows, rows - 1].mean(-1),
            }
            near = np.stack(
                [
                    np.where((rows - d < n), dense[:, :, rows, np.minimum(rows - d, n - 1)], 0)
                    for d in range(-7, 8)
                ],
                -1,
            )
            shared = np.minimum(near, near.mean(2, keepdims=True))
            wanted["positional_random"] = shared.sum(-1).mean(-1)
            for b, result in enumerate(results):
                for column, values in wanted.items():
                    mine = result.heads[column][start_row : start_row + 4]
                    assert np.allclose(mine, values[b], atol=1e-5), (column, stack)
            start_row += 8 if (name, stack) == ("bart", "decoder") else 4


def test_needles_hide_the_users_text_at_several_depths() -> None:
    model = tiny.llama()
    _, (batch,) = stimuli(model)
    needle = batch.needle
    assert needle is not None
    assert len(batch) == NEEDLES
    text = tiny.ids(400, seed=5)[0].tolist()
    ids = batch.inputs["input_ids"]
    depths = needle.start.tolist()
    assert depths == sorted(depths)
    assert depths[0] < ids.shape[1] // 4 < 3 * ids.shape[1] // 5 < depths[-1]
    for row, start in zip(ids.tolist(), depths, strict=True):
        hidden = row[start : start + needle.length]
        assert hidden == row[needle.again :]
        rest = row[:start] + row[start + needle.length : needle.again]
        for part in (hidden, rest):
            places = range(len(text) - len(part) + 1)
            assert any(text[at : at + len(part)] == part for at in places)


def test_retrieval_equals_eager() -> None:
    model = tiny.llama()
    _, (batch,) = stimuli(model, n=60)
    needle = batch.needle
    assert needle is not None
    ids = batch.inputs["input_ids"]
    results = tiny.run(model, [Retrieval()], batch)
    some = 0
    for layer, dense in enumerate(tiny.maps(model, batch.inputs)):
        for b, result in enumerate(results):
            tokens, start = ids[b].tolist(), int(needle.start[b])
            for head in range(4):
                copied = set()
                for row in range(needle.again, len(tokens) - 1):
                    key = int(dense[b, head, row].argmax())
                    inside = start <= key < start + needle.length
                    if inside and tokens[key] == tokens[row + 1]:
                        copied.add(tokens[row + 1])
                score = len(copied) / len(set(tokens[needle.again + 1 :]))
                assert result.heads["retrieval_score"][layer * 4 + head] == pytest.approx(score)
                some += score > 0
    assert some >= 2  # a needle in a short text is hit by chance


def test_no_needles_without_enough_text_or_without_order() -> None:
    assert stimuli(tiny.llama(), n=30)[1] == []
    assert stimuli(tiny.bert())[1] == []
    assert stimuli(tiny.bart(), n=100)[1] == []
    short = stimuli(tiny.llama(), n=60)[1][0]
    assert short.inputs["input_ids"].shape[1] < 80
