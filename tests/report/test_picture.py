"""Pictures of papers as SVG."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from headwise.papers import Picture
from headwise.report.picture import DARK, LIGHT, svg
from headwise.report.ticks import axis, written

SPACE = "{http://www.w3.org/2000/svg}"
CSS = Path(__file__).parents[2] / "docs" / "assets" / "extra.css"


def lines(count: int, log: str = "") -> Picture:
    xs = [1.0, 2.0, 4.0]
    drawn = {f"<line & {i}>": (xs, [1.0, 2.0, 3.0 + i / 100]) for i in range(count)}
    return Picture("A <title>", "tokens", "loss (nats)", lines=drawn, log=log)


def texts(picture: Picture) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg(picture)).iter(f"{SPACE}text"))


@pytest.mark.parametrize("log", ["", "x", "y", "xy"])
def test_lines_are_told_apart_without_colour(log: str) -> None:
    tree = ElementTree.fromstring(svg(lines(6, log)))
    paths = [path for path in tree.iter(f"{SPACE}path") if path.get("class") == "line"]
    assert len(paths) == 6
    assert len({path.get("stroke-dasharray") for path in paths}) == 6
    words = [text.text for text in tree.iter(f"{SPACE}text")]
    assert {f"<line & {i}>" for i in range(6)} <= set(words)
    assert {"A <title>", "tokens", "loss (nats)"} <= set(words)


def test_labels_do_not_touch_and_stay_inside() -> None:
    names = [text for text in texts(lines(12)) if (text.text or "").startswith("<line")]
    places = sorted(float(text.get("y", "")) for text in names)
    assert len(places) == 12
    assert min(b - a for a, b in itertools.pairwise(places)) >= 14.9
    assert places[0] > 0
    assert places[-1] < 380


def test_numbers_of_an_axis_stay_clear_of_its_name() -> None:
    short, long = ([-0.01, -0.0025], [1.0, 2.0])
    for ys in (short, long):
        found = texts(Picture("t", "x", "y", lines={"a": ([1.0, 2.0], ys)}))
        ends = [text for text in found if text.get("text-anchor") == "end"]
        starts = [float(e.get("x", "")) - 7.2 * len(e.text or "") for e in ends]
        assert min(starts) >= 20  # the name stands on end, from 5 to 17


def test_what_is_not_finite_is_left_out() -> None:
    ys = [1.0, float("nan"), float("inf"), 2.0]
    text = svg(Picture("t", "x", "y", lines={"a": ([1, 2, 3, 4], ys)}))
    assert "nan" not in text
    assert "inf" not in text
    with pytest.raises(ValueError, match="at least one finite value"):
        svg(Picture("t", "x", "y", lines={"a": ([1.0], [float("nan")])}))
    with pytest.raises(ValueError, match="above zero"):
        svg(Picture("t", "x", "y", lines={"a": ([0.0], [1.0])}, log="x"))


def test_maps_have_one_scale() -> None:
    picture = Picture("t", "key", "query", maps={"a": [[0.0, 1.0]], "b": [[-2.0, float("nan")]]})
    tree = ElementTree.fromstring(svg(picture))
    cells = [rect for rect in tree.iter(f"{SPACE}rect") if rect.get("class") in ("cells", "below")]
    assert [cell.get("fill-opacity") for cell in cells] == ["0.500", "1.000"]
    assert [cell.get("class") for cell in cells] == ["cells", "below"]
    assert len(list(tree.iter(f"{SPACE}circle"))) == 1  # below zero is dotted
    assert any("full: 2" in (text.text or "") for text in tree.iter(f"{SPACE}text"))


def test_a_picture_of_a_page_takes_the_colours_of_the_page() -> None:
    alone, inside = svg(lines(2)), svg(lines(2), standalone=False)
    assert "prefers-color-scheme: dark" in alone
    assert "<style>" not in inside
    assert "<rect" not in inside
    # the ground lies under everything
    assert [child.tag for child in ElementTree.fromstring(alone)][:3] == [
        f"{SPACE}style", f"{SPACE}rect", f"{SPACE}text",
    ]  # fmt: skip
    css = " ".join(CSS.read_text("utf-8").split())
    assert LIGHT in css
    assert DARK in css
    used = set(re.findall(r"var\((--hw-\w+)\)", alone + css))
    assert used <= set(re.findall(r"(--hw-\w+):", LIGHT)) == set(re.findall(r"(--hw-\w+):", DARK))


@pytest.mark.parametrize("colours", [LIGHT, DARK])
def test_colours_stand_out_from_the_ground(colours: str) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    found = dict(re.findall(r"--hw-(\w+): (#\w{6})", colours))
    ground = luminance(found["paper"])
    for name, colour in found.items():
        if name in ("paper", "line"):
            continue
        high, low = sorted((luminance(colour), ground), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, name


@pytest.mark.parametrize(
    ("values", "log", "ticks"),
    [
        ([0.0, 1.0], False, (0, 0.2, 0.4, 0.6, 0.8, 1.0)),
        ([3.0], False, (1.5, 2, 2.5, 3, 3.5, 4, 4.5)),
        ([4.0, 2048.0], True, (1, 10, 100, 1000, 10000)),
        ([0.01, 0.02], True, (0.01, 0.02)),
        ([0.005184, 0.008545], True, (0.006, 0.007, 0.008)),
        ([-1e-12, 5.6], False, (0, 2, 4, 6)),
        ([5.0], True, (5.0,)),
        ([3.0], True, (2, 4, 6)),
    ],
)
def test_axes(values: list[float], log: bool, ticks: tuple[float, ...]) -> None:
    made = axis(values, log)
    assert made.low <= min(values) + 1e-9
    assert made.high >= max(values) - 1e-9
    if len(values) > 1:
        assert made.ticks == pytest.approx(ticks)
    assert all(-1e-9 <= made.at(tick) <= 1 + 1e-9 for tick in made.ticks)
    assert made.low < made.high


def test_numbers_are_written_short() -> None:
    assert [written(x) for x in (0, 0.25, 1e-5, 1000, 2_000_000)] == [
        "0", "0.25", "1e-5", "1,000", "2e6",
    ]  # fmt: skip
