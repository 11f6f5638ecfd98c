"""What goes through a model at once, and what the instruments may know of it."""

from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Batch", "Needle", "Repeat"]


@dataclass(frozen=True)
class Repeat:
    """A random sequence that stands twice: the first time from `start`, then from
    `start + period`."""

    start: int
    period: int


@dataclass(frozen=True)
class Needle:
    """A span of `length` tokens that stands at `start` `(batch,)` and again from `again` on."""

    start: Tensor
    length: int
    again: int


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples that run together.

    stimulus: "text", "repeat" or "needle". names: one a sample. inputs: what the model is called
    with, every tensor with the samples in front. By stack: ids `(batch, n)` token ids; valid
    `(batch, n)` True where a token is real, absent where all are; delimiters `(batch, n)` True at
    punctuation, line ends and special tokens; labels: the tokens of the first sample as text.
    digests: a hash of each sample's inputs. number: of the first sample among those of its
    stimulus.
    """

    stimulus: str
    names: tuple[str, ...]
    inputs: dict[str, Tensor]
    digests: tuple[str, ...]
    number: int = 0
    ids: dict[str, Tensor] = field(default_factory=dict)
    valid: dict[str, Tensor] = field(default_factory=dict)
    delimiters: dict[str, Tensor] = field(default_factory=dict)
    labels: dict[str, list[str]] = field(default_factory=dict)
    repeat: dict[str, Repeat] = field(default_factory=dict)
    needle: Needle | None = None

    def __len__(self) -> int:
        return len(self.names)
