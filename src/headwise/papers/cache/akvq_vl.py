"""Two bits for most of a long visual cache, more for the tokens that attention is about.

The caches of models that read images are long, and two bits a number lose too much. The paper
spends bits where attention is: in the first layers on the text, which is looked at far more than
the image patches; in later layers on pivot tokens, the few that massive attention falls on, which
stay exact. Outlier channels, which would stretch every range, are spread over all channels by a
Walsh-Hadamard rotation of keys and queries, which leaves scores as they are; values are rotated
too, and what is averaged from them is rotated back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from headwise.compress import Coding
from headwise.compress.cache.hadamard import rotate
from headwise.compress.cache.packing import dequantise, quantise
from headwise.papers import Measured, Picture, at_most, claim, paper, picture, within
from headwise.train import seeded

SEEDS = (0, 1, 2)
GROUP, PIVOTS = 64, 2


@paper(
    title="AKVQ-VL: Attention-Aware KV Cache Adaptive 2-Bit Quantization for Vision-Language "
    "Models",
    source="arXiv 2501.15021",
    year=2025,
    modality="multimodal",
    plain="A cache of 2 bits in which text tokens of the first layers have more, pivot tokens of "
    "later layers stay exact, and a rotation spreads outlier channels.",
    equation=r"Q K^{\top} = (Q H)(K H)^{\top}, \quad "
    r"\hat{x} = s \, \mathrm{round}((x - x_{\min}) / s) + x_{\min}",
    parts=("Quantised", "Coding"),
    reported="Accuracy of 2 bits as that of 16 or better on 12 tasks; 2.1 times less peak memory, "
    "3.3 times larger batches, 2.5 times the throughput.",
    unsure="Where the first layers end and how many bits text has there was not established; here "
    "it is 4 bits for text.",
    taxonomy=("beyond/cache", "beyond/compression"),
    use="""
import torch
from headwise.papers.cache.akvq_vl import Akvq

keys, values = torch.randn(2, 4, 256, 64)
mass = torch.rand(4, 256)  # what each token received
store = Akvq(keys, values, mass=mass)
print(store.nbytes(), keys.nbytes + values.nbytes)
""",
)
class Akvq:
    """A layer's cache, `(heads, n, d)`. `text`: `(n,)`, True where a token is text: a first layer,
    in which text has 4 bits. Otherwise `mass` `(heads, n)` says which `pivots` of every group of
    64 tokens stay exact."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        mass: Tensor | None = None,
        text: Tensor | None = None,
        pivots: int = PIVOTS,
        rotated: bool = True,
    ) -> None:
        self._at, self._stores = [], []
        every = torch.ones(keys.shape[1], dtype=torch.bool)
        for part, bits in ((every, 2),) if text is None else ((text, 4), (~text, 2)):
            exact = 0 if text is not None or mass is None else pivots
            coding = Coding(bits, bits, GROUP, 0, exact, rotated, keys="token")
            store = coding.make(keys[:, part], values[:, part])
            store.settle(mass)
            self._at.append(part.nonzero()[:, 0])
            self._stores.append(store)

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values as they are attended."""
        both = [store.whole() for store in self._stores]
        order = torch.cat(self._at).argsort()
        keys, values = (torch.cat(side, 1)[:, order] for side in zip(*both, strict=True))
        return keys, values

    def nbytes(self) -> int:
        return sum(store.nbytes() for store in self._stores)


def attended(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return torch.softmax(queries @ keys.mT * queries.shape[-1] ** -0.5, -1) @ values


@cache
def planted(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values of 4 heads and 512 tokens of 64, and which are pivots: 8 tokens far
    from the others in a direction that queries ask for, so that half of the attention is theirs."""
    with seeded(seed):
        queries, keys, values = torch.randn(3, 4, 512, 64)
        pivots = torch.zeros(4, 512, dtype=torch.bool)
        toward = torch.nn.functional.normalize(torch.randn(4, 1, 64), dim=-1)
        for head in range(4):
            at = torch.randperm(512 // GROUP)[:8] * GROUP + torch.randint(GROUP, (8,))
            pivots[head, at] = True
        queries = queries + 8 * toward
        keys = keys + pivots[..., None] * 4.5 * toward
    return queries, keys, values, pivots


def received(queries: Tensor, keys: Tensor) -> Tensor:
    return torch.softmax(queries @ keys.mT * queries.shape[-1] ** -0.5, -1).sum(1)


def error(store: Akvq, queries: Tensor, keys: Tensor, values: Tensor) -> float:
    want = attended(queries, keys, values)
    return float((attended(queries, *store.read()) - want).norm() / want.norm())


def both_turned(queries: Tensor, keys: Tensor) -> Tensor:
    return rotate(queries) @ rotate(keys).mT


def keys_turned(queries: Tensor, keys: Tensor) -> Tensor:
    """The control: queries stay."""
    return queries @ rotate(keys).mT


@claim(control=keys_turned, subject=both_turned, unit="largest relative difference", seeds=SEEDS)
def scores_stay_under_the_rotation(scores: Callable[..., Tensor], seed: int) -> Measured:
    """Rotated queries and keys have the scores that they had, to 1e-5."""
    queries, keys, *_ = planted(seed)
    want = queries @ keys.mT
    return at_most((scores(queries, keys) - want).abs().max() / want.abs().max(), 1e-5)


def turned(keys: Tensor) -> Tensor:
    return rotate(dequantise(quantise(rotate(keys), 2)))


def unturned(keys: Tensor) -> Tensor:
    """The control: ranges of the channels as they are."""
    return dequantise(quantise(keys, 2))


@claim(control=unturned, subject=turned, unit="error without rotation", seeds=SEEDS)
def outlier_channels_cost_less(code: Callable[[Tensor], Tensor], seed: int) -> Measured:
    """Keys of 128 channels, four of them 20 times as large, in 2 bits by token: the rotation takes
    the error to half or less."""
    with seeded(seed):
        keys = torch.randn(256, 128)
        keys[:, torch.randperm(128)[:4]] *= 20
    plain = float((unturned(keys) - keys).norm())
    return at_most(float((code(keys) - keys).norm()) / plain, 0.5)


def by_attention(queries: Tensor, keys: Tensor, seed: int) -> Tensor:
    return received(queries, keys)


def by_chance(queries: Tensor, keys: Tensor, seed: int) -> Tensor:
    """The control: as many tokens, any."""
    return torch.rand(keys.shape[:2], generator=torch.Generator().manual_seed(seed))


@claim(control=by_chance, subject=by_attention, unit="error of tokens by chance", seeds=SEEDS)
def pivot_tokens_are_worth_their_bits(worth: Callable[..., Tensor], seed: int) -> Measured:
    """With massive attention on a few tokens, keeping those exact leaves at most 0.7 of the error
    that as many exact tokens leave where they are drawn: at equal bytes."""
    queries, keys, values, _ = planted(seed)
    drawn = by_chance(queries, keys, 1000 + seed)
    rest = [
        error(Akvq(keys, values, mass), queries, keys, values)
        for mass in (worth(queries, keys, seed), drawn)
    ]
    return at_most(rest[0] / rest[1], 0.7, exact_pivots=rest[0], by_chance=rest[1])


def text_first(is_text: Tensor) -> Tensor:
    return is_text


def image_first(is_text: Tensor) -> Tensor:
    """The control: as many image tokens have the 4 bits."""
    count = int(is_text.sum())
    other = torch.zeros_like(is_text)
    other[(~is_text).nonzero()[:count, 0]] = True
    return other


@claim(control=image_first, subject=text_first, unit="error of 2 bits", seeds=SEEDS)
def text_is_worth_more_in_the_first_layers(give: Callable[[Tensor], Tensor], seed: int) -> Measured:
    """Where text, an eighth of the tokens, gets most of the attention, 4 bits for it leave at most
    0.7 of the error of 2 bits for all."""
    with seeded(seed):
        queries, keys, values = torch.randn(3, 4, 512, 64)
        is_text = torch.zeros(512, dtype=torch.bool)
        is_text[torch.randperm(512)[:64]] = True
        toward = torch.nn.functional.normalize(torch.randn(4, 1, 64), dim=-1)
    queries = queries + 8 * toward
    keys = keys + is_text[:, None] * 4 * toward
    found = error(Akvq(keys, values, text=give(is_text)), queries, keys, values)
    return at_most(found / error(Akvq(keys, values), queries, keys, values), 0.7)


def rounded_only(keys: Tensor, values: Tensor, mass: Tensor) -> int:
    """The control: numbers are rounded to 2 bits and held as they were."""
    return keys.nbytes + values.nbytes


def packed(keys: Tensor, values: Tensor, mass: Tensor) -> int:
    return Akvq(keys, values, mass).nbytes()


@claim(control=rounded_only, subject=packed, unit="bits of a number")
def the_bytes_are_gone(held: Callable[..., int], seed: int) -> Measured:
    """A further number takes 2 bits, half a bit for the ranges of 64, and a bit for 2 of 64 tokens
    in full precision: 3.5 bits, counted in the tensors, within a tenth."""
    made = torch.Generator().manual_seed(seed)
    sizes = []
    for n in (4096, 8192):
        keys, values = torch.randn(2, 2, n, 64, generator=made)
        sizes.append(held(keys, values, torch.rand(2, n, generator=made)))
    bits = 8 * (sizes[1] - sizes[0]) / (2 * 2 * 4096 * 64)
    return within(bits, 2 + 0.5 + 32 * PIVOTS / GROUP, 0.1)


@picture
def error_by_exact_tokens() -> Picture:
    """Error of the heads' outputs by how many tokens of 64 stay exact."""
    queries, keys, values, _ = planted(0)
    counts = [0, 1, 2, 4, 8]
    lines = {}
    for name, worth in (("most attended (AKVQ-VL)", by_attention), ("drawn (control)", by_chance)):
        mass = worth(queries, keys, 1)
        lines[name] = (
            counts,
            [error(Akvq(keys, values, mass, pivots=n), queries, keys, values) for n in counts],
        )
    return Picture(
        title="A cache of 2 bits in which some tokens stay exact: error by which these are",
        x="exact tokens of every 64",
        y="relative error of the heads' outputs",
        lines=lines,
    )
