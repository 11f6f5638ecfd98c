"""What users hand over becomes batches: all of it, in order, with its own numbers."""

import pytest
import torch

from headwise.instruments.examples import model_view, read_examples
from headwise.models import view
from tests.instruments import tiny


def test_neighbours_of_one_length_run_together() -> None:
    model = tiny.llama()
    texts = [tiny.ids(7, seed=n)[0] for n in range(3)] + [tiny.ids(5)[0]] + [tiny.ids(7, seed=9)[0]]
    found = read_examples(model, texts, batch_size=2)
    assert [(b.rows.start, b.rows.stop) for b in found] == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert [len(b) for b in found] == [2, 1, 1, 1]
    for batch in found:
        for row, number in enumerate(range(batch.rows.start, batch.rows.stop)):
            assert torch.equal(batch.inputs["input_ids"][row], texts[number])


def test_model_inputs_keep_their_labels_and_masks() -> None:
    ids = tiny.ids(6, batch=5)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "extra": None}
    found = read_examples(tiny.llama(), given, batch_size=3)
    assert [len(b) for b in found] == [3, 2]
    assert torch.equal(torch.cat([b.inputs["labels"] for b in found]), ids)
    assert all("extra" not in b.inputs for b in found)


def test_texts_are_cut_into_windows() -> None:
    class Letters:
        def encode(self, text: str) -> list[int]:
            return [3 + ord(c) % 50 for c in text]

    found = read_examples(tiny.llama(), "abcdefghij" * 3, Letters(), tokens=10)
    assert len(found) == 1
    assert found[0].inputs["input_ids"].shape == (3, 10)


def test_a_view_serves_as_well_as_its_model() -> None:
    model = tiny.gpt2()
    look = view(model)
    assert model_view(look) is look
    assert model_view(model).model is model


def test_an_empty_batch_size_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=0"):
        read_examples(tiny.llama(), tiny.ids(4), batch_size=0)


def test_labels_are_for_metrics_and_not_for_the_model() -> None:
    ids = tiny.ids(6, batch=2)
    (batch,) = read_examples(tiny.llama(), {"input_ids": ids, "labels": ids})
    assert set(batch.inputs) == {"input_ids", "labels"}
    assert set(batch.given) == {"input_ids"}
