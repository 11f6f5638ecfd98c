"""Where an Atlas comes from: model, texts, machine, versions, cost.

Nothing is recorded about the user: paths stand only as they were typed, and a model's folder is
named by its last part; neither host nor account names are read.
"""

import hashlib
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from headwise.edits import active
from headwise.models.identity import config_of, model_name, weights_hash

__all__ = [
    "collect",
    "command_line",
    "model_name",
    "peak_memory_bytes",
    "reset_peak_memory",
    "text_entry",
    "versions",
    "weights_hash",
]


def collect(
    model: nn.Module,
    texts: Sequence[dict[str, Any]],
    seconds: float,
    *,
    name: str | None = None,
    revision: str | None = None,
    digest: str | None = None,
    command: str | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The provenance of one measurement, JSON-able.

    texts: entries as `text_entry` makes them. seconds: wall-clock time of the measurement.
    name: the model as the user named it; otherwise what its configuration says.
    digest: the weights' hash if it is known already; otherwise the parameters are hashed.
    command: the command line, see `command_line`. "edits" are the records of the swaps that are in
    force when it is called, if any.

    `peak_memory_bytes` is the process's largest resident memory so far, with Python, libraries
    and the model in it; on CUDA, `peak_device_memory_bytes` is what tensors took there since
    `reset_peak_memory`.
    """
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    devices = sorted({_device(p.device) for p in model.parameters()})
    known: dict[str, Any] = {
        "model": name or model_name(model),
        "model_class": type(model).__name__,
        "revision": revision or getattr(config_of(model), "_commit_hash", None),
        "weights_hash": digest or weights_hash(model),
        "texts": list(texts),
        "dtype": ", ".join(dtypes),
        "device": ", ".join(devices),
        "versions": versions(),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "settings": settings or {},
    }
    edits = active(model)
    if edits:
        known["edits"] = edits
    if any(p.device.type == "cuda" for p in model.parameters()):
        known["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated()
    return known


def text_entry(name: str, content: str | bytes | Tensor, tokens: int) -> dict[str, Any]:
    """What is kept of one input: its name, its SHA-256 and its number of tokens.

    A text is hashed as UTF-8; a tensor by its shape and values (integers as 64-bit, other numbers
    as float32, little-endian), so that the hash does not depend on where it lay.
    """
    if isinstance(content, Tensor):
        whole = not content.is_floating_point()
        values = content.detach().cpu().to(torch.int64 if whole else torch.float32)
        raw = values.contiguous().numpy()
        little = raw.astype(raw.dtype.newbyteorder("<")).tobytes()
        data: bytes = repr(tuple(raw.shape)).encode() + little
    elif isinstance(content, str):
        data = content.encode("utf-8", errors="surrogatepass")
    else:
        data = content
    return {"name": name, "sha256": hashlib.sha256(data).hexdigest(), "tokens": int(tokens)}


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in ("headwise", "torch", "transformers", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = str(torch.__version__)  # with its build, such as +cpu
    return found


def command_line(arguments: Iterable[str] | None = None) -> str:
    """The headwise command as it was typed, quoted for a shell; the program without its folder."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return shlex.join(["headwise", *given])


def peak_memory_bytes() -> int | None:
    """Largest resident memory of this process so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)  # bytes there, KiB elsewhere


def reset_peak_memory() -> None:
    """Start counting CUDA memory anew; the process's own peak cannot be reset."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return device.type
