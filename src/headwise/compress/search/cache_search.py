"""The search for a key-value cache within a budget of bytes: which tokens, how many bits, where.

The first half of each text is the prompt, the second is read in short pieces with the cache in
force, each token given, so that what was evicted is missed by all that comes after. Bytes are those
that the cache holds at the end, beside those that a full one would.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from headwise.compress.search.asking import Text
from headwise.compress.search.cache_settings import (
    POLICIES,
    CacheSettings,
    bytes_of,
    cache_of,
    floors_of,
    layered,
    scaled,
    settings_of,
)
from headwise.compress.search.cached_reading import Remembered, full_bytes, read_with_cache
from headwise.compress.search.curve import Curve, Point
from headwise.compress.search.kept import Kept
from headwise.compress.search.quality import Quality, measure_quality
from headwise.compress.search.spread import spread
from headwise.compress.search.targets import Keep, Limit, UnreachableError
from headwise.compress.structure.costs import cost
from headwise.instruments.examples import Examples
from headwise.instruments.run import evaluating
from headwise.models import UnsupportedModelError, view
from headwise.models.identity import weights_hash

BITS, _TRIES = (None, 8, 4), 4
LEVELS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the even share: what a layer may get instead."""
NUMBERS = 2**28
"""Logits of one batch of text: those of the prompt are not computed."""
TOKENS = 1024
"""Of a window: in a short one the newest tokens, which always stay, are most of the cache."""
STEPS = (1.0, 0.75, 0.5, 0.35, 0.25, 0.175, 0.125, 0.0875, 0.0625)
"""Shares at which the curve is measured on the way down."""


def search_cache(
    model: nn.Module,
    target: Keep,
    text: Text,
    limit: Limit | None = None,
    *,
    tokenizer: Any | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    tell: Callable[[str], Any] | None = None,
    step: Callable[[int, int, str], Any] | None = None,
) -> Curve:
    """The cache that costs least quality within a share of the bytes. The model stays as it is.

    In turn, each time at the bytes asked for: policies and bits, all of them tried; the spread over
    layers and heads (even, a pyramid, by the scores, and by what each layer was measured to need);
    then the best of them at every share on the way down.
    Choices are made on one half of the text, the curve is measured on the other. Where the bound
    on quality does not hold at the share that was asked for, the smallest share is chosen where it
    does. Raises UnreachableError for a share under that of the sinks and the window,
    UnsupportedModelError for a model that has no such cache.
    """
    search = _CacheSearch(model, target, limit, text, tell, step)
    asked = {
        "model": weights_hash(model),
        "keep": str(target),
        "quality": None if limit is None else str(limit),
        "inputs": text.digests,
    }
    kept = Kept(out, asked, resume)
    curve = kept.curve()
    if curve is not None:
        search.curve = curve
        curve.about.setdefault("needs", [])
    with evaluating(model):
        while not search.curve.about.get("done"):
            search.next()
            kept.write(search.curve, model, tokenizer)
    kept.finish(search.curve)
    search.curve.model = model
    return search.curve


class _CacheSearch:
    """Goes on from what the curve holds: settings tried so far, their losses, the points."""

    def __init__(
        self,
        model: nn.Module,
        target: Keep,
        limit: Limit | None,
        text: Text,
        tell: Callable[[str], Any] | None,
        step: Callable[[int, int, str], Any] | None = None,
    ) -> None:
        self.model, self.target, self.limit, self.text = model, target, limit, text
        self.tell, self.step = tell or (lambda words: 0), step or (lambda *how_far: 0)
        self._original, self._whole = Remembered(model), dict[int, int]()
        look = view(model)
        if look.unembedding is None or not look.causal or len(look.stacks) > 1:
            raise UnsupportedModelError(
                f"{type(model).__name__} is no causal language model of one stack: it has no cache "
                "to make smaller"
            )
        self.layers = len(look.layers)
        self.width = 8 * next(model.parameters()).element_size()  # bits of a number
        self.curve = Curve("kv", target.share, [])
        self.curve.original = {"kv": float(cost(model, text.tokens).cache_bytes_per_token)}
        self.curve.about |= {"tried": {}, "settings": [], "needs": []}
        self._few = text.few
        self.tell("measuring the smallest cache")
        allowed = [bits for bits in BITS if bits is None or bits < self.width]
        window, floors = floors_of(self._share, target.share, text.tokens, allowed)
        self.bits = [bits for bits, floor in floors.items() if floor <= target.share]
        self.usual = CacheSettings(window=window, sinks=4)
        if not self.bits:
            least, n = min(floors.values()), text.tokens
            raise UnreachableError(
                f"keep {target}: with nothing but sinks and window (4 + {window} of {n} tokens) "
                f"the cache holds kv={least:.3f}; ask for that, or for longer texts (tokens=)",
                least,
            )

    def next(self) -> None:
        """One more thing that is measured."""
        waiting = [s for s in self._candidates() if str(s) not in self._tried()]
        if waiting:
            settings, share = self._fitted(waiting[0], self.target.share)
            loss = self._measured(settings, self.text.calibration)[0].loss_change
            found = {"settings": settings.as_dict(), "loss": loss, "kv": share}
            self._tried()[str(waiting[0])] = found
            self._say(f"kv={share:.3f}, loss {loss:+.4f}, {settings}")
            return
        if self._measure_a_layer():
            return
        shares = [s for s in STEPS if s > self.target.share * 1.05] + [self.target.share]
        done = self.curve.about.setdefault("shares", [])
        if len(done) == len(shares):
            self._choose()
            return
        share = shares[len(done)]
        asked = None if share >= 1 else self._fitted(self._at(self._best(), share), share)[0]
        known = None if asked is None else asked.as_dict()
        if known is None or known not in self.curve.about["settings"]:  # else all tokens fit again
            self._point(asked)
        done.append(share)
        self.step(*self._progress(), "settings measured")

    def _progress(self) -> tuple[int, int]:
        """(what was measured, what will have been, about)"""
        about = self.curve.about
        done = sum(len(about.get(name, ())) for name in ("tried", "needs", "shares"))
        shares = sum(s > self.target.share * 1.05 for s in STEPS) + 1
        return done, max(done, len(self._first()) + 3 + self.layers + shares)

    def _say(self, words: str) -> None:
        self.tell("{} of about {}: ".format(*self._progress()) + words)
        self.step(*self._progress(), "settings measured")

    def _tried(self) -> dict[str, Any]:
        return cast(dict[str, Any], self.curve.about["tried"])

    def _at(self, settings: CacheSettings, share: float) -> CacheSettings:
        """The same in so many bytes, about."""
        tokens = min(1.0, share / bytes_of(settings.bits, self.width))
        return scaled(settings, tokens / settings.share)

    def _candidates(self) -> list[CacheSettings]:
        """What is tried next, in order; later stages build on the best of the earlier ones."""
        first = self._first()
        if any(str(s) not in self._tried() for s in first):
            return first
        about = self.curve.about
        if "base" not in about:
            best = self._best()
            if best.share >= 1:
                return first
            about["base"] = replace(best, shape="uniform", layers=()).as_dict()
        base = settings_of(about["base"])
        second = [replace(base, shape=shape) for shape in ("pyramid", "adaptive")]
        if len(about["needs"]) < self.layers:
            return first + second
        shares = spread(_levels(base), about["needs"], base.share)
        return [*first, *second, layered(base, shares)]

    def _first(self) -> list[CacheSettings]:
        found = []
        for bits in self.bits:
            for policy in POLICIES:
                asked = replace(self.usual, policy=policy, bits=bits)
                settings = self._at(asked, self.target.share)
                found.append(settings)
                if settings.share >= 1:
                    break  # all tokens stay: no policy is asked
        return found

    def _measure_a_layer(self) -> bool:
        """What the next layer needs: the loss with every share in it, all tokens in the others, on
        a few windows. False where none is left, or none is asked for."""
        about = self.curve.about
        if "base" not in about or len(about["needs"]) == self.layers:
            return False
        rows, row = about["needs"], []
        base, few = settings_of(about["base"]), self._few
        for level in _levels(base):
            shares = [level if layer == len(rows) else 1.0 for layer in range(self.layers)]
            same = bool(rows) and level >= 1  # with all tokens: the same in every layer
            rise = (
                rows[0][-1] if same else self._measured(layered(base, shares), few)[0].loss_change
            )
            row.append(rise)
        rows.append(row)
        self._say(f"what layer {len(rows) - 1} needs: loss {row[0]:+.4f} with the fewest")
        return True

    def _best(self) -> CacheSettings:
        within = [one for one in self._tried().values() if one["kv"] <= self.target.share]
        known = min(within or self._tried().values(), key=lambda one: one["loss"])
        return settings_of(known["settings"])

    def _fitted(self, settings: CacheSettings, share: float) -> tuple[CacheSettings, float]:
        """With so few tokens that the bytes measured are within the share, if that can be (a cache
        also holds positions, scales, a policy's notes, room for what comes); the share it came to.
        """
        found = self._share(settings)
        for _ in range(_TRIES):
            if found <= share:
                break
            settings = scaled(settings, 0.98 * share / found)
            found = self._share(settings)
        return settings, found

    def _share(self, settings: CacheSettings) -> float:
        """Bytes of the cache at the end of one example, of those of a full one."""
        ids = self.text.calibration[0].inputs["input_ids"][:1]
        with torch.no_grad(), cache_of(self.model, settings) as cache:
            read_with_cache(self.model, ids, cache, answers=False)
            held: int = cache.nbytes()
        return held / self._full(ids)

    def _full(self, ids: Tensor) -> int:
        if ids.shape[1] not in self._whole:
            self._whole[ids.shape[1]] = full_bytes(self.model, ids[:1])
        return len(ids) * self._whole[ids.shape[1]]

    def _measured(
        self, settings: CacheSettings, batches: Sequence[Examples]
    ) -> tuple[Quality, float]:
        """(quality, bytes of the cache at the end as a share of a full one's)"""
        held: list[float] = []

        def answers(model: nn.Module, batch: Examples) -> Tensor:
            with cache_of(model, settings) as cache:
                logits = read_with_cache(model, batch.inputs["input_ids"], cache)
                held.append(cache.nbytes() / self._full(batch.inputs["input_ids"]))
            return logits

        quality = measure_quality(self.model, self.model, batches, answers, self._original)
        return quality, sum(held) / len(held)

    def _point(self, settings: CacheSettings | None) -> None:
        """One more point of the curve; None: the model with its own cache."""
        began = time.perf_counter()
        if settings is None:
            original = self._original
            quality = measure_quality(
                self.model,
                self.model,
                self.text.held_out,
                lambda _, batch: original(batch),
                original,
            )
            share, words = 1.0, ""
        else:
            quality, share = self._measured(settings, self.text.held_out)
            words = str(settings)
        found = (quality.loss, quality.loss_change, quality.agreement, quality.kl)
        within = self.limit is None or self.limit.holds(*found)
        took = ((words,) if words else (), time.perf_counter() - began)
        self.curve.points.append(Point({"kv": share}, quality, *took, within))
        self.curve.about["settings"].append(None if settings is None else settings.as_dict())
        self.tell(f"kv={share:.3f}, loss {quality.loss_change:+.4f}, {words or 'the original'}")

    def _choose(self) -> None:
        """The smallest within the bound on quality."""
        inside = [n for n, point in enumerate(self.curve.points) if point.within]
        self.curve.chosen = min(inside, key=lambda n: self.curve.points[n].left["kv"], default=0)
        self.curve.cache = self.curve.about["settings"][self.curve.chosen]
        met = self.curve.met
        self.curve.about["done"] = "within the budget" if met else f"{self.limit} allows no less"


def _levels(base: CacheSettings) -> list[float]:
    return sorted({min(1.0, base.share * level) for level in LEVELS})
