"""The section on causes: only with effects, the right heads named, readable and usable."""

from pathlib import Path

import numpy as np
import pytest

from headwise.instruments.atlas import Atlas
from headwise.instruments.disagreement import disagreement
from headwise.report import write
from headwise.report.payload import Detail, payload
from headwise.report.sentence import sentences
from tests.report.browser import driven, rendered
from tests.report.synthetic import decoder, encoder_decoder
from tests.report.test_in_browser import no_errors
from tests.report.test_page import HOSTILE


def caused(atlas: Atlas, metric: str = "loss", scale: float = 1.0) -> Atlas:
    """The atlas with effects: small ones, a few large ones, one that is better without."""
    rng = np.random.default_rng(3)
    count = len(atlas)
    effect = rng.normal(0.004, 0.004, count) * scale
    effect[[1, 4]] = 1.3 * scale, -0.2 * scale
    error = np.abs(effect) * 0.1 + 0.001
    cause = {
        "metric": metric, "how": "zero", "examples": 8, "unchanged": 3.2, "better": "lower",
        "rank_correlation": {"gradient": 0.71, "integrated": None},
    }  # fmt: skip
    return Atlas(
        heads=atlas.heads | {"effect": effect, "effect_se": error},
        layers=atlas.layers | {"mlp_effect": np.ones(len(atlas.layers["layer"])),
                               "mlp_effect_se": np.ones(len(atlas.layers["layer"]))},
        pairs=atlas.pairs, spread=atlas.spread | {"effect": error}, reasons=atlas.reasons,
        tiles=atlas.tiles, provenance=atlas.provenance | {"cause": cause},
    )  # fmt: skip


def test_errors_are_no_figures_of_their_own() -> None:
    found = payload(caused(decoder(3, 4)), Detail())
    names = {column["name"]: column for column in found["columns"]}
    assert "effect_se" not in names
    assert names["effect"]["group"] == "Cause"
    assert len(names["effect"]["spread"]) == 12
    assert [c["name"] for c in found["layers"]["columns"]][-1] == "mlp_effect"


def test_what_the_section_says_is_what_the_instrument_finds() -> None:
    atlas = caused(decoder(6, 8))
    found = payload(atlas, Detail())["cause"]
    assert next(iter(found["against"])) == "residual_share"
    known = disagreement(atlas, "sink_mass")
    assert known is not None
    mine = found["against"]["sink_mass"]
    assert (mine["over"], mine["under"]) == (list(known.over), list(known.under))
    assert mine["rho"] == pytest.approx(known.correlation, abs=1e-3)
    assert found["estimates"] == [["gradient", 0.71], ["integrated", None]]
    assert "(unchanged: 3.2)" in found["about"]
    assert sentences(atlas)[-1] == "Taking out L0H1 changes the loss most, by +1.3."
    assert payload(decoder(3, 4), Detail())["cause"] is None


@pytest.mark.parametrize("make", [lambda: decoder(6, 8), encoder_decoder])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_is_drawn_only_where_there_are_effects(tmp_path: Path, make, theme: str) -> None:
    plain, made = make(), caused(make())
    dom = rendered(write(plain, tmp_path / "plain.html"), tmp_path)
    no_errors(dom)
    hidden = {a.get("id") for tag, a in dom.elements if "hidden" in a}
    assert "cause" in hidden
    dom = rendered(write(made, tmp_path / "made.html"), tmp_path, f"theme={theme}")
    no_errors(dom)
    assert "cause" not in {a.get("id") for tag, a in dom.elements if "hidden" in a}
    link = next(a for tag, a in dom.elements if a.get("href") == "#cause")
    assert "hidden" not in link


def test_another_score_names_other_heads_and_the_view_can_be_linked(tmp_path: Path) -> None:
    atlas = caused(decoder(6, 8))
    found = driven(
        write(atlas, tmp_path / "r.html"),
        tmp_path,
        """const listed = () => $$("#cause-heads .link").map((b) => b.textContent);
        const rings = () => $$("#cause-plot .called").length;
        const first = [listed(), rings(), $("#cause-said").textContent];
        const box = $("#cause-controls select");
        box.value = "sink_mass"; box.dispatchEvent(new page.Event("change"));
        await settle();
        const second = [listed(), rings(), $("#cause-said").textContent];
        const point = $("#cause-plot .point[tabindex='0']");
        press(point, "ArrowRight"); await settle();
        const moved = page.document.activeElement.getAttribute("aria-label");
        press(page.document.activeElement, "Enter"); await settle();
        return {first, second, moved, hash: page.location.hash,
          open: $$("#cause-plot .point.open").length + $$("#scatter .point.open").length,
          bars: $$("#cause-plot .bars").length,
          errors: page.document.documentElement.dataset.errors};""",
    )
    for (names, rings, said), column in zip(
        (found["first"], found["second"]), ("residual_share", "sink_mass"), strict=True
    ):
        known = disagreement(atlas, column)
        assert known is not None
        assert names == [atlas.name(row) for row in (*known.over, *known.under)]
        assert rings == len(names)
        assert said == " ".join(known.sentences(atlas))
    assert "effect of taking it out" in found["moved"]
    assert "against=sink_mass" in found["hash"]
    assert found["open"] == 2  # the same head in both plots
    assert found["bars"] == 48
    assert found["errors"] == "0"


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e6, -1.0])
def test_effects_of_any_size_have_an_axis(tmp_path: Path, scale: float) -> None:
    atlas = caused(decoder(2, 4), scale=scale)
    no_errors(rendered(write(atlas, tmp_path / "r.html"), tmp_path))


def test_metrics_named_by_strangers_stay_text(tmp_path: Path) -> None:
    atlas = caused(decoder(2, 4), metric=HOSTILE)
    dom = rendered(write(atlas, tmp_path / "r.html"), tmp_path)
    no_errors(dom)
    assert not dom.of_class("hostile")
    assert not [tag for tag, _ in dom.elements if tag == "img"]
