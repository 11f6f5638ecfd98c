"""A run does what the micro trainer does, and goes on as if nothing had happened."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.tasks.task import Batch
from headwise.train import ConfigError, Diverged, evaluate, fit, load, seeded, train
from headwise.train import checkpoint as checkpoints
from headwise.train.build import complete, make_model, make_task
from headwise.train.journal import entries
from tests.train.tiny import tables, tiny

pytest.importorskip("accelerate")


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in entries(folder / "losses.jsonl") if "loss" in entry]


class Ask:
    """Asks to stop after so many steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def test_the_losses_are_those_of_the_micro_trainer(tmp_path: Path) -> None:
    """Written independently, without pieces, processes or checkpoints: equal to the last bit."""
    config = tiny(tmp_path / "run")
    found = train(config, device="cpu")
    task = make_task(config.task)
    assert isinstance(config.model, dict)
    with seeded(0):
        model = make_model(complete(config.model, task))
    by_hand = fit(model, task, steps=12, size=8, rate=1e-2)
    assert losses(tmp_path / "run") == by_hand.losses
    assert found.found == pytest.approx(evaluate(model, task, batches=2, size=8), abs=1e-12)
    saved = load(tmp_path / "run")
    assert not saved.training
    for name, value in model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value), name


def test_pieces_add_up(tmp_path: Path) -> None:
    train(tiny(tmp_path / "whole"), device="cpu")
    train(tiny(tmp_path / "pieces", accumulate=4), device="cpu")
    assert losses(tmp_path / "pieces") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


def test_pieces_add_up_where_problems_ask_unequally(tmp_path: Path) -> None:
    from headwise.tasks import Copy
    from headwise.train.accelerator import accelerator
    from headwise.train.engine import Engine

    class Ragged(Copy):
        def make(self, size: int, generator: torch.Generator) -> Batch:
            batch = super().make(size, generator)
            targets = batch.targets.clone()
            for row in range(size):
                targets[row, : 4 + row % 4] = -100
            targets[-1] = -100
            return Batch(batch.inputs, targets)

    def steps(pieces: int) -> list[float]:
        settings = tiny(tmp_path, accumulate=pieces).train
        with seeded(3):
            table = tables(tmp_path)["model"]
            model = make_model(complete(table, Ragged(4, 8)))
        engine = Engine(model, Ragged(4, 8), settings, accelerator(settings, "cpu"))
        return [engine.step(step).loss for step in range(1, 6)]

    assert steps(8) == pytest.approx(steps(1), abs=1e-5)


@pytest.mark.parametrize("after", [3, 4, 7])
def test_a_stopped_run_goes_on_to_the_same_losses(tmp_path: Path, after: int) -> None:
    train(tiny(tmp_path / "whole"), device="cpu")
    first = train(tiny(tmp_path / "parts"), stop=Ask(after), device="cpu")
    assert (first.stopped, first.step) == (True, after)
    second = train(tiny(tmp_path / "parts"), device="cpu")
    assert (second.began, second.step, second.stopped) == (after, 12, False)
    whole, parts = (tmp_path / name / "losses.jsonl" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    third = train(tiny(tmp_path / "parts"), device="cpu")
    assert third.began == 12, "nothing is done again"
    assert third.found == second.found


def test_a_damaged_checkpoint_does_not_count(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run")
    train(config, device="cpu")
    before = (tmp_path / "run" / "losses.jsonl").read_bytes()
    newest = checkpoints.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with (tmp_path / "run" / "losses.jsonl").open("a") as journal:
        journal.write('{"step": 13, "lo')
    again = train(config, device="cpu")
    assert again.began == 8
    assert (tmp_path / "run" / "losses.jsonl").read_bytes() == before


def test_more_steps_go_on_and_other_changes_do_not(tmp_path: Path) -> None:
    train(tiny(tmp_path / "run"), device="cpu")
    longer = train(tiny(tmp_path / "run", steps=14, keep=1, evaluate_every=1), device="cpu")
    assert (longer.began, longer.step) == (12, 14)
    assert len(checkpoints.steps(tmp_path / "run" / "checkpoints")) == 1
    with pytest.raises(ConfigError, match=r"train.steps was 14, is 12 \(only more steps go on\)"):
        train(tiny(tmp_path / "run"), device="cpu")
    with pytest.raises(ConfigError, match=r"train.rate was 0.01, is 0.02"):
        train(tiny(tmp_path / "run", steps=14, rate=2e-2), device="cpu")
    changed = tables(tmp_path / "run", steps=14)
    changed["model"]["mixer"]["position"] = "Sinusoidal"
    from headwise.train import parse

    with pytest.raises(ConfigError, match=r'model.mixer.position was "Rotary", is "Sinusoidal"'):
        train(parse(changed), device="cpu")
    anew = train(parse(changed), device="cpu", force=True)
    assert (anew.began, anew.step) == (0, 14)
    assert len(losses(tmp_path / "run")) == 14


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ConfigError, match="other things"):
        train(tiny(tmp_path), device="cpu")
    with pytest.raises(ConfigError, match="is a file"):
        train(tiny(tmp_path / "thesis.tex"), device="cpu")
    train(tiny(tmp_path, steps=1), device="cpu", force=True)
    assert (tmp_path / "thesis.tex").read_text() == "..."


def test_a_change_of_the_data_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headwise.tasks import Copy

    train(tiny(tmp_path / "run"), stop=Ask(2), device="cpu")
    make = Copy.make

    def other(self: Any, size: int, generator: torch.Generator) -> Batch:
        batch = make(self, size, generator)
        return Batch({"input_ids": batch.inputs["input_ids"].flip(1)}, batch.targets)

    monkeypatch.setattr(Copy, "make", other)
    with pytest.raises(ConfigError, match="makes other problems"):
        train(tiny(tmp_path / "run"), device="cpu")


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    from headwise.train import folder

    with folder.alone(tmp_path / "run"), pytest.raises(ConfigError, match="another process"):
        train(tiny(tmp_path / "run"), device="cpu")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    from headwise.tasks import Copy

    loss, calls = Copy.loss, iter(range(100))

    def bad(self: Any, output: Tensor, batch: Batch) -> Tensor:
        value = loss(self, output, batch)
        if not torch.is_grad_enabled() or next(calls) != 5:
            return value
        # a square root at zero: a finite loss with a gradient that is none
        return value * math.nan if what == "loss" else value + (output * 0).sum().sqrt()

    monkeypatch.setattr(Copy, "loss", bad)
    with pytest.raises(Diverged, match=rf"{what} is not finite at step 6.*step-00000004"):
        train(tiny(tmp_path / "run"), device="cpu")
    assert all(value.isfinite().all() for value in load(tmp_path / "run").state_dict().values())


def test_a_full_disk_keeps_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from headwise.train import weights
    from headwise.train.checkpoint import NoSpace

    save = weights.save_optimizer

    def full(state: Any, folder: Path) -> None:
        if "00000008" in folder.name:
            (folder / "half").write_bytes(b"0" * 100)
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, folder)

    with monkeypatch.context() as patched:
        patched.setattr(weights, "save_optimizer", full)
        with pytest.raises(NoSpace, match=r"no space left.*step-00000004.*same command"):
            train(tiny(tmp_path / "run"), device="cpu")
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert kept == ["step-00000004"]
    assert train(tiny(tmp_path / "run"), device="cpu").began == 4
    train(tiny(tmp_path / "whole"), device="cpu")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_too_small_a_disk_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ConfigError, match="MiB free"):
        train(tiny(tmp_path / "run"), device="cpu")


def test_dropout_is_the_same_after_going_on(tmp_path: Path) -> None:
    def config(name: str) -> Any:
        from headwise.train import parse

        content = tables(tmp_path / name)
        content["model"]["mixer"]["dropout"] = 0.3
        return parse(content)

    train(config("whole"), device="cpu")
    train(config("parts"), stop=Ask(6), device="cpu")
    train(config("parts"), device="cpu")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    train(tiny(tmp_path / "none"), device="cpu")
    assert losses(tmp_path / "none") != losses(tmp_path / "whole"), "dropout does nothing"


def test_half_precision(tmp_path: Path) -> None:
    train(tiny(tmp_path / "whole"), device="cpu")
    train(tiny(tmp_path / "bf16", precision="bf16"), device="cpu")
    whole, half = losses(tmp_path / "whole"), losses(tmp_path / "bf16")
    assert half != whole
    assert half == pytest.approx(whole, abs=0.1)
    dtypes = {value.dtype for value in load(tmp_path / "bf16").state_dict().values()}
    assert dtypes == {torch.float32}
    train(tiny(tmp_path / "parts", precision="bf16"), stop=Ask(6), device="cpu")
    train(tiny(tmp_path / "parts", precision="bf16"), device="cpu")
    assert losses(tmp_path / "parts") == half


def test_the_accelerator_is_asked_for_what_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match="say the same in both"):
        train(tiny(tmp_path / "run"), device="cpu")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="FSDP, which it does on several accelerators only"):
        train(tiny(tmp_path / "run"), device="cpu")
    assert not (tmp_path / "run").exists()


def test_tasks_with_an_oracle_say_what_it_reaches(tmp_path: Path) -> None:
    from headwise.train import parse

    content = tables(tmp_path / "run", steps=2)
    content["task"] = {"kind": "Repeat"}
    found = train(parse(content), device="cpu")
    assert found.oracle is not None
    assert found.oracle["loss"] < found.found["loss"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["oracle"]["loss"] == found.oracle["loss"]


def test_nothing_but_safetensors_and_json_is_written(tmp_path: Path) -> None:
    train(tiny(tmp_path / "run"), device="cpu")
    kinds = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert kinds <= {".json", ".jsonl", ".safetensors", ".svg", ""}


def test_fit_trains_where_gradients_are_switched_off_around_it() -> None:
    import torch

    from headwise.models.backbones import Decoder
    from headwise.parts import Attention
    from headwise.tasks import Copy
    from headwise.train import fit

    task = Copy()
    model = Decoder(task.vocabulary, 16, 1, lambda layer: Attention(16, 2, causal=True))
    with torch.no_grad():
        assert fit(model, task, steps=2, size=2).steps == 2
        assert not torch.is_grad_enabled()
