"""The file itself: complete, small, valid, and nothing in it that an atlas could smuggle in."""

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headwise.instruments.atlas import Atlas, Column
from headwise.report import page as page_file
from headwise.report import write
from tests.report.synthetic import decoder, encoder_decoder

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<!--"
TOKENS = [
    HOSTILE,
    "\u2028\u2029",
    "\ud800",
    "\x00\x1b[31m",
    "\u202egnirts",
    "&lt;b&gt;",
    "a" * 5000,
    "",
]


class Parts(HTMLParser):
    """Scripts, styles and the attributes of all elements, as a browser's parser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.content: dict[str, list[str]] = {"script": [], "style": [], "title": [], "h1": []}
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag in self.content:
            self.content[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in self.content:
            self.content[self._inside][-1] += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def data_of(path: Path) -> dict[str, Any]:
    """What the page holds about the atlas. Raises where it is not strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = re.search(
        r'<script type="application/json" id="atlas">(.*?)</script>', path.read_text("utf-8")
    )
    assert found is not None
    return json.loads(found[1], parse_constant=refuse)


def hostile() -> Atlas:
    """Every text of an atlas tries to be markup."""
    size = len(TOKENS)
    weights = np.tril(np.full((size, size), 0.1, dtype=np.float16))
    return Atlas(
        heads={
            "layer": np.array([0, 0]),
            "head": np.array([0, 1]),
            "stack": np.array([HOSTILE, "b"]),
            "attention": np.array(["self", HOSTILE]),
            "kind": np.array([HOSTILE, "=cmd()"]),
            HOSTILE: np.array([0.25, np.nan]),
            "sink_mass": np.array([0.5, 0.75]),
        },
        layers={"layer": np.array([0]), HOSTILE: np.array([1.0])},
        columns={HOSTILE: Column(HOSTILE, HOSTILE, HOSTILE, f"{HOSTILE} arXiv 2410.10781")},
        reasons=[HOSTILE, "\ud800"],
        tiles=[{"head": 0, "start": 0, "tokens": TOKENS, "weights": weights}],
        provenance={
            "model": HOSTILE,
            "command": HOSTILE,
            "versions": {HOSTILE: HOSTILE},
            "settings": {HOSTILE: float("nan")},
            "texts": [{"name": HOSTILE, "sha256": HOSTILE, "tokens": 3}],
            HOSTILE: "\ud800",
        },
    )


@pytest.mark.parametrize("make", [lambda: decoder(30, 9), encoder_decoder, hostile])
def test_nothing_is_loaded_from_anywhere(tmp_path: Path, make: Callable[[], Atlas]) -> None:
    path = write(make(), tmp_path / "report.html")
    text = path.read_text("utf-8")
    parts = Parts(text)
    loading = {"img", "iframe", "object", "embed", "video", "audio", "source", "base", "form"}
    assert not loading & {tag for tag, _ in parts.elements}
    for tag, attributes in parts.elements:
        for name in ("src", "srcset", "data", "action", "poster", "background"):
            assert name not in attributes, (tag, attributes)
        if "href" in attributes:
            assert re.match(r"(#|data:,$)", attributes["href"] or ""), (tag, attributes)
    written = "".join(parts.content["style"])
    assert not re.search(r"@import|url\((?!#)", written)
    script = "".join(parts.content["script"][0::2])  # the second is the data
    assert not re.search(
        r"\b(fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|import)\s*\(", script
    )
    assert set(re.findall(r"https?://[^\s\"'`]+", script)) == {
        "http://www.w3.org/2000/svg",  # the name of a namespace, which nobody fetches
        "https://arxiv.org/abs/${match[1]}",  # a link for the reader to follow
    }


def test_the_policy_forbids_all_but_what_the_page_was_written_with(tmp_path: Path) -> None:
    parts = Parts(write(decoder(2, 2), tmp_path / "r.html").read_text("utf-8"))
    policy = next(
        a["content"] or "" for _, a in parts.elements
        if a.get("http-equiv") == "Content-Security-Policy"
    )  # fmt: skip
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in policy

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    early, _, late = parts.content["script"]
    assert rules["script-src"].split() == [digest(early), digest(late)]
    assert rules["style-src"].split() == [digest(style) for style in parts.content["style"]]


def test_text_of_an_atlas_never_becomes_markup(tmp_path: Path) -> None:
    path = write(hostile(), tmp_path / "r.html")
    text = path.read_text("utf-8")
    plain = Parts(write(decoder(1, 2), tmp_path / "plain.html").read_text("utf-8"))
    parts = Parts(text)
    assert [tag for tag, _ in parts.elements] == [tag for tag, _ in plain.elements]
    assert parts.content["h1"] == [HOSTILE]
    assert parts.content["title"][0].startswith(HOSTILE)
    assert not re.search(r"[<>&]", parts.content["script"][1])
    data = data_of(path)
    assert data["title"] == HOSTILE
    marked = [token.replace("\ud800", "\N{REPLACEMENT CHARACTER}") for token in TOKENS]
    assert data["tiles"]["texts"][0][0] == marked
    assert data["heads"]["kind"][0] == HOSTILE
    assert data["provenance"]["settings"] == {HOSTILE: None}


def test_a_hostile_title_is_only_a_title(tmp_path: Path) -> None:
    path = write(decoder(1, 2), tmp_path / "r.html", title="{{script}} \ud800 </h1><h1>")
    parts = Parts(path.read_text("utf-8"))
    assert parts.content["h1"] == ["{{script}} \N{REPLACEMENT CHARACTER} </h1><h1>"]
    assert data_of(path)["title"] == parts.content["h1"][0]


def test_the_page_of_a_large_model_stays_small(tmp_path: Path) -> None:
    atlas = decoder(30, 32)
    assert len(atlas) == 960
    path = write(atlas, tmp_path / "r.html")
    assert path.stat().st_size < page_file.LARGEST <= 5_000_000
    data = data_of(path)
    assert {tile["head"] for tile in data["tiles"]["entries"]} == set(range(960))
    assert data["alike"]["similarity"]


def test_detail_is_given_up_for_size_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atlas = decoder(12, 8)
    sizes = []
    for limit in (5_000_000, 300_000, 240_000, 180_000):
        monkeypatch.setattr(page_file, "LARGEST", limit)
        path = write(atlas, tmp_path / "r.html")
        assert path.stat().st_size < limit
        sizes.append((path.stat().st_size, len(data_of(path)["left_out"])))
    assert sizes == sorted(sizes, key=lambda s: -s[0])
    assert [left for _, left in sizes] == sorted(left for _, left in sizes)
    assert sizes[0][1] == 0
    assert sizes[-1][1] >= 3


@pytest.mark.parametrize("make", [lambda: decoder(3, 4), encoder_decoder])
def test_every_column_stands_on_the_page_with_its_description(
    tmp_path: Path, make: Callable[[], Atlas]
) -> None:
    atlas = make()
    own = {"mine": np.linspace(0, 1, len(atlas)), "undescribed": np.zeros(len(atlas))}
    atlas = Atlas(
        heads=atlas.heads | own, layers=atlas.layers,
        columns={"mine": Column("mine", "widgets", "A number of mine.", "me")},
        pairs=atlas.pairs, spread=atlas.spread, reasons=atlas.reasons, tiles=atlas.tiles,
        provenance=atlas.provenance,
    )  # fmt: skip
    data = data_of(write(atlas, tmp_path / "r.html"))
    defined = {entry["name"]: entry for entry in data["definitions"]}
    assert set(defined) == {*atlas.heads, *atlas.layers}
    for name, column in atlas.columns.items():
        assert defined[name]["description"] == column.description
        assert (defined[name]["unit"], defined[name]["source"]) == (column.unit, column.source)
    assert defined["undescribed"]["description"] == "no description was given"
    shown = {column["name"]: column for column in data["columns"]}
    indices = {"layer", "head", "kind", "stack", "attention", "similar_to"}
    assert set(shown) == set(atlas.heads) - indices
    assert shown["mine"]["group"] == "Other"
    assert shown["sink_mass"]["group"] == "Sinks"


def test_numbers_are_rounded_and_what_is_no_number_is_null(tmp_path: Path) -> None:
    values = np.array([0.123456789, np.nan, np.inf, 123456.0, 1e-12, -0.0])
    atlas = Atlas(
        heads={
            "layer": np.zeros(6, int), "head": np.arange(6), "entropy": values,
            "count": np.arange(6), "never": np.full(6, np.nan), "flag": np.array([True] * 6),
        },
        spread={"entropy": np.array([0.0123456, np.nan, 1, 1, 1, 1])},
        provenance={"seconds": np.float64(1.5), "odd": float("inf"), "path": Path("x")},
    )  # fmt: skip
    path = write(atlas, tmp_path / "r.html")
    data = data_of(path)
    shown = {column["name"]: column for column in data["columns"]}
    assert shown["entropy"]["values"] == [0.12346, None, None, 123460, 1e-12, 0]
    assert shown["entropy"]["spread"][:2] == [0.0123, None]
    assert shown["count"]["values"] == [0, 1, 2, 3, 4, 5]
    assert shown["never"]["values"] == [None] * 6
    assert shown["flag"]["values"] == [1] * 6
    assert data["provenance"] == {"seconds": 1.5, "odd": None, "path": "x"}


def test_a_failed_write_leaves_the_old_page_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder" / "r.html"
    assert write(decoder(1, 2), path) == path
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(decoder(2, 2), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_an_atlas_without_heads_is_refused(tmp_path: Path) -> None:
    empty = Atlas(heads={"layer": np.array([], int), "head": np.array([], int)})
    with pytest.raises(ValueError, match="no heads"):
        write(empty, tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_a_saved_and_loaded_atlas_gives_the_same_page(tmp_path: Path) -> None:
    atlas = encoder_decoder()
    again = Atlas.load(atlas.save(tmp_path / "atlas.safetensors"))
    assert data_of(write(again, tmp_path / "b.html")) == data_of(write(atlas, tmp_path / "a.html"))
