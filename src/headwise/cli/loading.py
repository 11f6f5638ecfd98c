"""A model and its tokenizer from where the user said they are: weights from safetensors or GGUF."""

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.cli.errors import UserError, one_line
from headwise.cli.progress import Progress
from headwise.cli.sources import MANIFEST, ModelSource

# Where a config names no class of its own; the first that knows the model type is taken.
_GENERAL_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM")


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, its tokenizer, and how many tokens it has positions for.

    positions: None where positions are computed, not looked up, so that any number can be asked.
    trained: the longest input that the model's configuration speaks of.
    unset: weights that the files lack and the model made up, none of them inside a layer.
    """

    model: Any
    tokenizer: Any
    positions: int | None
    trained: int | None
    unset: tuple[str, ...]


def load_to_answer(source: ModelSource, options: argparse.Namespace, progress: Progress) -> Loaded:
    """`load_as_told` for commands that ask what the model answers.

    Raises UserError for a model of whose head the files say nothing: its answers would be random.
    """
    loaded = load_as_told(source, options, progress)
    if loaded.unset:
        raise UserError(
            f"{len(loaded.unset)} weights outside the layers are not in the files (such as "
            f"{loaded.unset[0]}): the answers of this model, and so all effects, would be random"
        )
    return loaded


def load_as_told(source: ModelSource, options: argparse.Namespace, progress: Progress) -> Loaded:
    """`load` by the options that `add_loading` adds, on as many threads as they say."""
    progress.note(f"loading {source.name}")
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
    return load(source, options.dtype, options.device, options.trust_remote_code, options.revision)


def load(
    source: ModelSource,
    dtype: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Loaded:
    """Load the model in evaluation mode on its device.

    Raises UserError with one line that says what is missing and what to do.
    """
    import torch

    from headwise.instruments.positions import position_limit, position_table

    transformers = quiet_transformers()
    device = chosen_device(device)
    if source.gguf is None and (Path(source.location) / MANIFEST).is_file():
        return _saved(transformers, source, dtype, device)
    wanted = dtype or ("float32" if device == "cpu" else "auto")
    files: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        files["revision"] = revision
    if source.gguf is not None:
        files["gguf_file"] = source.gguf
    try:
        config = transformers.AutoConfig.from_pretrained(source.location, **files)
        kind = _model_class(transformers, config, source, trust_remote_code)
        tokenizer = _tokenizer(transformers, source, files)
        model, info = kind.from_pretrained(
            source.location,
            dtype="auto" if wanted == "auto" else getattr(torch, wanted),
            use_safetensors=True,
            output_loading_info=True,
            **files,
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(_explain(error, source, trust_remote_code)) from error
    unset = tuple(sorted(info["missing_keys"]))
    in_layers = [key for key in unset if re.search(r"\.\d+\.", key)]
    if in_layers:
        raise UserError(
            f"{source.name} is not a whole {kind.__name__}: its files lack {len(in_layers)} "
            f"weights of its layers (such as {in_layers[0]}), which would be random; expected a "
            "folder written by save_pretrained of that class"
        )
    model = model.eval().to(device)
    return Loaded(model, tokenizer, position_table(model), position_limit(model), unset)


def _saved(transformers: Any, source: ModelSource, dtype: str | None, device: str) -> Loaded:
    """What headwise.save wrote, in the dtype that it was saved in unless told otherwise."""
    import torch

    from headwise.compress.saving import load as load_saved
    from headwise.instruments.positions import position_limit, position_table

    wanted = None if dtype in (None, "auto") else getattr(torch, str(dtype))
    try:
        model: Any = load_saved(source.location, device=device, dtype=wanted)
        tokenizer = _tokenizer(transformers, source, {})
    except (OSError, ValueError) as error:
        raise UserError(f"{source.name} cannot be loaded: {one_line(error, 300)}") from error
    return Loaded(model, tokenizer, position_table(model), position_limit(model), ())


def chosen_device(asked: str) -> str:
    """The device that "auto" stands for, or the one that was asked for. Raises UserError where it
    is not there."""
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch sees no CUDA device; use --device cpu")
    return asked


def _model_class(
    transformers: Any, config: Any, source: ModelSource, trust_remote_code: bool
) -> Any:
    remote = getattr(config, "auto_map", None) or {}
    if trust_remote_code and remote:
        name = next((name for name in _GENERAL_CLASSES if name in remote), "AutoModel")
        return getattr(transformers, name)
    for name in getattr(config, "architectures", None) or ():
        named = getattr(transformers, name, None)
        if named is not None:
            _check_reads_text(named, source)
            return named
    for name in _GENERAL_CLASSES:
        general = getattr(transformers, name)
        if type(config) in general._model_mapping:
            return general
    return transformers.AutoModel


def _check_reads_text(kind: Any, source: ModelSource) -> None:
    given = getattr(kind, "main_input_name", "input_ids")
    if given != "input_ids":
        raise UserError(
            f"{source.name} is a {kind.__name__}, which takes {given}, not text; the command "
            "line measures models on text: in Python, headwise.see(model, inputs) takes tensors"
        )


def _tokenizer(transformers: Any, source: ModelSource, files: dict[str, Any]) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(source.location, **files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if source.on_hub and isinstance(error, OSError):
            raise
        raise UserError(
            f"{source.name} has no tokenizer that can be loaded; expected tokenizer.json beside "
            f"its weights ({one_line(error, 160)})"
        ) from error


def quiet_transformers() -> Any:
    """transformers, without its warnings. Raises UserError where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            "models are loaded with transformers, which is not installed: "
            "pip install 'headwise[hf]'"
        ) from None
    # Its warnings are about training and generation; what matters here is checked here.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _explain(error: Exception, source: ModelSource, trusted: bool) -> str:
    text = one_line(error, 300)
    if isinstance(error, ImportError) and source.gguf is not None:
        return f"{source.gguf} needs two more packages: pip install 'headwise[gguf]'"
    if not trusted and "trust_remote_code" in str(error):
        return (
            f"{source.name} brings Python code of its own, which is not run unless you say "
            "--trust-remote-code; read the code first"
        )
    if isinstance(error, OSError) and source.on_hub:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
            why = "HF_HUB_OFFLINE is set and it is not in the cache"
        elif "safetensors" in text:
            why = "it has no safetensors weights, and other formats can run code when loaded"
        else:
            why = text
        return (
            f"no folder {source.name!r}, and it cannot be had from the Hugging Face hub: {why}; "
            "name a local folder, or check the name and the connection"
        )
    if "model type" in text or "architecture" in text:
        return f"{source.name} is not a model that the installed transformers knows: {text}"
    return f"{source.name} cannot be loaded: {text}"
