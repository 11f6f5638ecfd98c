"""Text to tokens: the standard library of the running Python as two streams of token ids.

Which files belong, and which of them are held out, is decided in `headwise.models.default`,
because `headwise see` reads the held-out ones as its default input.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from headwise.models.default import corpus_documents, is_held_out, read_document

if TYPE_CHECKING:
    from collections.abc import Iterable

VOCABULARY = 2048
BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SPECIAL = (BEGIN, END, PAD)  # ids 0, 1, 2
LONGEST = 32768


@dataclass(frozen=True)
class Corpus:
    """Token streams of both sides of the split, every document followed by the end token."""

    train: np.ndarray  # (tokens,) uint16
    held_out: np.ndarray  # (tokens,) uint16
    facts: dict[str, str | int]


@dataclass(frozen=True)
class Facts:
    """What the card says about the data; bytes are of the text in UTF-8."""

    python: str
    train_documents: int
    train_bytes: int
    train_tokens: int
    held_out_documents: int
    held_out_bytes: int
    held_out_tokens: int
    listing_sha256: str


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCABULARY entries that puts the begin token first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BEGIN} $A",
                pair=f"{BEGIN} $A {BEGIN} $B",
                special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        model_max_length=LONGEST,
        clean_up_tokenization_spaces=False,
    )


def load(work: Path) -> Corpus:
    """The corpus from the cache in `work`, built (with its tokenizer) on the first call."""
    cache = work / "corpus.npz"
    if not cache.is_file():
        _build(work)
    with np.load(cache) as arrays:
        facts = json.loads((work / "corpus.json").read_text())
        return Corpus(arrays["train"], arrays["held_out"], facts)


def tokenizer_folder(work: Path) -> Path:
    return work / "tokenizer"


def _build(work: Path) -> None:
    documents = {name: read_document(name) for name in corpus_documents()}
    names = {False: [n for n in documents if not is_held_out(n)]}
    names[True] = [n for n in documents if is_held_out(n)]
    # the tokenizer, too, sees the training side only
    tokenizer = train_tokenizer(documents[name] for name in names[False])
    tokenizer.save_pretrained(tokenizer_folder(work))
    streams = {side: encode(tokenizer, (documents[n] for n in names[side])) for side in names}
    sizes = {name: len(text.encode()) for name, text in documents.items()}
    listing = "".join(
        f"{name} {sizes[name]} {hashlib.sha256(text.encode()).hexdigest()}\n"
        for name, text in documents.items()
    )
    facts = Facts(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        train_documents=len(names[False]),
        train_bytes=sum(sizes[n] for n in names[False]),
        train_tokens=len(streams[False]),
        held_out_documents=len(names[True]),
        held_out_bytes=sum(sizes[n] for n in names[True]),
        held_out_tokens=len(streams[True]),
        listing_sha256=hashlib.sha256(listing.encode()).hexdigest(),
    )
    (work / "corpus.json").write_text(json.dumps(asdict(facts), indent=2) + "\n")
    np.savez(work / "corpus.npz", train=streams[False], held_out=streams[True])


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> np.ndarray:
    """Token ids (tokens,) uint16 of the texts, each followed by the end token."""
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids.append(end)
    return np.array(ids, dtype=np.uint16)
