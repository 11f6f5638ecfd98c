"""What steering does, and head profiles, against whole runs by hand."""

import numpy as np
import pytest
import torch

import headwise
from headwise.edits import ScaleSink, Silence
from headwise.instruments.metrics import LogitDifference, metric_of
from headwise.instruments.profiles import profile
from headwise.instruments.steering import steered
from headwise.models import UnsupportedModelError
from tests.instruments import tiny
from tests.models.test_sites import answer, inputs_of


def test_efficacy_specificity_and_collateral_are_differences_of_whole_runs() -> None:
    model = tiny.llama()
    aims, keeps, text = tiny.ids(9, 1, 5), tiny.ids(7, 2, 3), tiny.ids(12, 3, 4)
    metric = LogitDifference(torch.arange(5, 10), torch.arange(10, 15))
    change = {(0, 1): Silence(), (1, 3): ScaleSink(5.0)}
    found = steered(model, change, (aims, metric), (keeps, "kl"), text, batch_size=2)
    assert len(found.record) == 2
    for measured, ids, wanted in (
        (found.efficacy, aims, metric),
        (found.specificity, keeps, metric_of("kl")),
        (found.collateral, text, metric_of("loss")),
    ):
        inputs = {"input_ids": ids}
        plain = answer(model, inputs)
        with headwise.swap(model, change):
            other = answer(model, inputs)
        before = wanted.score(plain, inputs, plain).numpy()
        after = wanted.score(other, inputs, plain).numpy()
        assert measured is not None
        assert measured.examples == len(ids)
        assert measured.before.mean == pytest.approx(before.mean(), abs=1e-5)
        assert measured.after.mean == pytest.approx(after.mean(), abs=1e-5)
        difference = after - before
        assert abs(difference).max() > 1e-4
        assert measured.change.mean == pytest.approx(difference.mean(), abs=1e-5)
        error = difference.std(ddof=1) / len(ids) ** 0.5
        assert measured.change.error == pytest.approx(error, abs=1e-5)
    assert "specificity  kl 0 ->" in str(found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart", "gpt_oss"])
def test_a_profile_is_one_whole_run_a_head_and_change(name: str) -> None:
    model = getattr(tiny, name)()
    inputs = inputs_of(model, 3)
    changes = {"off": Silence(), "up": ScaleSink(6.0)}
    table = profile(model, inputs, "loss", changes, batch_size=2)
    loss = metric_of("loss")
    plain = loss.score(answer(model, inputs), inputs)
    for row in range(len(table)):
        at = {key: table.heads[key][row] for key in ("stack", "attention") if key in table.heads}
        place = (*map(str, at.values()), int(table.heads["layer"][row]))
        for column, change in changes.items():
            with headwise.swap(model, {(*place, int(table.heads["head"][row])): change}):
                other = loss.score(answer(model, inputs), inputs)
            difference = (other - plain).numpy()
            assert table.heads[column][row] == pytest.approx(difference.mean(), abs=2e-5)
            error = difference.std(ddof=1) / np.sqrt(3)
            assert table.spread[column][row] == pytest.approx(error, abs=2e-5)
    assert table.columns["up"].unit == "nats"


def test_heads_that_were_not_asked_for_are_not_measured() -> None:
    seen: list[int] = []
    table = profile(
        tiny.llama(),
        tiny.ids(6, batch=2),
        "loss",
        {"off": Silence()},
        heads=(1, (0, 2)),
        progress=lambda done, total, what: seen.append(total),
    )
    measured = [(r["layer"], r["head"]) for r in table.top("off", 8)]
    assert sorted(measured) == [(1, 0), (1, 2)]
    assert seen == [2, 2]
    assert np.isnan(table.heads["off"]).sum() == 6


def test_what_cannot_be_profiled_is_refused_first() -> None:
    model = tiny.llama()
    with pytest.raises(ValueError, match="name each as a column is"):
        profile(model, tiny.ids(6), "loss", {"a b": Silence()})
    with pytest.raises(ValueError, match="no metric"):
        profile(model, tiny.ids(6), "lost", {"a": Silence()})
    with pytest.raises((UnsupportedModelError, ValueError), match="layer 7"):
        profile(model, tiny.ids(6), "loss", {"a": Silence()}, heads=7)
