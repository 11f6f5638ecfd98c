"""What goes in a round: priced first on a few windows, then, what may be picked, on all of them.

Greedy in the lazy way (Minoux 1978, Accelerated greedy algorithms): an old or rough price serves as
long as it says "not now"; whatever is picked was measured in the model as it is, on all of the
calibration text. Where the old prices are no higher than the new ones, which is so where each loss
makes the next one worse, the choice is the one that measuring everything leads to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headwise.compress.search.asking import Text
from headwise.compress.search.candidates import Candidate, candidates
from headwise.compress.search.prices import prices
from headwise.compress.search.rounds import pick
from headwise.compress.structure.channels import channel_scores
from headwise.instruments.examples import Examples
from headwise.models import ModelView, UnsupportedModelError

AHEAD = 1.5
"""What is measured anew at once: enough to save so many times of what is needed."""

Step = Callable[[int, int, str], object]
Tell = Callable[[str], object]


def pick_measured(
    given: Sequence[Candidate],
    estimates: Tensor,
    measure: Callable[[list[int]], Tensor],
    what: str,
    need: float,
    view: ModelView,
) -> tuple[list[Candidate], Tensor]:
    """(what `pick` takes, prices `(candidates,)`): `measure` was asked for all that are taken, and
    for what would be next."""
    number = {one: n for n, one in enumerate(given)}
    price, measured = estimates.clone(), set[int]()
    while True:
        chosen = pick(given, price, what, need, view)
        if all(number[one] in measured for one in chosen):
            return chosen, price
        ahead = [*chosen, *pick(given, price, what, AHEAD * need, view)]
        new = sorted({number[one] for one in ahead} - measured)
        price[new] = measure(new)
        measured.update(new)


def choose(
    view: ModelView,
    text: Text,
    kinds: Sequence[str],
    tokens: int,
    what: str,
    need: float,
    known: dict[str, float],
    names: Sequence[int],
    tell: Tell,
    step: Step,
) -> list[Candidate]:
    """What goes next. known: prices of earlier rounds by `key`, brought up to date; names: what the
    layers were called in the original. step: (done, all, what) of the passes."""
    scores = _channels(view, text, kinds, tell)
    given = candidates(view, kinds, tokens, scores)
    keys = keys_of(given, names)
    few, rough = text.few, not text.short

    def measured(numbers: list[int], batches: list[Examples], words: str) -> Tensor:
        done, total = 0, len(numbers) * len(batches)

        def one_more(count: int) -> None:
            nonlocal done
            done += count
            step(done, total, words)

        found = prices(view, batches, [given[n] for n in numbers], one_more)
        known.update((keys[n], price) for n, price in zip(numbers, found.tolist(), strict=True))
        return found

    new = [n for n in range(len(given)) if not rough or keys[n] not in known]
    tell(f"pricing {len(new)} of {len(given)} candidates" + (" roughly" if rough else ""))
    if new:
        measured(new, few if rough else text.calibration, "candidates priced")
    estimates = torch.tensor([known[key] for key in keys], dtype=torch.float64)
    if not rough:
        return pick(given, estimates, what, need, view)
    return pick_measured(
        given,
        estimates,
        lambda numbers: measured(numbers, text.calibration, "of the cheapest priced on all text"),
        what,
        need,
        view,
    )[0]


def keys_of(given: Sequence[Candidate], names: Sequence[int]) -> list[str]:
    """What to remember prices by: kind, layer of the original, place among those alike."""
    seen: dict[tuple[str, int], int] = {}
    found = []
    for one in given:
        kind = (one.kind, one.layer)
        seen[kind] = seen.get(kind, -1) + 1
        found.append(f"L{names[one.layer]} {one.kind} {seen[kind]}")
    return found


def forget(known: dict[str, float], chosen: Sequence[Candidate], names: Sequence[int]) -> None:
    """Prices in layers of which something was taken are no longer known."""
    gone = {f"L{names[one.layer]}" for one in chosen}
    for key in [key for key in known if key.partition(" ")[0] in gone]:
        del known[key]


def _channels(
    view: ModelView, text: Text, kinds: Sequence[str], tell: Tell
) -> dict[int, Tensor] | None:
    """Scores of the channels, None where they cannot go one by one: the rest still can."""
    if "channels" not in kinds:
        return None
    try:
        return channel_scores(view, text.given)
    except UnsupportedModelError as error:
        tell(f"channels stay: {error}")
        return None
