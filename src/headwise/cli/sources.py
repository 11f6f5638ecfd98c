"""What the user named: a model, texts, a folder for the results. Checked before torch is loaded."""

import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from headwise.cli.errors import UserError

# owner/name or name, as the Hugging Face hub allows them
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
EMBEDDED = "headwise default model"
# what headwise.save writes beside the weights, and where `headwise shrink` leaves them
MANIFEST = "headwise.json"
SHRUNK = "model"
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    name: as it is shown. location: a folder, or a name on the hub. gguf: the file in the folder
    (or hub repository) that holds the model, where it is a GGUF file.
    """

    name: str
    location: str
    gguf: str | None = None
    on_hub: bool = False


def model_source(model: str | None, gguf: str | None = None) -> ModelSource:
    """Find out what MODEL is: nothing (the embedded model), a folder, a .gguf file, a hub name."""
    if model is None:
        from headwise.models.default import default_model_path

        try:
            return ModelSource(EMBEDDED, str(default_model_path()))
        except FileNotFoundError as error:
            raise UserError(str(error)) from error
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder_source(path, gguf)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(
                f"{model} is a file; expected the folder that holds config.json and the "
                "safetensors files, or a .gguf file"
            )
        return ModelSource(path.stem, str(path.parent), path.name)
    if model.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(model):
        raise UserError(
            f"no folder or file {model!r}; expected a folder with config.json and *.safetensors, "
            "a .gguf file, or a name on the Hugging Face hub such as HuggingFaceTB/SmolLM2-135M"
        )
    if path.suffix == ".gguf":
        raise UserError(f"no GGUF file {model!r}")
    return ModelSource(model, model, gguf, on_hub=True)


def _folder_source(path: Path, gguf: str | None) -> ModelSource:
    name = path.resolve().name
    if not (path / "config.json").is_file() and (path / SHRUNK / MANIFEST).is_file():
        path = path / SHRUNK  # what `headwise shrink` left
    elif name == SHRUNK and (path.resolve().parent / "curve.json").is_file():
        name = path.resolve().parent.name
    found = sorted(file.name for file in path.glob("*.gguf"))
    if gguf is not None:
        if gguf not in found:
            has = f"it has {', '.join(found)}" if found else "it has no GGUF file"
            raise UserError(f"no GGUF file {gguf!r} in {path}; {has}")
        return ModelSource(name, str(path), gguf)
    if not (path / "config.json").is_file():
        if len(found) == 1:
            return ModelSource(Path(found[0]).stem, str(path), found[0])
        if found:
            raise UserError(
                f"{path} holds several GGUF files; name one: --gguf-file {found[0]} "
                f"(or {', '.join(found[1:])})"
            )
        raise UserError(
            f"{path} is not a model: it has no config.json; expected a folder in Hugging Face "
            "format (config.json, *.safetensors, tokenizer), or a .gguf file"
        )
    if not any(path.glob("*.safetensors")):
        pickles = sorted(file.name for form in _PICKLES for file in path.glob(form))
        if pickles:
            raise UserError(
                f"{path} holds its weights only as {pickles[0]}, a format that can run code when "
                "it is loaded; expected *.safetensors: convert it once with "
                "model.save_pretrained(folder)"
            )
        raise UserError(f"{path} has a config.json but no weights; expected *.safetensors")
    return ModelSource(name, str(path))


def read_texts(files: Sequence[str]) -> list[tuple[str, str]]:
    """(name, content) of every text file; - is the standard input."""
    texts = []
    for file in files:
        path = Path(file).expanduser()
        name = "standard input" if file == "-" else path.name
        try:
            content = (
                sys.stdin.buffer.read().decode("utf-8")
                if file == "-"
                else path.read_text(encoding="utf-8")
            )
        except FileNotFoundError:
            raise UserError(f"no text file {file!r}; --text takes files, not words") from None
        except IsADirectoryError:
            raise UserError(
                f"{file} is a folder; --text takes text files (MODEL goes before --text)"
            ) from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#x})"
            ) from None
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from None
        if not content.strip():
            raise UserError(f"{name} is empty; expected text to measure the model on")
        texts.append((name, content))
    return texts


def output_folder(chosen: Path | None, source: ModelSource) -> Path:
    """The folder for the results of this model."""
    if chosen is not None:
        return chosen.expanduser()
    name = "default" if source.name == EMBEDDED else source.name
    return Path("headwise-out") / re.sub(r"[^\w.-]+", "--", name)


def closest(word: str, known: Iterable[str], what: str) -> str:
    """`no such WHAT` with the nearest known name, or with all of them."""
    choices = list(known)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(choices)}"
    return f"no {what} {word!r}; {hint}"
