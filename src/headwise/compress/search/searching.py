"""`shrink`: from a budget to a smaller model, step by step along a measured curve."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from headwise.compress.search.asking import Text, read_text
from headwise.compress.search.candidates import (
    KINDS,
    Candidate,
    in_words,
    removable,
    sizes,
)
from headwise.compress.search.choosing import Step, Tell, choose, forget
from headwise.compress.search.curve import Curve, Point, summary
from headwise.compress.search.kept import Kept
from headwise.compress.search.points import point_of
from headwise.compress.search.rounds import recover, take_out
from headwise.compress.search.targets import Keep, Limit, UnreachableError
from headwise.compress.structure.costs import Cost, cost, length_of
from headwise.instruments.run import evaluating
from headwise.models import view
from headwise.models.identity import weights_hash

__all__ = ["shrink"]


def shrink(
    model: nn.Module,
    keep: Any,
    inputs: Any = None,
    *,
    quality: Limit | str | None = None,
    kinds: Sequence[str] = KINDS,
    rounds: int = 12,
    recover: bool = True,
    distil: float = 0.0,
    tokens: int | None = None,
    windows: int | None = None,
    batch_size: int = 8,
    repeats: int = 7,
    tokenizer: Any | None = None,
    processor: Any | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    tell: Tell | None = None,
    step: Step | None = None,
    seed: int = 0,
) -> Curve:
    """A smaller copy of a model within a budget, and the curve of how it came there.

        curve = shrink(model, {"params": 0.7}, text, tokenizer=tok, quality="loss<=+0.05")
        curve.model, curve.best

    keep: the share that may be left, as {"params": 0.7}, "time=0.6" (of a forward pass over one
    window, measured beside the original in turns) or "kv=0.25" (bytes of the key-value cache: the
    model stays, and `curve.cache` says which HeadCache to use; see `cache_search`).

    In each of about `rounds` rounds candidates are priced (the rise of the loss without each alone)
    on one half of the text: on a few windows those that are new or in layers that changed, on all
    of it those that may be picked (see `choosing`). The ones that cost least for what they save are
    taken out, tensors sliced; with `recover` the matrices behind are fitted to the original's
    outputs on that half (closed form); the model is measured on the other half. kinds: of what
    candidates are, from "heads" (groups that share a key-value head), "channels", "attention",
    "mlp" and "layers". quality: a bound, see `Limit`; a round that breaks it is tried again with
    half of its candidates, down to one, and the next ones take no more. distil: seconds of training
    on the original's answers at the end (0: none).

    inputs, tokens, windows, tokenizer, processor: as in `headwise.see`, cut into windows (8 of 256
    tokens unless told otherwise, of 1,024 for a cache); every other one is held out. out: a folder,
    in which curve.json and the model are kept after every round; with `resume` an interrupted
    search goes on there. tell: called with lines that say what is done; step: with (done, all,
    what) while it is.

    The model itself is left as it is. Raises UnreachableError, before anything is changed, for a
    budget under what these kinds can reach, with the smallest share that can be; ValueError for
    anything else that cannot be. Where the bound on quality ends the search earlier, the curve's
    `met` is False and its model the smallest within the bound.
    """
    target = Keep.read(keep)
    limit = None if quality is None else Limit.read(quality)
    if rounds < 1 or repeats < 1 or distil < 0:
        told = f"rounds={rounds}, repeats={repeats}, distil={distil}"
        raise ValueError(f"{told}: expected 1 or more, and no negative time")
    reading = (model, inputs, tokenizer, processor, tokens, windows, batch_size)
    if target.what == "kv":
        from headwise.compress.search.cache_search import NUMBERS, TOKENS, search_cache

        text = read_text(*reading, NUMBERS, TOKENS)
        return search_cache(
            model, target, text, limit, tokenizer=tokenizer, out=out, resume=resume, tell=tell,
            step=step,
        )  # fmt: skip
    text = read_text(*reading)
    search = _Search(
        model, target, limit, text, tuple(kinds), rounds, recover, repeats, seed, tell, step
    )
    kept = Kept(out, search.asked(distil), resume)
    curve = kept.curve()
    if curve is None:
        search.begin()
        kept.write(search.curve, search.current, tokenizer, search.curve.chosen)
    else:
        search.go_on(curve, kept.model(model))
    with evaluating(search.current):
        while not search.curve.about.get("done"):
            search.round()
            kept.write(search.curve, search.current, tokenizer, search.curve.chosen)
    if distil and not search.curve.about.get("distilled"):
        search.distil(distil)
        kept.write(search.curve, search.current, tokenizer, search.curve.chosen)
    kept.finish(search.curve)
    search.curve.model = search.current
    return search.curve


class _Search:
    """The state of one search: the original, the smallest model so far, and the curve."""

    def __init__(
        self,
        model: nn.Module,
        target: Keep,
        limit: Limit | None,
        text: Text,
        kinds: tuple[str, ...],
        rounds: int,
        recover: bool,
        repeats: int,
        seed: int,
        tell: Tell | None,
        step: Step | None,
    ) -> None:
        self.original, self.target, self.limit, self.text = model, target, limit, text
        self.kinds, self.rounds, self.recover, self.repeats = kinds, rounds, recover, repeats
        self.seed = seed
        self.tell = tell or (lambda words: None)
        self.step = step or (lambda done, total, words: None)
        self.current = model
        self.curve = Curve(target.what, target.share, [])
        self.first = cost(model, text.tokens)
        self.tokens = length_of(view(model), text.tokens)
        gone = removable(view(model), kinds, self.tokens)
        counted = self.first.parameters if target.what == "params" else self._work(self.first)
        reachable = 1 - gone[target.what != "params"] / counted
        if target.share < reachable:
            raise UnreachableError(
                f"keep {target}: taking out all of {', '.join(kinds)} that can go leaves "
                f"{target.what}={reachable:.3f}"
                + (", estimated by operations" if target.what == "time" else "")
                + "; ask for that or more, or allow other kinds",
                reachable,
            )

    def asked(self, distil: float) -> dict[str, Any]:
        """What makes this search this one: with anything else an interrupted one is another."""
        return {
            "model": weights_hash(self.original),
            "keep": str(self.target),
            "quality": None if self.limit is None else str(self.limit),
            "kinds": list(self.kinds),
            "rounds": self.rounds,
            "recover": self.recover,
            "distil": distil,
            "inputs": self.text.digests,
            "tokens": self.text.tokens,
            "seed": self.seed,
        }

    def begin(self) -> None:
        """The original is the first point; from here on a copy is worked on."""
        self.tell("measuring the original")
        torch.manual_seed(self.seed)
        self.current = copy.deepcopy(self.original).eval()
        self.curve.original = {
            "params": float(self.first.parameters),
            "bytes": float(self.first.bytes),
            "flops": float(self.first.flops),
            "kv": float(self.first.cache_bytes_per_token),
        }
        self.curve.about["layers"] = [
            {"layer": number, "heads": heads, "channels": channels}
            for number, (heads, channels) in enumerate(sizes(view(self.original)))
        ]
        self.curve.about["numbers"] = list(range(len(self.curve.about["layers"])))
        point = self._measured(self.original, (), 0.0)
        self.curve.points.append(point)
        if point.left[self.target.what] <= self.target.share:
            self.curve.about["done"] = "within the budget"

    def go_on(self, curve: Curve, model: nn.Module) -> None:
        """With what an interrupted search left."""
        self.curve, self.current = curve, model.eval()

    def round(self) -> None:
        """Price, take out, fit, measure; one more point, or the end."""
        began = time.perf_counter()
        what, number = self.target.what, len(self.curve.points)
        known, names = self.curve.about.setdefault("prices", {}), self.curve.about["numbers"]
        self.tell(f"round {number} of about {number - 1 + self._left()}")
        chosen = choose(
            view(self.current), self.text, self.kinds, self.tokens, what, self._need(), known,
            names, self.tell, self.step,
        )  # fmt: skip
        if not chosen:
            self._end("nothing is left that can go")
            return
        before, asked = self.current, len(chosen)
        while chosen:
            self.current = copy.deepcopy(before)
            self._take(chosen)
            words = in_words(chosen)
            point = self._measured(self.current, words, time.perf_counter() - began)
            self.curve.points.append(point)
            self.tell(
                f"round {number}: {what}={point.left[what]:.3f}, loss "
                f"{point.quality.loss_change:+.4f}, without {summary(words)}; "
                f"{point.seconds:.0f} s"
            )
            if point.within:
                self.curve.chosen = len(self.curve.points) - 1
                forget(known, chosen, names)
                # what was too much in this round will be in the next
                about = self.curve.about
                about["pace"] = about.get("pace", 1.0) * len(chosen) / asked
                self._count(chosen)
                if point.left[what] <= self.target.share:
                    self._end("within the budget")
                return
            self.current = before
            chosen = chosen[: len(chosen) // 2]
        self._end(f"{self.limit} allows no further step")

    def distil(self, seconds: float) -> None:
        """Train the chosen model on the original's answers; kept where that made it better."""
        from headwise.compress.structure.distillation import distil

        self.tell(f"distilling for {seconds:g} s")
        trained = copy.deepcopy(self.current)
        began = time.perf_counter()
        distil(trained, self.original, self.text.given, seconds=seconds, seed=self.seed)
        words = (f"distilled for {seconds:g} s",)
        point = self._measured(trained, words, time.perf_counter() - began)
        self.curve.points.append(point)
        self.curve.about["distilled"] = True
        if point.quality.loss <= self.curve.best.quality.loss:
            self.curve.chosen, self.current = len(self.curve.points) - 1, trained

    def _take(self, chosen: Sequence[Candidate]) -> None:
        take_out(self.current, chosen)
        gone = {one.layer for one in chosen if one.kind == "layers"}
        layers = [name for at, name in enumerate(self.curve.about["numbers"]) if at not in gone]
        if self.recover:
            self.tell("fitting what is left")
            recover(self.current, self.original, self.text, layers)

    def _count(self, chosen: Sequence[Candidate]) -> None:
        """What is left of every layer of the original, under its number there."""
        about = self.curve.about
        gone = {one.layer for one in chosen if one.kind == "layers"}
        about["numbers"] = [name for at, name in enumerate(about["numbers"]) if at not in gone]
        left = dict(zip(about["numbers"], sizes(view(self.current)), strict=True))
        for row in about["layers"]:
            row["heads_left"], row["channels_left"] = left.get(row["layer"], (0, 0))

    def _need(self) -> float:
        """What this round has to save, in the unit of `saved`."""
        what = self.target.what
        left = self.curve.best.left[what]
        whole = self.first.parameters if what == "params" else self._work(self.first)
        return min(self._stride(), max(left - self.target.share, 0.0)) * whole

    def _stride(self) -> float:
        """The share that a round is to save: less since a bound was broken."""
        pace: float = self.curve.about.get("pace", 1.0)
        return pace * (1 - self.target.share) / self.rounds

    def _left(self) -> int:
        """Rounds that are left, about."""
        stride = self._stride()
        left = self.curve.best.left[self.target.what] - self.target.share
        return max(1, math.ceil(left / stride - 1e-6)) if stride > 0 else 1

    def _work(self, known: Cost) -> float:
        """Multiplications a token."""
        return known.flops / 2 / self.tokens

    def _measured(self, model: nn.Module, took: tuple[str, ...], seconds: float) -> Point:
        point, theirs = point_of(
            model, self.original, self.first, self.text, self.limit, self.repeats
        )
        self.curve.original.setdefault("seconds", theirs)
        return replace(point, took=took, seconds=seconds)

    def _end(self, why: str) -> None:
        self.curve.about["done"] = why
