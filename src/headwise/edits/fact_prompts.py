"""Facts as users state them, as tokens: where the subject stands, and what shall follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

Ids: TypeAlias = "Tensor | Sequence[int]"


@dataclass(frozen=True, eq=False)
class Fact:
    """What a model shall say from now on.

    With a tokenizer, `prompt` is text that ends where the answer begins, `subject` a part of it
    ("{}" in the prompt stands for the subject), `target` the answer. Without one, `prompt` and
    `target` are token ids and `subject` the place of the subject's last token in the prompt,
    counted from 0, or its `(start, stop)`.
    """

    prompt: str | Ids
    subject: str | int | tuple[int, int]
    target: str | int | Ids

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {"prompt": _plain(self.prompt), "subject": _plain(self.subject),
                "target": _plain(self.target)}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Wording:
    """One line of tokens `(n,)` with a subject at `start` to `stop` (not included)."""

    ids: Tensor
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Rows:
    """Lines that run together, filled up on the right, which a causal model does not see.

    inputs: `(rows, n)`. subjects: place of each subject's last token. ends: place of each line's
    last token before the target, whose logits speak of the target's first.
    """

    inputs: Tensor
    subjects: Tensor
    ends: Tensor

    def __len__(self) -> int:
        return len(self.inputs)


def read_fact(fact: Fact, tokenizer: Any | None) -> tuple[Wording, Tensor]:
    """(the prompt, the target's ids `(m,)`). Raises ValueError for a subject that is not in the
    prompt, for an empty target, and for text without a tokenizer."""
    wording = read_wording(fact.prompt, fact.subject, tokenizer)
    return wording, read_target(fact.prompt, fact.target, tokenizer)


def read_wording(
    prompt: str | Ids, subject: str | int | tuple[int, int], tokenizer: Any | None, before: Any = ""
) -> Wording:
    """A prompt with what stands `before` it: text, or ids where the prompt is ids."""
    if isinstance(prompt, str):
        if not isinstance(subject, str):
            raise ValueError(f"subject={subject!r} in a prompt of text: expected a part of it")
        require_tokenizer(tokenizer)
        text = prompt.replace("{}", subject)
        at = text.find(subject)
        if not subject or at < 0:
            raise ValueError(f"the subject {subject!r} does not stand in the prompt {prompt!r}")
        whole = f"{before} {text}" if before else text
        at += len(whole) - len(text)
        ids, start, stop = _encoded(tokenizer, whole, at, at + len(subject))
        first = _opening(tokenizer)
        return Wording(torch.tensor([*first, *ids]), start + len(first), stop + len(first))
    if isinstance(subject, str):
        raise ValueError(
            f"subject={subject!r} in a prompt of token ids: expected the place of its last token, "
            "or (start, stop)"
        )
    given = _ids(prompt)
    start, stop = (subject, subject + 1) if isinstance(subject, int) else subject
    if not 0 <= start < stop <= len(given):
        raise ValueError(f"subject={subject!r} is outside of a prompt of {len(given)} tokens")
    front = _ids(before) if len(before) else given[:0]
    return Wording(torch.cat([front, given]), start + len(front), stop + len(front))


def read_target(prompt: str | Ids, target: str | int | Ids, tokenizer: Any | None) -> Tensor:
    """The target's ids `(m,)`; a space is put between a prompt and a target of words."""
    if isinstance(target, str):
        require_tokenizer(tokenizer)
        parted = target[:1].isspace() or (isinstance(prompt, str) and prompt[-1:].isspace())
        found = torch.tensor(encode(tokenizer, target if parted else f" {target}"))
    else:
        found = _ids([target] if isinstance(target, int) else target)
    if not len(found):
        raise ValueError(f"the target {target!r} is empty")
    return found


def rows_of(wordings: Sequence[Wording], target: Tensor | None = None) -> Rows:
    """Lines in one batch; of the target all but its last token is put behind each."""
    more = target[:-1] if target is not None else torch.zeros(0, dtype=torch.long)
    lines = [torch.cat([one.ids, more]) for one in wordings]
    length = max(len(line) for line in lines)
    inputs = torch.stack([torch.nn.functional.pad(line, (0, length - len(line))) for line in lines])
    subjects = torch.tensor([one.stop - 1 for one in wordings])
    return Rows(inputs, subjects, torch.tensor([len(one.ids) - 1 for one in wordings]))


def target_logs(logits: Tensor, rows: Rows, target: Tensor) -> Tensor:
    """Log-probability of each of the target's tokens in each line, `(rows, m)`, in nats."""
    places = rows.ends[:, None] + torch.arange(len(target))
    at = torch.arange(len(rows))[:, None]
    asked = logits[at.to(logits.device), places.to(logits.device)].float().log_softmax(-1)
    wanted = target.to(logits.device).expand(len(rows), -1)
    return asked.gather(-1, wanted[..., None])[..., 0]


def _encoded(tokenizer: Any, text: str, start: int, stop: int) -> tuple[list[int], int, int]:
    """(ids, first and past-the-last token of the characters from start to stop)"""
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        inside = [
            n
            for n, (a, b) in enumerate(found["offset_mapping"])
            if b > start and a < stop and b > a
        ]
        return list(found["input_ids"]), inside[0], inside[-1] + 1
    head, through = text[:start].rstrip(), text[:stop]
    return encode(tokenizer, text), len(encode(tokenizer, head)), len(
        encode(tokenizer, through)
    )  # fmt: skip


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without special tokens."""
    if callable(tokenizer):
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer.encode(text))


def _opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text."""
    if not callable(tokenizer):
        return []
    plain, full = encode(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if plain and full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def require_tokenizer(tokenizer: Any | None) -> None:
    """Raises ValueError where there is none."""
    if tokenizer is None:
        raise ValueError("text was given without a tokenizer: pass tokenizer=, or token ids")


def _ids(given: Ids) -> Tensor:
    found = torch.as_tensor(given).detach().cpu().long()
    if found.dim() == 2 and len(found) == 1:
        found = found[0]
    if found.dim() != 1:
        raise ValueError(f"token ids of shape {tuple(found.shape)}: expected one line, (n,)")
    return found


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
