import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwise.compress.search.asking import read_text
from headwise.compress.search.quality import measure_quality
from headwise.instruments.examples import read_examples
from headwise.models.default import default_model_path
from tests.instruments.tiny import llama


def test_figures_are_those_of_the_definition() -> None:
    one, other = llama(), llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    ids = torch.randint(0, one.config.vocab_size, (3, 300), generator=torch.manual_seed(0))
    found = measure_quality(other, one, read_examples(one, ids))
    with torch.no_grad():
        a, b = (m(input_ids=ids).logits.double().log_softmax(-1) for m in (one, other))
    losses = [F.nll_loss(x[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for x in (a, b)]
    assert found.loss == pytest.approx(float(losses[1]), abs=1e-5)
    assert found.loss_change == pytest.approx(float(losses[1] - losses[0]), abs=1e-5)
    agree = (a.argmax(-1) == b.argmax(-1))[:, :-1].double().mean()
    assert found.agreement == pytest.approx(float(agree), abs=1e-6)
    kl = (a.exp() * (a - b)).sum(-1)[:, :-1].mean()
    assert found.kl == pytest.approx(float(kl), abs=1e-5)
    assert found.windows == 3
    assert found.kl > 0.001


def test_a_model_beside_itself_differs_in_nothing() -> None:
    model = llama()
    ids = torch.randint(0, model.config.vocab_size, (2, 20), generator=torch.manual_seed(1))
    found = measure_quality(model, model, read_examples(model, ids))
    assert (found.loss_change, found.agreement, found.kl) == (0.0, 1.0, 0.0)
    assert found.loss_error == 0.0


def test_only_the_last_positions_count_where_only_they_are_answered() -> None:
    model = llama()
    ids = torch.randint(0, model.config.vocab_size, (2, 24), generator=torch.manual_seed(2))

    def half(asked: torch.nn.Module, batch: object) -> torch.Tensor:
        return asked(input_ids=batch.inputs["input_ids"]).logits[:, 12:]  # type: ignore[attr-defined]

    found = measure_quality(model, model, read_examples(model, ids), half)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, 12:-1]
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 13:].flatten())
    assert found.loss == pytest.approx(float(expected), abs=1e-5)
    assert found.loss_change == pytest.approx(0.0, abs=1e-6)


def test_padding_and_ignored_labels_do_not_count() -> None:
    model = llama()
    ids = torch.randint(0, model.config.vocab_size, (2, 16), generator=torch.manual_seed(3))
    labels = ids.clone()
    labels[:, :10] = -100
    found = measure_quality(
        model, model, read_examples(model, {"input_ids": ids, "labels": labels})
    )
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    expected = F.cross_entropy(logits[:, 9:-1].flatten(0, 1), ids[:, 10:].flatten())
    assert found.loss == pytest.approx(float(expected), abs=1e-5)


def test_text_is_halved_in_turns() -> None:
    model = llama()
    ids = torch.arange(6)[:, None].expand(6, 12) % model.config.vocab_size
    text = read_text(model, ids)
    first = [int(row[0]) for batch in text.calibration for row in batch.inputs["input_ids"]]
    second = [int(row[0]) for batch in text.held_out for row in batch.inputs["input_ids"]]
    assert (first, second) == ([0, 2, 4], [1, 3, 5])
    assert text.tokens == 12
    with pytest.raises(ValueError, match="2 or more"):
        read_text(model, ids[:1])


def test_unknown_figures_are_written_as_null() -> None:
    model = llama()
    ids = torch.randint(0, model.config.vocab_size, (1, 16), generator=torch.manual_seed(3))
    found = measure_quality(model, model, read_examples(model, ids))
    assert math.isnan(found.loss_error)
    assert found.as_dict()["loss_error"] is None


def test_windows_are_as_long_as_is_usual_and_the_model_can_read() -> None:
    path = default_model_path()
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    most = model.config.max_position_embeddings
    for usual, expected in ((64, 64), (2 * most, most)):
        text = read_text(model, None, tokenizer, windows=2, usual=usual)
        assert [len(one.inputs["input_ids"][0]) for one in text.held_out] == [expected]
