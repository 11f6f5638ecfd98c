"""Everything that can be refused before torch is loaded, is; with one line that says what to do."""

from pathlib import Path

import pytest

from headwise.cli import main
from headwise.cli.sources import EMBEDDED, ModelSource, model_source, output_folder, read_texts
from tests.cli.command import refusal

Capture = pytest.CaptureFixture[str]


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


def test_a_folder_with_config_and_safetensors(tmp_path: Path) -> None:
    folder = touch(tmp_path / "mine", "config.json", "model-00001-of-00002.safetensors")
    assert model_source(str(folder)) == ModelSource("mine", str(folder))


def test_a_gguf_file_and_a_folder_with_one(tmp_path: Path) -> None:
    folder = touch(tmp_path / "m", "small.gguf")
    wanted = ModelSource("small", str(folder), "small.gguf")
    assert model_source(str(folder / "small.gguf")) == wanted
    assert model_source(str(folder)) == wanted


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M", "a/b.c-d_e"])
def test_hub_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_source(name) == ModelSource(name, name, on_hub=True)


def test_a_folder_goes_before_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "gpt2", "config.json", "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert not model_source("gpt2").on_hub


@pytest.mark.parametrize(
    ("files", "given", "says"),
    [
        ([], "./gone", "no folder or file './gone'"),
        ([], "a/b/c", "no folder or file 'a/b/c'"),
        ([], "gone.gguf", "no GGUF file"),
        (["notes.txt"], "m", "no config.json"),
        (["notes.txt"], "m/notes.txt", "is a file; expected the folder"),
        (["config.json"], "m", "no weights"),
        (["config.json", "pytorch_model.bin"], "m", "can run code"),
        (["a.gguf", "b.gguf"], "m", "--gguf-file a.gguf"),
    ],
)
def test_what_is_no_model(
    files: list[str],
    given: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    touch(tmp_path / "m", *files)
    monkeypatch.chdir(tmp_path)
    assert says in refusal(capsys, "see", given)


def test_a_gguf_file_that_is_not_there(tmp_path: Path, capsys: Capture) -> None:
    touch(tmp_path, "a.gguf")
    assert "it has a.gguf" in refusal(capsys, "see", tmp_path, "--gguf-file", "b.gguf")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no text file"),
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"\xff\xfe\x00", "not UTF-8 text (byte 0 is 0xff)"),
    ],
)
def test_what_is_no_text(content: bytes | None, says: str, tmp_path: Path, capsys: Capture) -> None:
    model = touch(tmp_path / "m", "config.json", "model.safetensors")
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    assert says in refusal(capsys, "see", model, "--text", text)


def test_a_folder_is_no_text(tmp_path: Path, capsys: Capture) -> None:
    model = touch(tmp_path / "m", "config.json", "model.safetensors")
    assert "is a folder" in refusal(capsys, "see", model, "--text", tmp_path)


def test_texts_keep_their_order_and_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name * 2, encoding="utf-8")
    read = read_texts([str(tmp_path / "b.txt"), str(tmp_path / "a.txt")])
    assert read == [("b.txt", "b.txtb.txt"), ("a.txt", "a.txta.txt")]


def test_default_folders_of_results_do_not_leave_their_place() -> None:
    hub = ModelSource("owner/name", "owner/name", on_hub=True)
    assert output_folder(None, hub) == Path("headwise-out/owner--name")
    embedded = ModelSource(EMBEDDED, "/somewhere")
    assert output_folder(None, embedded) == Path("headwise-out/default")
    assert output_folder(Path("here"), hub) == Path("here")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tokens", "0"], "at least 1, got '0'"),
        (["--tokens", "many"], "got 'many'"),
        (["--instruments", ","], "names separated by commas"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--resume", "--force"], "not allowed with"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_unusable_options_are_one_line(options: list[str], says: str, capsys: Capture) -> None:
    assert main(["see", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert "--help" in line


def test_results_are_not_replaced_silently(tmp_path: Path, capsys: Capture) -> None:
    model = touch(tmp_path / "m", "config.json", "model.safetensors")
    out = touch(tmp_path / "out", "atlas.safetensors")
    line = refusal(capsys, "see", model, "--out", out)
    assert "--force" in line
    assert (out / "atlas.safetensors").read_text(encoding="utf-8") == "{}"
    line = refusal(capsys, "see", model, "--out", out / "atlas.safetensors")
    assert "is a file; expected a folder" in line
