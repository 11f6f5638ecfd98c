"""Pictures of what patching found, and of circuits."""

from xml.etree import ElementTree

import numpy as np
import pytest

from headwise.instruments.circuit import Circuit, Edge
from headwise.instruments.nodes import Node
from headwise.instruments.patch_table import PatchTable
from headwise.report.circuit_picture import circuit_picture
from headwise.report.patch_picture import patch_picture

SPACE = "{http://www.w3.org/2000/svg}"


def table(shape: tuple[int, ...], names: tuple[str, ...], direction: str = "denoise") -> PatchTable:
    random = np.random.default_rng(0)
    axes = {n: tuple(map(str, range(k))) for n, k in zip(names, shape, strict=True)}
    values = random.normal(0.3, 0.4, (4, *shape))
    return PatchTable(
        values, np.ones(4), np.zeros(4), axes, "residual", "a < b", direction=direction
    )


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((3, 5), ("layer", "position")),
        ((3, 4), ("layer", "head")),
        ((3,), ("layer",)),
        ((3, 4, 5), ("layer", "head", "position")),
    ],
)
def test_a_cell_for_every_place(shape, names):
    tree = ElementTree.fromstring(patch_picture(table(shape, names), "A <title> & more"))
    told = [title.text or "" for title in tree.iter(f"{SPACE}title")]
    assert len(told) == int(np.prod(shape[:2]))
    words = [text.text for text in tree.iter(f"{SPACE}text")]
    assert "A <title> & more" in words
    assert {"L0", "L1", "L2"} <= set(words)


def test_what_a_cell_says_is_the_share():
    for direction, share in (("denoise", lambda t: t.normalised), ("noise", None)):
        made = table((2, 3), ("layer", "position"), direction)
        expected = made.normalised if share else 1 - made.normalised
        tree = ElementTree.fromstring(patch_picture(made, labels=("<s>", "a b", "x" * 30)))
        told = [title.text or "" for title in tree.iter(f"{SPACE}title")]
        assert f"layer 1, position a b: {expected[1, 1]:.3f}" in " ".join(told)
        words = [text.text for text in tree.iter(f"{SPACE}text")]
        assert "<s>" in words
        assert "x" * 13 + "…" in words


def test_tables_that_cannot_be_drawn():
    flat = PatchTable(np.ones((2, 2, 2)), np.ones(2), np.ones(2),
                      {"layer": ("0", "1"), "head": ("0", "1")}, "heads", "loss")  # fmt: skip
    with pytest.raises(ValueError, match="equally good"):
        patch_picture(flat)
    with pytest.raises(ValueError, match="2 labels for 3"):
        patch_picture(table((2, 3), ("layer", "position")), labels=("a", "b"))


def circuit(*paths: tuple[str, str, float], shared: int = 1) -> Circuit:
    edges = (Edge(Node.of(a), Node.of(b), weight) for a, b, weight in paths)
    return Circuit(tuple(edges), shared=shared)


INDUCTION = (("L1H0", "logits", 1.0), ("L0H2", "L1H0.k", 0.5), ("embed", "L0H2.v", -0.25))


def test_every_component_and_every_path_is_drawn():
    tree = ElementTree.fromstring(circuit_picture(circuit(*INDUCTION), "Why & how"))
    words = [text.text for text in tree.iter(f"{SPACE}text")]
    assert {"embed", "L0H2", "L1H0", "logits", "k", "v", "+0.50", "-0.25", "Why & how"} <= set(
        words
    )
    paths = [p for p in tree.iter(f"{SPACE}path") if "edge" in (p.get("class") or "")]
    wide = sorted(float(p.get("stroke-width") or 0) for p in paths)
    assert len(wide) == 3
    assert wide[2] > wide[1] > wide[0]
    assert sum("against" in (p.get("class") or "") for p in paths) == 1
    heights = {text.text: float(text.get("y") or 0) for text in tree.iter(f"{SPACE}text")}
    assert heights["logits"] < heights["L1H0"] < heights["L0H2"] < heights["embed"]


def test_shared_keys_lead_to_every_head_that_uses_them():
    paths = (("L1H2", "logits", 1.0), ("L1H3", "logits", 1.0), ("L0H0", "L1H1.k", 0.5))
    tree = ElementTree.fromstring(circuit_picture(circuit(*paths, shared=2)))
    drawn = [p for p in tree.iter(f"{SPACE}path") if "edge" in (p.get("class") or "")]
    assert len(drawn) == 4


def test_paths_keep_off_other_boxes():
    """From the embedding straight to the logits, past a head that stands between."""
    paths = (("embed", "logits", 1.0), ("L0H0", "logits", 0.5))
    tree = ElementTree.fromstring(circuit_picture(circuit(*paths)))
    drawn = [p.get("d") or "" for p in tree.iter(f"{SPACE}path")]
    straight = [d for d in drawn if len({x.split()[0].lstrip("MC") for x in d.split("C")}) == 1]
    assert len(drawn) == 2
    assert len(straight) == 1


def test_a_circuit_without_paths():
    with pytest.raises(ValueError, match="no paths"):
        circuit_picture(Circuit(()))
