"""The page's script in headless Chromium: what it draws, and what it does when used."""

import ast
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from headwise.instruments.atlas import Atlas
from headwise.report import write
from headwise.report.naming import label
from tests.report.browser import Dom, driven, rendered
from tests.report.synthetic import decoder, encoder_decoder
from tests.report.test_page import HOSTILE, hostile


def bare(heads: int = 1) -> Atlas:
    """An atlas that knows only that there are heads."""
    return Atlas(heads={"layer": np.zeros(heads, int), "head": np.arange(heads)})


def with_gaps() -> Atlas:
    """Columns with NaN in places, everywhere, infinite, and the same for all heads."""
    atlas = decoder(3, 5)
    rng = np.random.default_rng(1)
    heads = dict(atlas.heads)
    for name, values in heads.items():
        if values.dtype.kind == "f":
            heads[name] = np.where(rng.random(len(atlas)) < 0.3, np.nan, values)
    heads |= {"entropy": np.full(15, np.nan), "max_weight": np.full(15, 0.5)}
    heads["output_norm"][0] = np.inf
    pairs = {name: np.full((15, 15), np.nan) for name in atlas.pairs}
    return Atlas(heads=heads, pairs=pairs, reasons=atlas.reasons)


def no_errors(dom: Dom) -> None:
    assert (dom.page.get("data-errors"), dom.page.get("data-error")) == ("0", None)
    assert dom.page.get("data-drawn") == "yes"


@pytest.mark.parametrize(
    "make",
    [lambda: decoder(30, 9), lambda: decoder(4, 8, texts=1), encoder_decoder, hostile, bare,
     with_gaps, lambda: decoder(2, 40)],
    ids=["30x9", "4x8", "encoder-decoder", "hostile", "bare", "gaps", "2x40"],
)  # fmt: skip
def test_the_script_draws_every_head_without_errors(
    tmp_path: Path, make: Callable[[], Atlas]
) -> None:
    atlas = make()
    dom = rendered(write(atlas, tmp_path / "r.html"), tmp_path)
    no_errors(dom)
    assert sorted(map(int, dom.having("data-head"))) == list(range(len(atlas)))
    assert dom.page["data-heads"] == str(len(atlas))
    assert dom.having("data-column") == list(dict.fromkeys((*atlas.heads, *atlas.layers)))


@pytest.mark.parametrize("metric", ["tile", "sink_mass", "ov_copying", "mean_distance"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_view_can_be_linked(tmp_path: Path, metric: str, theme: str) -> None:
    path = write(encoder_decoder(), tmp_path / "r.html")
    fragment = f"metric={metric}&theme={theme}&order=value&scale=rank&head=decoder.cross.2.3"
    dom = rendered(path, tmp_path, fragment)
    no_errors(dom)
    assert dom.page["data-theme"] == theme
    assert dom.having("data-row") == [str(24 + 24 + 2 * 6 + 3)]
    assert len(dom.having("data-head")) == 72


def test_an_address_that_means_nothing_is_ignored(tmp_path: Path) -> None:
    path = write(decoder(2, 2), tmp_path / "r.html")
    fragment = "head=9.9&metric=__proto__&x=%zz&kinds=no&theme=<b>&sort=a;b&nonsense&=&painted=1"
    dom = rendered(path, tmp_path, fragment)
    no_errors(dom)
    assert dom.having("data-row") == []


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    path = write(hostile(), tmp_path / "r.html")
    found = driven(
        path,
        tmp_path,
        """$('[data-head="0"]').dispatchEvent(new page.MouseEvent("click", {bubbles: true}));
        await settle();
        return {title: $("h1").textContent, images: $$("img").length,
          scripts: $$("script").length, errors: page.document.documentElement.dataset.errors,
          handlers: $$("*").filter((e) => [...e.attributes].some((a) => a.name.startsWith("on")))
            .length, words: $$(".word").length, reason: $(".reason").textContent};""",
    )
    assert found == {
        "title": HOSTILE, "images": 0, "scripts": 3, "errors": "0", "handlers": 0, "words": 8,
        "reason": HOSTILE,
    }  # fmt: skip


def test_a_card_shows_every_number_with_its_rank_and_description(tmp_path: Path) -> None:
    atlas = decoder(5, 4)
    row = atlas.row(3, 2)
    found = driven(
        write(atlas, tmp_path / "r.html"),
        tmp_path,
        """return {reason: $(".reason").textContent, tile: $("#card canvas").height > 50,
          twins: $$(".twins button").map((b) => b.textContent),
          lines: Object.fromEntries($$(".metric").map((m) => [m.querySelector(".name").textContent,
            [m.querySelector(".value").textContent, m.querySelector(".what").textContent,
             m.querySelector(".place span") && m.querySelector(".place span").textContent]]))};""",
        fragment="head=3.2",
    )
    assert found["reason"] == atlas.reasons[row]
    assert found["tile"]
    assert found["twins"][0] == atlas.name(int(atlas.heads["similar_to"][row]))
    measured = [
        name for name, values in atlas.heads.items()
        if values.dtype.kind == "f" and np.isfinite(values).any()
    ]  # fmt: skip
    assert set(found["lines"]) == {label(name) for name in measured}
    for name in measured:
        value, what, place = found["lines"][label(name)]
        values = atlas.heads[name]
        assert what.startswith(atlas.columns[name].description)
        if np.isnan(values[row]):
            assert (value, place) == ("not measured", None)
        elif np.nanmin(values) < np.nanmax(values):
            rank = 1 + int((values > values[row]).sum())
            assert place == f"{rank} of {np.isfinite(values).sum()}", name


def test_the_map_is_walked_with_the_keyboard(tmp_path: Path) -> None:
    found = driven(
        write(decoder(6, 4), tmp_path / "r.html"),
        tmp_path,
        """const now = () => page.document.activeElement.dataset.head;
        const seen = [];
        $('.cell[tabindex="0"]').focus(); seen.push(now());
        for (const key of ["ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowLeft", "End",
          "Home"]) { press(page.document.activeElement, key); seen.push(now()); }
        press(page.document.activeElement, "ArrowDown");
        press(page.document.activeElement, "Enter"); await settle();
        const opened = $("#card").dataset.row, inside = page.document.activeElement.id;
        const address = page.location.hash;
        press(page.document.activeElement, "Escape"); await settle();
        return {seen, opened, inside, address, closed: $("#card").hidden, back: now(),
          stops: $$('.cell[tabindex="0"]').length};""",
    )
    # layers run to the right, four heads downwards: row = 4 * layer + head
    assert found == {
        "seen": ["0", "4", "5", "6", "2", "2", "23", "0"], "opened": "1", "inside": "card",
        "address": "#head=0.1", "closed": True, "back": "1", "stops": 1,
    }  # fmt: skip


def test_kinds_filter_the_map_the_table_and_the_scatter(tmp_path: Path) -> None:
    atlas = decoder(6, 4)
    kinds = atlas.heads["kind"].tolist()
    found = driven(
        write(atlas, tmp_path / "r.html"),
        tmp_path,
        """$('[data-kind="sink"]').click(); await settle();
        const one = {lit: $$(".cell:not(.dim)").length, rows: $$("#rows tbody tr").length,
          points: $$(".point:not(.dim)").length, address: page.location.hash};
        $('[data-kind="sink"]').click(); await settle();
        return {one, all: $$(".cell:not(.dim)").length, address: page.location.hash};""",
    )
    sinks = kinds.count("sink")
    assert 0 < sinks < 24
    assert found["one"] == {"lit": sinks, "rows": sinks, "points": sinks, "address": "#kinds=sink"}
    assert (found["all"], found["address"]) == (24, "")


def test_heads_are_ordered_by_value_within_their_layer(tmp_path: Path) -> None:
    atlas = decoder(3, 6)
    dom = rendered(write(atlas, tmp_path / "r.html"), tmp_path, "metric=entropy&order=value")
    values = atlas.heads["entropy"]
    expected = [
        row for layer in range(3)
        for row in sorted(range(6 * layer, 6 * layer + 6), key=lambda row: -values[row])
    ]  # fmt: skip
    assert list(map(int, dom.having("data-head"))) == expected


def listed(dom: Dom, what: str) -> str:
    """The text of a list that is there to be copied."""
    at = dom.source.index(f'data-list="{what}"')
    return dom.source[dom.source.index(">", at) + 1 : dom.source.index("</pre>", at)]


def test_dormant_heads_are_those_on_sinks_that_write_least(tmp_path: Path) -> None:
    atlas = decoder(12, 8)
    dom = rendered(write(atlas, tmp_path / "r.html"), tmp_path)
    sinks = np.fmax(atlas.heads["sink_mass"], atlas.heads["found_sink_mass"])
    writes = atlas.heads["residual_share"]
    chosen = (sinks >= 0.5) & (writes <= np.quantile(writes, 0.25))
    assert 0 < chosen.sum() < len(atlas)
    assert ast.literal_eval(listed(dom, "dormant")) == atlas.where(chosen)


@pytest.mark.parametrize("pairs", ["all pairs", "nearest only"])
def test_redundant_heads_each_have_a_twin_that_stays(tmp_path: Path, pairs: str) -> None:
    atlas = decoder(8, 6)
    similarity = atlas.pairs["similarity"]
    if pairs == "nearest only":
        atlas.pairs.clear()
        known = np.zeros_like(similarity)
        for row, other in enumerate(atlas.heads["similar_to"]):
            known[row, other] = known[other, row] = similarity[row, other]
        similarity = known
    dom = rendered(write(atlas, tmp_path / "r.html"), tmp_path)
    kept: list[int] = []
    dropped = []
    for row in np.argsort(-atlas.heads["residual_share"], kind="stable"):
        twins = [other for other in kept if similarity[row, other] >= 0.9]
        (dropped if twins else kept).append(int(row))
    mask = np.isin(np.arange(len(atlas)), dropped)
    assert 0 < mask.sum() < len(atlas)
    assert ast.literal_eval(listed(dom, "redundant")) == atlas.where(mask)


def test_lists_of_several_stacks_name_them(tmp_path: Path) -> None:
    atlas = encoder_decoder()
    dom = rendered(write(atlas, tmp_path / "r.html"), tmp_path)
    lists = ast.literal_eval(listed(dom, "redundant"))
    assert set(lists) <= {("encoder", "self"), ("decoder", "self"), ("decoder", "cross")}
    for heads in lists.values():
        assert all(layer < 4 and head < 6 for layer, head in heads)


def test_the_table_sorts_and_is_taken_away_as_csv(tmp_path: Path) -> None:
    atlas = decoder(12, 5)
    found = driven(
        write(atlas, tmp_path / "r.html"),
        tmp_path,
        """const names = () => $$("#rows tbody th button").map((b) => b.textContent);
        $('[data-sort="entropy"]').click(); await settle(); const down = names();
        $('[data-sort="entropy"]').click(); await settle(); const up = names();
        $("#table-more").click(); await settle(); const all = names().length;
        let blob; page.URL.createObjectURL = (b) => { blob = b; return "blob:null/x"; };
        [...$$("#table-controls button")].find((b) => b.textContent.includes("CSV")).click();
        return {down, up, all, csv: await blob.text(),
          aria: $('[aria-sort]').getAttribute("aria-sort")};""",
    )
    order = np.argsort(-atlas.heads["entropy"], kind="stable")
    assert found["down"] == [atlas.name(row) for row in order][:40]
    assert found["up"] == [atlas.name(row) for row in order[::-1]][:40]
    assert (found["all"], found["aria"]) == (60, "ascending")
    rows = list(csv.DictReader(io.StringIO(found["csv"])))
    assert len(rows) == 60
    for row, record in enumerate(rows):
        assert (int(record["layer"]), int(record["head"])) == (row // 5, row % 5)
        assert record["kind"] == atlas.heads["kind"][row]
        for name, values in atlas.heads.items():
            if values.dtype.kind != "f":
                continue
            given = float(record[name]) if record[name] else np.nan
            np.testing.assert_allclose(given, values[row], rtol=1e-4)


def test_no_formula_reaches_a_spreadsheet(tmp_path: Path) -> None:
    found = driven(
        write(hostile(), tmp_path / "r.html"),
        tmp_path,
        """let blob; page.URL.createObjectURL = (b) => { blob = b; return "blob:null/x"; };
        [...$$("#table-controls button")].find((b) => b.textContent.includes("CSV")).click();
        return await blob.text();""",
    )
    rows = list(csv.reader(io.StringIO(found)))
    assert rows[0][:5] == ["stack", "attention", "layer", "head", "kind"]
    assert rows[1][0] == HOSTILE
    assert rows[2][4] == "'=cmd()"


@pytest.mark.parametrize("width", [360, 700, 1280])
@pytest.mark.parametrize("fragment", ["", "head=3.2&metric=tile"])
def test_no_page_is_wider_than_its_screen(tmp_path: Path, width: int, fragment: str) -> None:
    path = write(decoder(30, 9), tmp_path / "r.html", title="a-very-long-name/" * 8)
    found = driven(
        path,
        tmp_path,
        """const root = page.document.documentElement;
        const named = (e) => e.textContent.trim() || e.ariaLabel || e.closest("label");
        const panel = $(".panel");
        return {wide: root.scrollWidth, errors: root.dataset.errors,
          cut: panel.scrollWidth - panel.clientWidth,
          unnamed: $$("button, select, input, canvas, svg[role], [role=button]")
            .filter((e) => !named(e)).length};""",
        width=width,
        fragment=fragment,
    )
    assert found["wide"] <= width
    assert found["cut"] <= 0  # the map fits beside an open card, too
    assert (found["errors"], found["unnamed"]) == ("0", 0)


def test_the_page_asks_for_nothing(tmp_path: Path) -> None:
    path = write(decoder(4, 4), tmp_path / "r.html")
    found = driven(
        path,
        tmp_path,
        """const blocked = new Promise((done) => {
          page.document.addEventListener("securitypolicyviolation", (e) => done(e.blockedURI));
          setTimeout(() => done(null), 500); });
        const asked = page.performance.getEntriesByType("resource").map((e) => e.name);
        const probe = page.document.createElement("img");
        probe.src = "http://example.invalid/x.png"; page.document.body.append(probe);
        return {asked, blocked: await blocked};""",
        fragment="head=1.1&metric=tile",
    )
    assert [name for name in found["asked"] if not name.startswith("data:")] == []
    assert found["blocked"] == "http://example.invalid/x.png"  # and could not, if it wanted to


def test_hovering_the_tile_says_which_pair_it_is(tmp_path: Path) -> None:
    atlas = decoder(3, 3)
    found = driven(
        write(atlas, tmp_path / "r.html"),
        tmp_path,
        """const canvas = $("#card canvas");
        const pairs = [];
        const read = () => $(".pairline").textContent;
        canvas.focus();
        press(canvas, "ArrowUp"); pairs.push(read());
        press(canvas, "ArrowLeft"); pairs.push(read());
        const box = canvas.getBoundingClientRect();
        canvas.dispatchEvent(new page.PointerEvent("pointermove",
          {clientX: box.left + 62 + 2, clientY: box.bottom - 3, bubbles: true}));
        pairs.push(read());
        return pairs;""",
        fragment="head=1.1",
    )
    tile = next(tile for tile in atlas.tiles if tile["head"] == 4)
    weights = tile["weights"]
    last = len(tile["tokens"]) - 1
    for words, (query, key) in zip(found, [(last - 1,) * 2, (last - 1, last - 2), (last, 0)],
                                   strict=True):  # fmt: skip
        assert f"(token {tile['positions'][query]}) to" in words
        assert f"(token {tile['positions'][key]}):" in words
        shown = float(words.rsplit(": ", 1)[1])
        assert shown == pytest.approx(float(weights[query, key]), abs=0.005)


def test_the_theme_can_be_chosen(tmp_path: Path) -> None:
    found = driven(
        write(decoder(2, 3), tmp_path / "r.html"),
        tmp_path,
        """const seen = [];
        for (let i = 0; i < 3; i += 1) {
          $("#theme").click(); await settle();
          seen.push([page.document.documentElement.dataset.theme, page.location.hash,
            page.getComputedStyle(page.document.body).backgroundColor]);
        }
        return seen;""",
    )
    light, dark, system = found
    assert light[:2] == ["light", "#theme=light"]
    assert dark[:2] == ["dark", "#theme=dark"]
    assert system[1] == ""
    assert light[2] != dark[2]
    assert json.dumps(system[2]) in {json.dumps(light[2]), json.dumps(dark[2])}
