"""The Atlas as a table: lookups, files, frames, and errors that say what to do."""

import builtins
import json
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from headwise.instruments.atlas import Atlas, AtlasFileError, Column

TRICKY = '\ud800 lone, Ġé 🙂 \x00 " \\ </script>'


def an_atlas(**changes: Any) -> Atlas:
    """2 layers of 3 heads with every part filled, awkward values among them."""
    rng = np.random.default_rng(0)
    heads: dict[str, Any] = {
        "layer": np.repeat([0, 1], 3),
        "head": np.tile([0, 1, 2], 2),
        "kind": ["sink", "induction", "mixed", "sink", "local", "induction"],
        "entropy": np.array([0.5, np.nan, 3.0, -0.0, np.inf, 5e-324]),
        "sink_mass": np.array([0.9, 0.1, 0.2, 0.8, 0.3, np.nan]),
        "similar_to": np.array([1, 0, -1, 5, 5, 3]),
    }
    parts: dict[str, Any] = {
        "layers": {"layer": np.arange(2), "residual_norm": np.array([1.5, np.nan])},
        "pairs": {
            "similarity": rng.normal(size=(6, 6)),
            "similarity_se": rng.normal(size=(6, 6)).astype(np.float32),
        },
        "spread": {"entropy": rng.normal(size=6)},
        "reasons": [f"because {i}" for i in range(6)],
        "tiles": [
            {
                "head": 4,
                "start": 7,
                "tokens": ["a", TRICKY],
                "weights": rng.normal(size=(2, 2)).astype(np.float32),
            }
        ],
        "provenance": {
            "model": "toy",
            "texts": [{"name": "t", "sha256": "0", "tokens": 2048}],
            "dtype": "float32",
            "seconds": 1.25,
            "settings": {"seed": 0, "out": None},
        },
    }
    parts.update(changes)
    heads.update(parts.pop("heads", {}))
    return Atlas(heads=heads, **parts)


def an_encoder_decoder() -> Atlas:
    """One head number in three places."""
    return Atlas(
        heads={
            "stack": np.array(["encoder", "decoder", "decoder"]),
            "attention": np.array(["self", "self", "cross"]),
            "layer": np.zeros(3, dtype=np.int64),
            "head": np.zeros(3, dtype=np.int64),
            "kind": np.array(["broad", "sink", "broad"]),
            "entropy": np.array([1.0, 2.0, 3.0]),
        }
    )


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype.kind == "U":  # the width of the dtype is no part of the text
        return a.tolist() == b.tolist()
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(path: Path, header: dict[str, Any], body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


# files


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    atlas = an_atlas()
    back = Atlas.load(atlas.save(tmp_path / "a.safetensors"))
    for table in ("heads", "layers", "pairs", "spread"):
        before, after = getattr(atlas, table), getattr(back, table)
        assert list(before) == list(after), table  # the order of columns is kept too
        for name in before:
            assert same_bits(before[name], after[name]), f"{table}/{name}"
    assert back.reasons == atlas.reasons
    assert back.columns == atlas.columns
    assert back.provenance == atlas.provenance
    assert back.tiles[0]["tokens"] == ["a", TRICKY]
    assert same_bits(back.tiles[0]["weights"], atlas.tiles[0]["weights"])
    assert {k: v for k, v in back.tiles[0].items() if k in ("head", "start")} == {
        "head": 4,
        "start": 7,
    }


def test_signalling_nan_payload_survives(tmp_path: Path) -> None:
    payload = np.frombuffer(struct.pack("<6Q", *[0x7FF0000000000001 + i for i in range(6)]))
    atlas = an_atlas(heads={"entropy": payload})
    back = Atlas.load(atlas.save(tmp_path / "a"))
    assert back.heads["entropy"].tobytes() == payload.tobytes()


def test_views_and_byte_orders_are_stored_by_value(tmp_path: Path) -> None:
    square = np.arange(36.0).reshape(6, 6)
    atlas = an_atlas(pairs={"t": square.T, "big": square.astype(">f8"), "step": square[::-1]})
    back = Atlas.load(atlas.save(tmp_path / "a"))
    np.testing.assert_array_equal(back.pairs["t"], square.T)
    np.testing.assert_array_equal(back.pairs["big"], square)
    np.testing.assert_array_equal(back.pairs["step"], square[::-1])


def test_smallest_atlas_round_trips(tmp_path: Path) -> None:
    empty = Atlas(
        heads={
            "layer": np.zeros(0, np.int64),
            "head": np.zeros(0, np.int64),
            "kind": np.zeros(0, "U1"),
        }
    )
    back = Atlas.load(empty.save(tmp_path / "a"))
    assert len(back) == 0
    assert list(back.heads) == ["layer", "head", "kind"]
    assert back.heads["kind"].dtype.kind == "U"
    assert "0 heads" in repr(back)


def test_any_safetensors_reader_can_read_it(tmp_path: Path) -> None:
    path = an_atlas().save(tmp_path / "a.safetensors")
    with safe_open(path, framework="numpy") as file:
        assert np.isnan(file.get_tensor("heads/entropy")[1])
        metadata = file.metadata()
    assert metadata["format"] == "headwise-atlas"

    def no_constants(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    plain = json.loads(metadata["atlas"], parse_constant=no_constants)
    assert plain["names"]["heads"]["kind"][1] == "induction"


def test_provenance_of_awkward_types_is_saved(tmp_path: Path) -> None:
    atlas = an_atlas(
        provenance={
            "path": Path("m"),
            "n": np.int64(3),
            "x": float("nan"),
            "t": (1, np.float32(0.5)),
            "a": np.arange(2),
        }
    )
    back = Atlas.load(atlas.save(tmp_path / "a"))
    assert back.provenance == {"path": "m", "n": 3, "x": None, "t": [1, 0.5], "a": [0, 1]}


def test_numbers_that_no_file_holds_are_refused_by_name(tmp_path: Path) -> None:
    atlas = an_atlas(heads={"entropy": np.zeros(6, dtype=np.complex128)})
    with pytest.raises(TypeError, match=r"heads\['entropy'\].*complex128"):
        atlas.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file_and_no_scraps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = an_atlas().save(tmp_path / "a.safetensors")
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        an_encoder_decoder().save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_save_replaces_in_one_step_from_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Path, Path, bool]] = []
    synced: list[int] = []
    real_replace, real_sync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), real_sync(fd)))

    def replace(source: Any, target: Any) -> None:
        seen.append((Path(source), Path(target), bool(synced)))
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    path = an_atlas().save(tmp_path / "new" / "a.safetensors")
    ((source, target, synced_first),) = seen
    assert source.parent == target.parent == path.parent
    assert synced_first
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_load_from_a_folder(tmp_path: Path) -> None:
    an_atlas().save(tmp_path / "atlas.safetensors")
    assert len(Atlas.load(tmp_path)) == 6


def test_files_that_are_no_atlas(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(FileNotFoundError, match="no atlas at"):
        Atlas.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"atlas\.safetensors"):
        Atlas.load(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(AtlasFileError, match="is empty"):
        Atlas.load(tmp_path / "empty")
    (tmp_path / "text").write_text("hello, this is no tensor file at all")
    with pytest.raises(AtlasFileError, match="not an atlas: it is not a safetensors file"):
        Atlas.load(tmp_path / "text")
    save_file({"x": np.zeros(3)}, tmp_path / "weights")
    with pytest.raises(AtlasFileError, match="is a safetensors file but not an atlas"):
        Atlas.load(tmp_path / "weights")


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = an_atlas().save(tmp_path / "a")
    whole = path.read_bytes()
    for end in (4, 9, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(AtlasFileError, match=str(path)):
            Atlas.load(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(AtlasFileError, match="truncated or damaged"):
        Atlas.load(path)


def test_a_newer_version_is_named(tmp_path: Path) -> None:
    path = an_atlas().save(tmp_path / "a")
    header, body = header_of(path)
    header["__metadata__"]["version"] = "99"
    with_header(path, header, body)
    with pytest.raises(AtlasFileError, match=r"version 99.*reads up to 1: update headwise"):
        Atlas.load(path)


# tables


def test_tables_that_do_not_fit_together() -> None:
    with pytest.raises(ValueError, match="needs the head column 'head'"):
        Atlas(heads={"layer": np.zeros(2, int)})
    with pytest.raises(ValueError, match=r"heads\['entropy'\] has shape \(5,\), expected \(6,\)"):
        an_atlas(heads={"entropy": np.zeros(5)})
    with pytest.raises(ValueError, match=r"pairs\['p'\].*expected \(6, 6\)"):
        an_atlas(pairs={"p": np.zeros((6, 5))})
    with pytest.raises(ValueError, match="spread"):
        an_atlas(spread={"entropy": np.zeros(1)})
    with pytest.raises(ValueError, match="layers"):
        an_atlas(layers={"layer": np.zeros(2), "x": np.zeros(3)})
    with pytest.raises(ValueError, match="2 reasons for 6 heads"):
        an_atlas(reasons=["a", "b"])


def test_columns_are_described() -> None:
    atlas = an_atlas(
        heads={"own": np.zeros(6)},
        columns={"entropy": Column("entropy", "bits", "Not the usual one.", "here")},
    )
    assert atlas.describe("entropy") == "entropy [bits]: Not the usual one. Source: here."
    assert atlas.describe("sink_mass").startswith("sink_mass [share]: Mass on the first token")
    assert "no description" in atlas.describe("own")
    assert atlas.columns["residual_norm"].unit == "norm"
    with pytest.raises(KeyError, match="no head column 'entrpoy'; the atlas has layer, head"):
        atlas.describe("entrpoy")


def test_frame() -> None:
    pandas = pytest.importorskip("pandas")
    atlas = an_atlas()
    frame = atlas.frame()
    assert list(frame.columns) == list(atlas.heads)
    assert frame.loc[frame.entropy.isna(), ["layer", "head"]].to_numpy().tolist() == [[0, 1]]
    assert pandas.api.types.is_integer_dtype(frame["layer"])
    assert frame.groupby("kind").size()["sink"] == 2
    assert len(atlas.layer_frame()) == 2


def test_frame_without_pandas_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_pandas(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pandas":
            raise ImportError("No module named 'pandas'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_pandas)
    with pytest.raises(ImportError, match=r"pip install 'headwise\[frame\]'"):
        an_atlas().frame()


def test_head() -> None:
    record = an_atlas().head(1, 1)
    assert record["row"] == 4
    assert record["kind"] == "local"
    assert record["reason"] == "because 4"
    assert type(record["sink_mass"]) is float
    assert type(record["layer"]) is int
    with pytest.raises(LookupError, match=r"no head at layer 2, head 0; .*layers 0 to 1 and heads"):
        an_atlas().head(2, 0)


def test_head_of_an_encoder_decoder() -> None:
    atlas = an_encoder_decoder()
    with pytest.raises(LookupError, match=r"several heads.*encoder self L0H0.*give stack="):
        atlas.head(0, 0)
    assert atlas.head(0, 0, stack="decoder", attention="cross")["entropy"] == 3.0
    assert atlas.head(0, 0, stack="encoder")["entropy"] == 1.0
    with pytest.raises(ValueError, match="no stack 'vision' in this atlas; it has decoder, enc"):
        atlas.head(0, 0, stack="vision")
    with pytest.raises(ValueError, match="no such column"):
        an_atlas().head(0, 0, stack="decoder")


def test_top() -> None:
    atlas = an_atlas()
    assert [entry["row"] for entry in atlas.top("sink_mass", 2)] == [0, 3]
    assert [entry["row"] for entry in atlas.top("sink_mass", 2, smallest=True)] == [1, 2]
    assert len(atlas.top("sink_mass", 99)) == 5  # NaN is no value
    assert atlas.top("similar_to", 1)[0] == {
        "row": 3,
        "layer": 1,
        "head": 0,
        "kind": "sink",
        "similar_to": 5,
        "reason": "because 3",
    }
    with pytest.raises(KeyError, match="no head column 'sink'"):
        atlas.top("sink")
    with pytest.raises(TypeError, match="holds names"):
        atlas.top("kind")


def test_where_gives_lists_for_edits() -> None:
    atlas = an_atlas()
    assert atlas.heads_of("sink") == [(0, 0), (1, 0)]
    assert atlas.where(kind=("local", "mixed")) == [(0, 2), (1, 1)]
    assert atlas.where(atlas.heads["sink_mass"] > 0.5) == [(0, 0), (1, 0)]
    assert atlas.where(atlas.heads["layer"] == 1, kind="induction") == [(1, 2)]
    assert atlas.heads_of("retrieval") == []
    assert all(type(n) is int for pair in atlas.where() for n in pair)
    with pytest.raises(ValueError, match="no kind 'inductoin'; kinds are previous-token"):
        atlas.heads_of("inductoin")
    with pytest.raises(ValueError, match=r"mask has shape \(2,\)"):
        atlas.where([True, False])
    with pytest.raises(ValueError, match="dtype int"):
        atlas.where(np.arange(6))


def test_where_does_not_mix_up_stacks() -> None:
    atlas = an_encoder_decoder()
    with pytest.raises(ValueError, match="several stacks"):
        atlas.heads_of("broad")
    assert atlas.heads_of("broad", stack="encoder") == [(0, 0)]
    assert atlas.heads_of("sink") == [(0, 0)]  # all in one place: nothing to tell apart
    with pytest.raises(ValueError, match="several attentions"):
        atlas.where(stack="decoder")


def test_repr_says_what_it_holds() -> None:
    text = repr(an_atlas())
    for part in ("Atlas of toy", "6 heads in 2 layers", "2,048 tokens", "induction 2", "sink_mass"):
        assert part in text
    assert "3 heads in 2 layers" in repr(an_encoder_decoder())


def test_html_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    atlas = an_atlas(provenance={"model": evil}, reasons=[f'"{evil}'] * 6)
    html = atlas._repr_html_()
    assert "<script" not in html
    assert html.count("L0H1 induction") == 1
    assert an_encoder_decoder()._repr_html_().count("title=") == 3 + 2


def test_loading_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    path = an_atlas().save(tmp_path / "a")
    code = (
        "import sys; from headwise.instruments import Atlas; "
        f"a = Atlas.load({str(path)!r}); repr(a); "
        "print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
