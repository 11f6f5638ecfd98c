"""Heads that look at what is near need no cache of everything.

Attention costs memory because any token may look at any other. Many heads never do: their
attention stays with the newest tokens. RecurFormer measures for each head which share of its
attention does (the recency ratio), puts a small Mamba block of the same width in the place of the
heads with the highest ratios, keeps all other weights and trains on. Heads that look far keep
their keys and values, so nothing that was said is evicted; the others hold a state that does not
grow.

The model here has two layers and recalls the values of keys. Its first layer, of four heads that
see three tokens while they learn, joins each value with the key before it; the second layer looks
for the key that is asked. Then the window is taken away, and the ratios have to say which is which.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headwise.compress import most_recent, recency_ratio, replace_heads
from headwise.maps import Causal, Window
from headwise.models import observe, view
from headwise.models.backbones import Decoder
from headwise.papers import Measured, Picture, at_most, claim, paper, picture, within
from headwise.parts import Attention, Rotary, State
from headwise.tasks import MultiQueryRecall
from headwise.train import evaluate, fit, seeded

Head = tuple[int, int]
Choose = Callable[[nn.Module, Tensor], list[Head]]
HEADS, WINDOW, STATES = 4, 4, 4


@paper(
    title="RecurFormer: Not All Transformer Heads Need Self-Attention",
    source="arXiv 2410.12850",
    year=2024,
    modality="text",
    plain="Heads whose attention stays with the newest tokens become a recurrence with a state of "
    "fixed size.",
    equation=r"r_h = \frac{\sum_i \sum_{i-w<j\le i} A^h_{ij}}{\sum_i \sum_{0<j\le i} A^h_{ij}}",
    parts=("recency_ratio", "replace_heads", "SelectiveSSM"),
    reported="Qwen2 and Llama 2 with most heads replaced match the originals after continual "
    "training, with a fraction of the cache (from memory).",
    unsure="The window and the normaliser of the ratio: here the first token, a sink, is left out "
    "of both sums. The share is of all heads of the model, not of each layer.",
    taxonomy=("beyond/state", "beyond/cache"),
    use="""
from headwise.papers.recurrent.recurformer import examples, recurformer, trained

model = recurformer(trained(0), examples())  # half of the heads; then train it on
""",
)
def recurformer(model: nn.Module, inputs: Tensor, share: float = 0.5) -> nn.Module:
    """A copy in which the share of heads with the highest recency ratio is a recurrence."""
    return replaced(model, by_recency(model, inputs, share))


def replaced(model: nn.Module, heads: list[Head]) -> nn.Module:
    made = copy.deepcopy(model)
    with seeded(5):
        replace_heads(made, heads, states=STATES)
    return made


def by_recency(model: nn.Module, inputs: Tensor, share: float = 0.5) -> list[Head]:
    return most_recent(recency_ratio(model, inputs, WINDOW), share)


def by_distance(model: nn.Module, inputs: Tensor, share: float = 0.5) -> list[Head]:
    """The control: the lowest ratios."""
    return most_recent(-recency_ratio(model, inputs, WINDOW), share)


def by_sharpness(model: nn.Module, inputs: Tensor, share: float = 0.5) -> list[Head]:
    """The control: heads with the sharpest maps, near or far."""
    found: list[Tensor] = []
    with torch.no_grad(), observe(view(model), lambda r: found.append(r.map.max().mean((0, 2)))):
        model(inputs)
    return most_recent(torch.stack(found), share)


def lowest_ratio(model: nn.Module, inputs: Tensor, share: float = 0.5) -> nn.Module:
    """The control: as many heads, those that look far."""
    return replaced(model, by_distance(model, inputs, share))


def silenced(model: nn.Module, inputs: Tensor, share: float = 0.5) -> nn.Module:
    """The control: the same heads write nothing any more, and are still there."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for layer, head in by_recency(model, inputs, share):
            view(made).attentions[layer].output_weight()[head] = 0
    return made


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1, 2)


def task() -> MultiQueryRecall:
    return MultiQueryRecall(pairs=6, length=40, vocabulary=40, power=1.0)


def examples() -> Tensor:
    return task().batch(0, 32, "valid").inputs["input_ids"]


@cache
def trained(seed: int) -> Decoder:
    """120 steps with a window of 3 in the first layer, 60 more without it."""
    near = Window(3)
    with seeded(seed):
        model: Any = Decoder(
            40,
            64,
            2,
            lambda layer: Attention(
                64, HEADS, position=Rotary(), pattern=None if layer else near, causal=True
            ),
            lambda layer: None,
            tied=False,
        )
    fit(model, task(), steps=120, size=32, rate=5e-3, seed=seed)
    model.stack.mixers[0].pattern = Causal()
    fit(model, task(), steps=60, size=32, rate=2e-3, seed=seed + 10)
    done: Decoder = model.eval()
    return done


@claim(subject=by_recency, control=by_sharpness, unit="share", seeds=SEEDS, quick=False)
def the_ratio_tells_near_from_far(choose: Choose, seed: int) -> Measured:
    """The half of the heads with the highest ratios are exactly the four that learned in a
    window; the sharpest half (control) are others."""
    chosen = choose(trained(seed), examples())
    return within(sum(layer == 0 for layer, _ in chosen) / HEADS, 1.0, 0.0)


@claim(control=lowest_ratio, unit="accuracy lost", seeds=SEEDS, quick=False)
def near_heads_need_no_attention(make: Any, seed: int) -> Measured:
    """After 90 more steps the model with half of its heads replaced recalls as well as before,
    to 0.05; with the other half replaced (control) it does not recall."""
    before = evaluate(trained(seed), task(), 4, 64)["accuracy"]
    model = make(trained(seed), examples())
    cut = evaluate(model, task(), 4, 64)["accuracy"]
    fit(model, task(), steps=90, size=32, rate=3e-3, seed=seed + 20)
    after = evaluate(model, task(), 4, 64)["accuracy"]
    return at_most(before - after, 0.05, before=before, untrained=cut, chance=task().chance)


@claim(control=silenced, unit="bytes beside half of the cache", quick=False)
def half_of_the_cache_is_gone(make: Any, seed: int) -> Measured:
    """Beside half of what all heads cache, decoding holds the recurrence's state and the last
    inputs of its convolution, 4 x 64 + 3 x 64 numbers, after 256 tokens as after 1024. Heads that
    write nothing (control) are cached all the same."""
    model, beside = make(trained(seed), examples()), []
    for n in (256, 1024):
        held = []
        for one in (model, trained(seed)):
            states = one.empty_states()
            with torch.no_grad():
                one(torch.zeros(1, n, dtype=torch.long), states=states)
            held.append(sum(state.nbytes() for state in states))
        beside.append(float(held[0] - held[1] // 2))
    constant = 4 * (STATES + 3) * 64
    return within(max(beside), constant, 0.0, after_256=beside[0], after_1024=beside[1])


def forgetful(model: nn.Module, inputs: Tensor) -> Any:
    """The control: the recurrence begins anew with every token."""
    made: Any = recurformer(model, inputs)
    for mixer in made.stack.mixers:
        if hasattr(mixer, "near"):
            whole = mixer.near.forward
            mixer.near.forward = lambda x, *args, whole=whole: whole(x, *args[:-1], State())
    return made


@claim(control=forgetful, unit="largest difference of logits", quick=False)
def decodes_as_it_trains(make: Any, seed: int) -> Measured:
    """Token by token, with keys of some heads and states of others, gives what one pass does."""
    model, given = make(trained(seed), examples()), examples()[:4]
    states = model.empty_states()
    with torch.no_grad():
        steps = [model(given[:, i : i + 1], states=states) for i in range(given.shape[1])]
        whole = recurformer(trained(seed), examples())(given)
    return at_most((torch.cat(steps, 1) - whole).abs().max(), 1e-4)


@picture
def where_heads_look() -> Picture:
    """The recency ratio of each head."""
    ratios = recency_ratio(trained(0), examples(), WINDOW)
    heads = list(range(HEADS))
    return Picture(
        title="Share of attention on the newest four tokens, the first token not counted",
        x="head",
        y="recency ratio, share of a row",
        lines={f"layer {n + 1}": (heads, row.tolist()) for n, row in enumerate(ratios)},
    )
