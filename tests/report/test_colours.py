"""Colours that everyone can tell apart and read, in both themes."""

import re
from importlib import resources
from itertools import combinations

import numpy as np
import pytest

from headwise.instruments.kinds import KINDS

# Machado, Oliveira and Fernandes 2009: what is seen with one kind of cone missing, linear RGB
EYES = {
    "normal": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                              [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                            [0.004733, 0.691367, 0.303900]]),
}  # fmt: skip


def asset(name: str) -> str:
    return resources.files("headwise.report").joinpath("assets", name).read_text("utf-8")


def colours(theme: str) -> dict[str, str]:
    light, dark = asset("page.css").split(':root[data-theme="dark"]')
    block = light if theme == "light" else dark.split("}")[0]
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))


def linear(colour: str) -> np.ndarray:
    value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    """WCAG 2.2, relative luminance."""
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) + 0.05 for c in (a, b))
    return high / low


def mixed(colour: str, ground: str, share: float) -> str:
    pairs = [(int(colour[i : i + 2], 16), int(ground[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a * share + b * (1 - share)):02x}" for a, b in pairs)


def oklab(rgb: np.ndarray) -> np.ndarray:
    cones = np.array([[0.4122214708, 0.5363325363, 0.0514459929],
                      [0.2119034982, 0.6806995451, 0.1073969566],
                      [0.0883024619, 0.2817188376, 0.6299787005]]) @ rgb  # fmt: skip
    return np.array([[0.2104542553, 0.7936177850, -0.0040720468],
                     [1.9779984951, -2.4285922050, 0.4505937099],
                     [0.0259040371, 0.7827717662, -0.8086757660]]) @ np.cbrt(
                         np.clip(cones, 0, None))  # fmt: skip


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_read_and_marks_are_seen(theme: str) -> None:
    known = colours(theme)
    for ground in ("page", "surface", "sunken"):
        for ink in ("ink", "muted", "accent"):
            assert contrast(known[ink], known[ground]) >= 4.5, (ink, ground)
    written = asset("figures.css")
    strengths = re.findall(r"--tint(?:, |: )(\.\d+)", written)  # light, mixed in light, and in dark
    tint, tint_mixed = map(float, strengths[:2] if theme == "light" else strengths[2:])
    for kind in KINDS:
        colour = known[f"k-{kind}"]
        assert contrast(colour, known["page"]) >= 3, kind
        share = tint_mixed if kind == "mixed" else tint
        assert contrast(colour, mixed(colour, known["page"], share)) >= 3, kind


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("eyes", EYES)
def test_no_two_kinds_look_the_same_to_any_eye(theme: str, eyes: str) -> None:
    known = colours(theme)
    seen = {kind: oklab(np.clip(EYES[eyes] @ linear(known[f"k-{kind}"]), 0, 1)) for kind in KINDS}
    for a, b in combinations(KINDS, 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 0.07, (a, b)


def test_every_kind_has_a_shape_of_its_own() -> None:
    shapes = dict(re.findall(r'^  "?([\w-]+)"?: "(M[^"]+)",$', asset("colour.js"), re.MULTILINE))
    assert set(shapes) == {*KINDS, "other"}
    assert len(set(shapes.values())) == len(shapes)
