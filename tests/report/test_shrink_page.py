"""The page of a search: what it says, what it draws, and that nothing in it is taken for markup."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from headwise.compress.search.cache_settings import CacheSettings
from headwise.compress.search.curve import Curve, Point
from headwise.compress.search.quality import Quality
from headwise.report.curve_picture import curve_picture
from headwise.report.remains_picture import remains_picture
from headwise.report.shrink_page import sentence, write_shrink


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


def drawn(made: Curve, name: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(curve_picture(made, name)).iter())


def of_class(elements: list[ElementTree.Element], kind: str) -> list[ElementTree.Element]:
    return [element for element in elements if element.get("class") == kind]


def numbers(path: str | None) -> list[float]:
    return [float(found) for found in re.findall(r"-?[\d.]+", path or "")]


@pytest.mark.parametrize("name", ["loss_change", "agreement"])
def test_what_was_refused_is_drawn_apart(name: str) -> None:
    found = drawn(curve(), name)
    (line,) = of_class(found, "line")
    x, y, original, whole = numbers(line.get("d"))  # from the chosen point to the original
    assert x < original
    assert (y < whole) == (name == "loss_change")  # a loss rises, agreement falls
    # the first of each is in the picture, the second in its legend
    ring, cross = of_class(found, "chosen")[0], of_class(found, "refused")[0]
    assert [float(ring.get("cx", "")), float(ring.get("cy", ""))] == [x, y]
    beyond = numbers(cross.get("transform"))
    assert beyond[0] < x
    assert (beyond[1] < y) == (name == "loss_change")


def test_the_budget_the_bound_and_the_errors_are_drawn() -> None:
    made = curve()
    plain = drawn(made, "loss_change")
    assert not of_class(plain, "bound")
    assert len(of_class(plain, "bar")) == 4  # three points and the legend
    made.about["asked"] = {"quality": "loss<=+0.1"}
    loss, agreement = drawn(made, "loss_change"), drawn(made, "agreement")
    assert len(of_class(loss, "bound")) == 2
    assert not of_class(agreement, "bound")
    assert not of_class(agreement, "bar")
    assert "asked 0.6" in [element.text for element in loss]
    line, asked = of_class(loss, "line")[0].get("d"), of_class(loss, "asked")[0].get("d")
    assert numbers(asked)[0] < numbers(line)[0]  # 0.6 is left of 0.8
    # the bound is where the chosen point is: at a rise of 0.1
    assert numbers(of_class(loss, "bound")[0].get("d"))[1] == numbers(line)[1]
    made.about["asked"] = {"quality": "loss<=2.1"}  # 2 + 0.1
    assert of_class(drawn(made, "loss_change"), "bound")[0].get("d") == of_class(loss, "bound")[
        0
    ].get("d")


def test_the_first_table_has_units_and_what_was_asked(tmp_path: Path) -> None:
    made = curve()
    made.original = {"params": 2_000_000.0, "seconds": 0.5}
    text = write_shrink(made, tmp_path / "a.html", "m").read_text("utf-8")
    first = re.search(r'<table class="first">.*?</table>', text, re.DOTALL)
    assert first
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", first[0])
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in rows]
    assert ["parameters; asked for: 60.0% or less", "2 M", "1.6 M", "80.0%"] in cells
    assert ["seconds of a forward pass", "0.500 s", "0.400 s", "80.0%"] in cells
    assert ["loss, nats a token", "2.000", "2.100", "+0.100 ± 0.010"] in cells
    assert ["same next token as the original", "", "90.0%", ""] in cells
    assert "4 windows" in text
    assert "Refused points" in text
    made.points.pop()
    assert "Refused points" not in write_shrink(made, tmp_path / "b.html", "m").read_text("utf-8")
    made.original["params"] = 7e9
    assert "<td>7 B</td><td>5.6 B</td>" in write_shrink(made, tmp_path / "c.html", "m").read_text()


def test_the_original_alone_is_no_curve(tmp_path: Path) -> None:
    made = curve()
    made.points, made.chosen = made.points[:1], 0
    text = write_shrink(made, tmp_path / "a.html", "m").read_text("utf-8")
    assert "What it costs" not in text
    assert "the original" in text


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
    spread = CacheSettings("key norm", 0.8, "by layer", (0.2, 0.8), 8).as_dict()
    even = CacheSettings(share=0.5, bits=4).as_dict()
    # named as they were first asked for; what was kept in the end counts
    made.about["tried"] = {
        "4 bits, 0.9": {"kv": 0.7, "loss": 0.3, "settings": even},
        "8 bits, 0.9": {"kv": 0.2, "loss": 0.1, "settings": spread},
    }
    made.cache = spread
    text = write_shrink(made, tmp_path / "b.html", "m").read_text("utf-8")
    table = text[text.index("What was tried") :]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr.*?</tr>", table)]
    assert rows[1:] == [
        ["+0.100", "20.0%", "50%", "8", "by layer", "key norm"],
        ["+0.300", "70.0% (over)", "50%", "4", "uniform", "observation window"],
    ]
    assert not Tags(text).open


def test_what_a_cache_keeps_of_every_layer_is_drawn() -> None:
    made = curve()
    made.about["layers"] = []
    assert remains_picture(made) == ""
    made.cache = CacheSettings("key norm", 0.8, "by layer", (0.25, 0.75)).as_dict()
    found = list(ElementTree.fromstring(remains_picture(made)).iter())
    widths = [float(one.get("width", "")) for one in of_class(found, "cells")]
    assert widths[1] == pytest.approx(3 * widths[0])
    assert {"0.25", "0.75", "L0", "L1"} <= {one.text for one in found}


def test_a_curve_comes_back_from_its_file(tmp_path: Path) -> None:
    made = curve()
    made.save(tmp_path / "curve.json")
    assert Curve.load(tmp_path / "curve.json").record() == made.record()
    (tmp_path / "curve.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        Curve.load(tmp_path / "curve.json")
