"""What save refuses, what load does not believe, and deaths in between."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import headwise
import headwise.compress.folder as folder
import headwise.compress.tensors as tensors
from headwise.compress import prune_heads
from headwise.compress.folder import remains_of
from headwise.models import UnsupportedModelError
from headwise.models.identity import weights_hash
from tests.instruments import tiny


def _uneven() -> Any:
    model = tiny.llama()
    prune_heads(model, [(0, 1)])
    return model


def test_changes_that_no_step_made_are_refused(tmp_path: Path) -> None:
    model = tiny.llama()
    mlp: Any = model.model.layers[0].mlp
    mlp.down_proj = torch.nn.Linear(48, 32, bias=True)
    with pytest.raises(UnsupportedModelError, match=r"mlp\.down_proj.*no Step"):
        headwise.save(model, tmp_path / "it")
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    headwise.save(_uneven(), tmp_path / "it")
    file = tmp_path / "it" / "headwise.safetensors"
    right = load_file(file)
    manifest = tmp_path / "it" / "headwise.json"

    def wrong(tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, file)
        said = json.loads(manifest.read_text())
        said["weights"]["hash"] = weights_hash(file)
        manifest.write_text(json.dumps(said))

    wrong({n: t for n, t in right.items() if n != "model.norm.weight"})
    with pytest.raises(ValueError, match=r"missing: model\.norm\.weight"):
        headwise.load(tmp_path / "it")
    wrong({**right, "model.more": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"no place for: model\.more"):
        headwise.load(tmp_path / "it")
    wrong({**right, "model.norm.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight is \(3,\)"):
        headwise.load(tmp_path / "it")


def test_damage_is_noticed(tmp_path: Path) -> None:
    place = tmp_path / "it"
    headwise.save(tiny.llama(), place)
    file = place / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is not what was saved"):
        headwise.load(place)
    said = json.loads((place / "headwise.json").read_text())
    (place / "headwise.json").write_text(json.dumps({**said, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        headwise.load(place)
    (place / "headwise.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        headwise.load(place)
    with pytest.raises(FileNotFoundError, match="not written by save"):
        headwise.load(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("class", "os.path.join", "no model class of transformers"),
        ("class", "transformers.AutoTokenizer", "no model class of transformers"),
        ("steps", [{"step": "os.system", "command": "true"}], "is not known"),
        ("weights", {"file": "../../secret", "hash": ""}, "no version wrote"),
    ],
)
def test_a_manifest_runs_and_reads_nothing_else(
    key: str, value: Any, said: str, tmp_path: Path
) -> None:
    place = tmp_path / "it"
    headwise.save(tiny.llama(), place)
    manifest = json.loads((place / "headwise.json").read_text())
    (place / "headwise.json").write_text(json.dumps({**manifest, key: value}))
    with pytest.raises(ValueError, match=said):
        headwise.load(place)


def test_a_folder_that_is_there_stays_unless_it_is_to_go(tmp_path: Path) -> None:
    place = tmp_path / "it"
    place.mkdir()
    (place / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        headwise.save(tiny.llama(), place)
    assert [f.name for f in place.iterdir()] == ["mine.txt"]
    headwise.save(tiny.llama(), place, overwrite=True)
    assert not (place / "mine.txt").exists()
    headwise.load(place)
    assert [f.name for f in tmp_path.iterdir()] == ["it"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("killed_at", range(9))
def test_death_at_any_moment_loses_nothing(
    killed_at: int, before: bool, exchange: bool, tmp_path: Path
) -> None:
    """A process ends without a word at its n-th step on the disk; what was there is there."""
    place = tmp_path / "it"
    first, second = tiny.llama(num_hidden_layers=1), tiny.llama()
    if before:
        headwise.save(first, place)
    child = os.fork()
    if child == 0:
        try:
            _save_and_die(second, place, killed_at, exchange)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, 9)
    if place.exists():
        found: Any = headwise.load(place)
        assert found.config.num_hidden_layers in ((1, 2) if before else (2,))
        headwise.save(first, place, overwrite=True)  # and whatever was left is in nobody's way
    elif before:  # between two renames, where folders cannot be exchanged at once
        assert not exchange
        with pytest.raises(FileNotFoundError, match=r"\.old holds what stood there"):
            headwise.load(place)
        found = headwise.load(remains_of(place)[-1])
        assert found.config.num_hidden_layers == 1


def _save_and_die(model: Any, place: Path, killed_at: int, exchange: bool) -> None:
    count = 0

    def dying(what: Any) -> Any:
        def done(*args: Any, **more: Any) -> Any:
            nonlocal count
            if count == killed_at:
                os._exit(9)
            count += 1
            return what(*args, **more)

        return done

    swapped: Any = folder._exchange if exchange else lambda one, other: False
    folder._exchange = dying(swapped)  # type: ignore[assignment]
    tensors.save_file = dying(tensors.save_file)  # type: ignore[assignment]
    Path.write_text = dying(Path.write_text)  # type: ignore[method-assign]
    Path.rename = dying(Path.rename)  # type: ignore[method-assign]
    shutil.rmtree = dying(shutil.rmtree)  # type: ignore[assignment]
    headwise.save(model, place, overwrite=True)
    os._exit(0)
