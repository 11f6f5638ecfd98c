"""The page of a search: what it says, what it draws, and that nothing in it is taken for markup."""

import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from headwise.compress.search.curve import Curve, Point
from headwise.compress.search.quality import Quality
from headwise.report.shrink_page import curve_pictures, sentence, write_shrink


def curve() -> Curve:
    def point(left: float, change: float, within: bool = True, took: tuple[str, ...] = ()) -> Point:
        quality = Quality(2 + change, change, 0.01, 1 - change, change / 2, 4)
        return Point({"params": left, "time": left}, quality, took, 1.0, within)

    points = [
        point(1.0, 0.0),
        point(0.8, 0.1, took=("L0H1", "L1 mlp")),
        point(0.6, 0.9, within=False, took=("L1 <b>",)),
    ]
    layers = [
        {"layer": 0, "heads": 4, "channels": 8, "heads_left": 3, "channels_left": 8},
        {"layer": 1, "heads": 4, "channels": 8, "heads_left": 4, "channels_left": 0},
    ]
    about = {"layers": layers, "done": "loss<=+0.1 allows no further step"}
    return Curve("params", 0.6, points, 1, about)


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "path", "circle", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_says_what_was_asked_and_what_came_out(tmp_path: Path) -> None:
    page = write_shrink(curve(), tmp_path / "report.html", "model <1>", "headwise shrink <x>")
    text = page.read_text("utf-8")
    assert "model &lt;1&gt;" in text
    assert "Asked for params=0.6: params=0.800" in text
    assert "The search ended before: loss&lt;=+0.1 allows no further step." in text
    assert "L1 &lt;b&gt; (refused)" in text
    assert "headwise shrink &lt;x&gt;" in text
    assert "3 of 4" in text
    assert "0 of 8" in text
    tags = Tags(text)
    assert not tags.open
    assert "b" not in tags.seen
    assert "script" not in tags.seen
    assert tags.seen.count("svg") == 3


def test_what_was_refused_is_drawn_apart() -> None:
    first, second = curve_pictures(curve())
    assert first.lines["taken"] == ([0.8, 1.0], [0.1, 0.0])
    assert first.lines["refused"] == ([0.6], [0.9])
    assert second.lines["taken"][1] == [0.9, 1.0]


def test_a_budget_that_was_met_is_told_as_that() -> None:
    met = curve()
    met.share = 0.8
    assert sentence(met).startswith("Reached params=0.8")
    assert "+0.100 +/- 0.010" in sentence(met)
    alone = replace(met.points[1].quality, loss_error=math.nan)
    met.points[1] = replace(met.points[1], quality=alone)
    assert "+/-" not in sentence(met)


def test_what_was_tried_for_a_cache_is_listed_best_first(tmp_path: Path) -> None:
    made = curve()
    text = write_shrink(made, tmp_path / "a.html", "m").read_text("utf-8")
    assert "What was tried" not in text
    made.about["tried"] = {
        "4 bits & all": {"kv": 0.2, "loss": 0.3},
        "8 bits": {"kv": 0.2, "loss": 0.1},
    }
    text = write_shrink(made, tmp_path / "b.html", "m").read_text("utf-8")
    assert text.index("8 bits") < text.index("4 bits &amp; all")
    assert not Tags(text).open


def test_a_curve_comes_back_from_its_file(tmp_path: Path) -> None:
    made = curve()
    made.save(tmp_path / "curve.json")
    assert Curve.load(tmp_path / "curve.json").record() == made.record()
    (tmp_path / "curve.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        Curve.load(tmp_path / "curve.json")
