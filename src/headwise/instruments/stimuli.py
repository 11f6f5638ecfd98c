"""What models are shown: the given samples in batches, repeated random tokens, needles."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headwise.instruments.batch import Batch, Needle, Repeat
from headwise.instruments.inputs import Sample, digest, token_inputs
from headwise.instruments.positions import position_limit
from headwise.instruments.tokens import Tokens
from headwise.models import ModelView

__all__ = ["HAYSTACK", "NEEDLE", "NEEDLES", "PERIOD", "REPEATS", "Stimuli"]

PERIOD = 64
"""Tokens of a random sequence, which stands twice; fewer in a model with fewer positions."""

REPEATS = 4
"""Random sequences, over which the spread is taken."""

NEEDLE = 16
"""Tokens of a needle: the first is the cue, the others are to be copied."""

HAYSTACK = 256
"""Tokens of text around a needle, fewer if the text is short."""

NEEDLES = 4
"""Needles, each at another depth of other text."""

_SHORTEST = 8  # tokens below which a needle says nothing
_SHORTEST_PERIOD = 3  # with two, induction and previous token are the same place
_TOKEN_INPUTS = {"input_ids", "attention_mask", "decoder_input_ids", "token_type_ids"}


class Stimuli:
    """Makes batches for a model, all from one seed."""

    def __init__(self, view: ModelView, words: Tokens, seed: int) -> None:
        self.view = view
        self.words = words
        self.seed = seed
        self.model: nn.Module = view.model

    # -- the given input ---------------------------------------------------------------------

    def text(self, samples: Sequence[Sample], batch_size: int) -> Iterator[Batch]:
        """The given samples. Those of equal shape run together, so that none is padded here;
        what the user padded stays so."""
        together: list[Sample] = []
        done = 0
        for sample in [*samples, None]:
            fits = sample is not None and together and _shape(sample) == _shape(together[0])
            if together and not (fits and len(together) < batch_size):
                yield self._batch("text", together, done)
                done += len(together)
                together = []
            if sample is not None:
                together.append(sample)

    def _batch(self, stimulus: str, samples: Sequence[Sample], number: int, **more: Any) -> Batch:
        first = samples[0].inputs
        inputs = {
            key: torch.cat([sample.inputs[key] for sample in samples]) if value.dim() else value
            for key, value in first.items()
        }
        ids: dict[str, Tensor] = {}
        valid: dict[str, Tensor] = {}
        for name, mask, stack in (
            ("input_ids", "attention_mask", self._reads()),
            ("decoder_input_ids", "decoder_attention_mask", "decoder"),
        ):
            if stack in self.view.stacks:
                if name in inputs:
                    ids[stack] = inputs[name]
                if mask in inputs and inputs[mask].dim() == 2 and not bool(inputs[mask].all()):
                    valid[stack] = inputs[mask].bool()
        marks = {stack: self.words.delimiters(found) for stack, found in ids.items()}
        labels = {}
        if stimulus == "text" and number == 0:
            labels = {stack: self.words.texts(found[0].tolist()) for stack, found in ids.items()}
        return Batch(
            stimulus=stimulus,
            names=tuple(sample.name for sample in samples),
            inputs=inputs,
            digests=tuple(digest(sample.inputs).hex() for sample in samples),
            number=number,
            ids=ids,
            valid=valid,
            delimiters={stack: found for stack, found in marks.items() if found is not None},
            labels=labels,
            **more,
        )

    def _reads(self) -> str:
        """The stack that `input_ids` go to."""
        stacks = self.view.stacks
        return next((s for s in ("text", "encoder", "decoder") if s in stacks), stacks[-1])

    # -- made for the purpose ----------------------------------------------------------------

    def takes_tokens(self, samples: Sequence[Sample]) -> bool:
        """Whether token ids alone make the model run, by what it was given."""
        return all("input_ids" in s.inputs and set(s.inputs) <= _TOKEN_INPUTS for s in samples)

    def repeats(self, samples: Sequence[Sample]) -> Iterator[Batch]:
        """Random sequences that stand twice, behind what the tokenizer puts before a text; none
        for a model too small for them."""
        prefix, suffix = self._around(samples)
        ordinary = self.words.ordinary(self._vocabulary())
        limit = position_limit(self.model)
        room = len(ordinary) if limit is None else (limit - len(prefix) - len(suffix)) // 2
        period = min(PERIOD, room, len(ordinary))
        if period < _SHORTEST_PERIOD:
            return
        made = []
        for number in range(REPEATS):
            random = torch.Generator().manual_seed(self.seed * 1000 + number)
            once = ordinary[torch.randperm(len(ordinary), generator=random)[:period]].tolist()
            ids = torch.tensor([prefix + once + once + suffix])
            made.append(Sample(f"random tokens {number + 1}", token_inputs(self.model, ids)))
        repeat = {self._reads(): Repeat(len(prefix), period)}
        if "decoder_input_ids" in made[0].inputs:
            repeat["decoder"] = Repeat(len(prefix) + 1, period)  # behind the start token
        yield self._batch("repeat", made, 0, repeat=repeat)

    def needles(self, samples: Sequence[Sample], contents: Sequence[list[int]]) -> Iterator[Batch]:
        """Needles in the user's own text, all of the same length, one batch; none for a text
        that is too short, or a model that does not read left to right."""
        if not self.view.causal or len(self.view.stacks) != 1:
            return
        prefix, _ = self._around(samples)
        limit = position_limit(self.model)
        pool = [content for content in contents if len(content) >= 6 * _SHORTEST]
        if not pool:
            return
        room = min(min(len(content) for content in pool), HAYSTACK + NEEDLE)
        if limit is not None:
            room = min(room, limit - len(prefix) - NEEDLE)
        needle = min(NEEDLE, room // 4)
        hay = room - needle
        if needle < _SHORTEST or hay < 2 * _SHORTEST:
            return
        made, starts = [], []
        random = torch.Generator().manual_seed(self.seed)
        for number in range(NEEDLES):
            content = pool[number % len(pool)]
            # the haystack is one stretch of the text, the needle another that follows it
            spare = len(content) - hay - needle
            at = int(torch.randint(0, spare + 1, (), generator=random)) if spare else 0
            around = content[at : at + hay]
            hidden = content[at + hay : at + hay + needle]
            depth = int(hay * (number + 0.5) / NEEDLES)
            ids = prefix + around[:depth] + hidden + around[depth:] + hidden
            inputs = token_inputs(self.model, torch.tensor([ids]))
            made.append(Sample(f"needle {number + 1}", inputs))
            starts.append(len(prefix) + depth)
        found = Needle(torch.tensor(starts), needle, len(prefix) + hay + needle)
        yield self._batch("needle", made, 0, needle=found)

    def _around(self, samples: Sequence[Sample]) -> tuple[list[int], list[int]]:
        """What stands before and after a text: by the tokenizer; without one, the special token
        that all samples begin with."""
        if self.words.tokenizer is not None:
            return self.words.around
        firsts = {int(sample.inputs["input_ids"][0, 0]) for sample in samples}
        return (list(firsts) if len(firsts) == 1 and firsts <= self.words.special else []), []

    def _vocabulary(self) -> int:
        embedding = self.view.embedding
        if embedding is not None:
            return embedding.shape[0]
        return int(getattr(self.words.config, "vocab_size", 0) or 0)


def _shape(sample: Sample) -> dict[str, Any]:
    return {key: (tuple(value.shape), value.dtype) for key, value in sample.inputs.items()}
