"""Provenance: hashes that change with what they stand for, and nothing about the user."""

import hashlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from headwise.instruments.contrast import contrast
from headwise.instruments.provenance import (
    collect,
    command_line,
    model_name,
    peak_memory_bytes,
    text_entry,
    versions,
    weights_hash,
)
from headwise.models import identity


def a_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)


def named(model: nn.Module, name: str, **config: Any) -> nn.Module:
    model.config = SimpleNamespace(_name_or_path=name, **config)  # type: ignore[assignment]
    return model


def test_parameter_hash_is_of_names_and_bytes() -> None:
    model = a_model()
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}\n".encode())
        digest.update(p.detach().numpy().tobytes())
    assert weights_hash(model) == f"sha256:{digest.hexdigest()}"


def test_parameter_hash_tells_models_apart() -> None:
    base = weights_hash(a_model())
    assert weights_hash(a_model()) == base
    assert weights_hash(a_model(seed=1)) != base
    assert weights_hash(a_model(dtype=torch.bfloat16)) != base
    nudged = a_model()
    with torch.no_grad():
        nudged[1].bias[2] += 1e-7  # type: ignore[index,operator]
    assert weights_hash(nudged) != base
    renamed = nn.ModuleDict({"a": a_model()})
    assert weights_hash(renamed) != base


def test_parameter_hash_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights_hash(a_model())
    monkeypatch.setattr(identity, "_CHUNK", 12)
    assert weights_hash(a_model()) == whole


def test_transposed_memory_hashes_as_its_values() -> None:
    model = a_model()
    whole = weights_hash(model)
    model[0].weight.data = model[0].weight.data.t().contiguous().t()  # type: ignore
    assert not model[0].weight.is_contiguous()  # type: ignore
    assert weights_hash(model) == whole


def test_file_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model-2.safetensors", "model-1.safetensors"):
        save_file({"x": torch.arange(9.0)}, tmp_path / name)
    (tmp_path / "notes.txt").write_text("no weights")
    base = weights_hash(tmp_path)
    monkeypatch.setattr(identity, "_CHUNK", 10)
    assert weights_hash(tmp_path) == base
    (tmp_path / "notes.txt").unlink()
    assert weights_hash(tmp_path) == base
    save_file({"x": torch.arange(9.0) + 1}, tmp_path / "model-2.safetensors")
    assert weights_hash(tmp_path) != base
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors in"):
        weights_hash(tmp_path / "empty")


def test_a_model_without_data_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="bias is on the meta device"):
        weights_hash(model)


def test_text_entries() -> None:
    assert text_entry("t", "héllo", 3) == {
        "name": "t",
        "sha256": hashlib.sha256("héllo".encode()).hexdigest(),
        "tokens": 3,
    }
    ids = torch.tensor([[1, 2, 3, 4]])
    same = text_entry("ids", ids, 4)
    assert text_entry("ids", ids.int(), 4) == same
    assert text_entry("ids", ids.repeat_interleave(2, 1)[:, ::2], 4) == same
    assert text_entry("ids", ids.reshape(2, 2), 4) != same
    assert text_entry("ids", ids.flip(1), 4) != same
    pixels = torch.rand(1, 3, 4, 4)
    assert text_entry("image", pixels, 16) != text_entry("image", pixels + 1e-3, 16)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("owner/model", "owner/model"),
        ("gpt2", "gpt2"),
        ("/home/someone/secret/tiny-llama", "tiny-llama"),
        ("./runs/tiny-llama/", "tiny-llama"),
        ("~/tiny-llama", "tiny-llama"),
        ("", "Sequential"),
    ],
)
def test_model_names_tell_nothing_of_the_user(given: str, shown: str) -> None:
    assert model_name(named(a_model(), given)) == shown


def test_a_relative_folder_is_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "someone" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_name(named(a_model(), "someone/tiny")) == "tiny"


def test_collect() -> None:
    model = named(a_model(dtype=torch.bfloat16), "/home/someone/tiny", _commit_hash="abc")
    texts = [text_entry("t", "text", 4)]
    known = collect(model, texts, 1.5, command="headwise see x", settings={"seed": 0})
    assert json.loads(json.dumps(known)) == known
    assert {key: known[key] for key in ("model", "revision", "dtype", "device", "seconds")} == {
        "model": "tiny", "revision": "abc", "dtype": "bfloat16", "device": "cpu", "seconds": 1.5,
    }  # fmt: skip
    assert known["weights_hash"] == weights_hash(model)
    assert known["texts"] == texts
    assert known["threads"] == torch.get_num_threads()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", known["date"])
    assert set(known["versions"]) >= {"headwise", "torch", "python"}
    assert "someone" not in json.dumps(known)
    assert str(Path.home()) not in json.dumps(known)
    assert "peak_device_memory_bytes" not in known
    # two runs of the same thing have nothing to warn of
    again = collect(model, texts, 9.0, settings={"seed": 0})
    assert contrast(known, again) == []
    assert contrast(known, collect(a_model(1), texts, 1.5, settings={"seed": 0})) != []


def test_collect_takes_what_is_known() -> None:
    known = collect(a_model(), [], 0.0, name="./typed", revision="r", digest="sha256:0")
    assert (known["model"], known["revision"], known["weights_hash"]) == (
        "./typed", "r", "sha256:0",
    )  # fmt: skip


def test_mixed_precision_is_named() -> None:
    model = a_model()
    model[1].to(torch.float16)  # type: ignore[operator,index]
    assert collect(model, [], 0.0)["dtype"] == "float16, float32"


def test_peak_memory_is_in_bytes() -> None:
    before = peak_memory_bytes()
    if before is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert before > 50 * 2**20  # python with torch in it; as KiB it would be a thousandth
    block = torch.ones(before // 8 + 2**23, dtype=torch.float64)  # more than the peak so far
    after = peak_memory_bytes()
    assert after is not None
    assert block.nbytes < after < before + block.nbytes + 2**28


def test_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/someone/bin/headwise", "see", "my model", "--json"])
    assert command_line() == "headwise see 'my model' --json"
    assert command_line(["compare", "a", "b"]) == "headwise compare a b"


def test_versions_name_the_build() -> None:
    assert versions()["torch"] == torch.__version__
