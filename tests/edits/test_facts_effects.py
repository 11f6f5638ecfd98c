"""What is measured of an edit, against plain loops; facts as text."""

import math

import pytest
import torch
from torch import Tensor

from headwise.edits import Patch, edit_fact, measure_edit
from headwise.edits.fact_prompts import read_target, read_wording
from headwise.edits.prefixes import generated_prefixes
from headwise.models import view
from tests.cli.tiny import tokenizer as bytes_tokenizer
from tests.instruments import tiny

LINES = torch.randint(1, 20, (12, 30), generator=torch.Generator().manual_seed(1))


def test_every_figure_against_plain_loops() -> None:
    model = tiny.llama()
    ids, target = LINES[0, :6], [7, 3]
    others, reworded = [LINES[2, :5], LINES[3, :9]], [LINES[4, :7]]
    text = LINES[5:8].flatten()
    patch = edit_fact(model, ids, 5, target, layers=0, statistics=LINES)
    found = measure_edit(patch, paraphrases=reworded, neighbours=others, text=text, window=30)

    def logs(line: Tensor) -> Tensor:
        with torch.no_grad():
            said: Tensor = model(input_ids=line[None]).logits[0].double().log_softmax(-1)
        return said

    def answer(line: Tensor) -> tuple[float, float]:
        said = logs(torch.cat([line, torch.tensor(target)]))[len(line) - 1 :]
        right = all(int(said[i].argmax()) == t for i, t in enumerate(target))
        return float(right), math.exp(sum(float(said[i, t]) for i, t in enumerate(target)) / 2)

    def losses() -> list[float]:
        return [-sum(float(logs(w)[i, w[i + 1]]) for i in range(29)) / 29 for w in text.split(30)]

    plain, asked = [logs(one)[-1] for one in others], [answer(ids), answer(reworded[0])]
    before = losses()
    with patch:
        now, answered, after = [logs(o)[-1] for o in others], [answer(ids), answer(reworded[0])], \
            losses()  # fmt: skip
    for said, (was, then) in zip(
        (found.efficacy, found.paraphrases), zip(asked, answered, strict=True), strict=True
    ):
        assert said is not None
        assert (said.right_before, said.right_after) == (was[0], then[0])
        assert said.probability_before == pytest.approx(was[1], rel=1e-3)
        assert said.probability_after == pytest.approx(then[1], rel=1e-3)
    assert found.neighbours is not None
    pairs = list(zip(plain, now, strict=True))
    same = sum(float(a.argmax() == b.argmax()) for a, b in pairs) / 2
    assert found.neighbours.same == same
    drift = sum(float((a.exp() * (a - b)).sum()) for a, b in pairs) / 2
    assert found.neighbours.divergence == pytest.approx(drift, rel=1e-3)
    assert found.loss is not None
    changes = torch.tensor(after).double() - torch.tensor(before).double()
    assert found.loss.windows == 3
    assert found.loss.before == pytest.approx(sum(before) / 3, abs=1e-4)
    assert found.loss.change == pytest.approx(float(changes.mean()), abs=1e-4)
    assert found.loss.change_error == pytest.approx(float(changes.std()) / 3**0.5, abs=1e-4)
    assert patch.record["effects"] == found.as_dict()
    assert not patch.applied


def test_a_patch_in_force_is_measured_and_stays() -> None:
    model = tiny.gpt2()
    patch = edit_fact(model, LINES[0, :6], 5, 3, layers=1, statistics=LINES)
    off = measure_edit(patch).as_dict()
    patch.apply()
    assert measure_edit(patch).as_dict() == off
    assert patch.applied
    with pytest.raises(ValueError, match="no model"):
        measure_edit(Patch({}, {"request": []}))
    with pytest.raises(ValueError, match="no request"):
        measure_edit(Patch.of(model, {}))


def test_subjects_are_found_in_text() -> None:
    words = bytes_tokenizer()
    line = read_wording("see {} now", "the cat", words, "Yes.")
    assert words.decode(line.ids) == "Yes. see the cat now"
    assert words.decode(line.ids[line.start : line.stop]) == "the cat"
    assert words.decode(read_target("see", "up", words)) == " up"
    assert words.decode(read_target("see ", "up", words)) == "up"
    with pytest.raises(ValueError, match="does not stand"):
        read_wording("see the dog", "cat", words)
    with pytest.raises(ValueError, match="a part of it"):
        read_wording("see the dog", 2, words)


def test_prefixes_are_the_models_own_and_seeded() -> None:
    config = {"vocab_size": 258}
    look, words = view(tiny.llama(**config)), bytes_tokenizer()
    first = generated_prefixes(look, words, 3, 4, seed=1)
    assert first == generated_prefixes(look, words, 3, 4, seed=1)
    assert first != generated_prefixes(look, words, 3, 4, seed=2)
    assert [one.split()[0][:2] for one in first] == ["Th", "Th", "Be"]
    assert all(one.endswith(".") for one in first)
