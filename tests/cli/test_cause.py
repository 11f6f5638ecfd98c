"""`headwise cause`: effects beside what was seen, kept when interrupted, never lost silently."""

import shlex
from pathlib import Path

import numpy as np
import pytest

from headwise.cli import main
from headwise.instruments import Atlas
from tests.cli import tiny
from tests.cli.command import refusal

Capture = pytest.CaptureFixture[str]

pytestmark = pytest.mark.usefixtures("offline_and_elsewhere")


@pytest.fixture
def words(llama: Path, text: Path) -> list[str]:
    return ["cause", str(llama), "--text", str(text), "--tokens", "24", "--windows", "4",
            "--batch-size", "2", "--quiet", "--threads", "1"]  # fmt: skip


def test_a_fresh_atlas_has_what_heads_do_and_what_they_cause(
    words: list[str], llama: Path, text: Path, capsys: Capture
) -> None:
    more = ["--what", "heads,layers,attention,mlp", "--estimate", "gradient,integrated"]
    assert main([*words, *more, "--atlas", "out"]) == 0
    said = capsys.readouterr().out
    assert "taken out: zero" in said
    assert "rank correlation of the gradient estimate with the exact effect" in said
    assert "residual share with the size of the effect" in said
    atlas = Atlas.load("out")
    assert {path.name for path in Path("out").iterdir()} == {"atlas.safetensors", "report.html"}
    for column in ("sink_mass", "effect", "effect_se", "effect_gradient", "effect_integrated"):
        assert np.isfinite(atlas.heads[column]).all()
    for column in ("layer_effect", "attention_effect", "mlp_effect", "mlp_effect_se"):
        assert np.isfinite(atlas.layers[column]).all()
    cause = atlas.provenance["cause"]
    assert (cause["metric"], cause["how"], cause["examples"]) == ("loss", "zero", 4)
    assert cause["command"].startswith("headwise cause")
    assert "--quiet" not in cause["command"]
    assert atlas.columns["effect"].description


def test_the_numbers_are_those_of_the_instrument(words: list[str], llama: Path, text: Path) -> None:
    from transformers import AutoModelForCausalLM

    from headwise.instruments import ablation

    assert main([*words, "--how", "mean", "--metric", "kl", "--atlas", "out"]) == 0
    model = AutoModelForCausalLM.from_pretrained(llama)
    known = ablation(
        model, [("t", text.read_text())], "kl", "mean", tokens=24, windows=4,
        tokenizer=tiny.tokenizer(),
    )  # fmt: skip
    assert np.allclose(Atlas.load("out").heads["effect"], known.heads["effect"], atol=1e-5)


def test_an_existing_atlas_keeps_what_it_has(
    words: list[str], llama: Path, text: Path, capsys: Capture
) -> None:
    see = ["see", str(llama), "--text", str(text), "--tokens", "32", "--out", "out", "--quiet"]
    assert main([*see, "--instruments", "shape,sinks"]) == 0
    before = Atlas.load("out")
    assert main([*words, "--atlas", "out"]) == 0
    after = Atlas.load("out")
    for name, values in before.heads.items():
        assert np.array_equal(values, after.heads[name], equal_nan=values.dtype.kind == "f")
    assert set(after.heads) - set(before.heads) == {"effect", "effect_se"}
    assert after.provenance["command"] == before.provenance["command"]
    assert "effect" in (Path("out") / "report.html").read_text(encoding="utf-8")

    line = refusal(capsys, *words, "--atlas", "out")
    assert "has effects already (loss, zero)" in line
    assert "--force" in line
    again = [*words, "--atlas", "out", "--how", "mean", "--estimate", "gradient", "--force"]
    assert main(again) == 0
    assert main([*words, "--atlas", "out", "--force"]) == 0
    last = Atlas.load("out")
    assert "effect_gradient" not in last.heads  # of another measurement
    assert np.array_equal(last.heads["effect"], after.heads["effect"])


def test_another_model_s_atlas_is_not_mixed_in(
    words: list[str], tmp_path: Path, text: Path, capsys: Capture
) -> None:
    other = tiny.gpt2(tmp_path / "other")
    see = ["see", str(other), "--text", str(text), "--tokens", "32", "--out", "out", "--quiet"]
    assert main([*see, "--instruments", "shape"]) == 0
    before = (Path("out") / "atlas.safetensors").read_bytes()
    assert "other weights" in refusal(capsys, *words, "--atlas", "out")
    assert (Path("out") / "atlas.safetensors").read_bytes() == before


def test_an_interrupted_run_goes_on(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from headwise.instruments.part_effects import Measurement

    whole = [*words, "--atlas", "whole"]
    assert main(whole) == 0
    effects, calls = Measurement.effects, []

    def once(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return effects(self, *args, **kwargs)

    broken = [*words, "--atlas", "broken"]
    with monkeypatch.context() as patched:
        patched.setattr(Measurement, "effects", once)
        capsys.readouterr()
        assert main(broken) == 130
    said = capsys.readouterr().err
    assert "2 finished examples are kept" in said
    program, *again = shlex.split(said.splitlines()[-1])
    assert program == "headwise"
    assert "effect" not in Atlas.load("broken").heads
    assert "unfinished run" in refusal(capsys, *broken)
    with monkeypatch.context() as patched:
        patched.setattr(
            Measurement, "effects", lambda *a, **k: (calls.append(1), effects(*a, **k))[1]
        )
        calls.clear()
        assert main([*again, "--quiet"]) == 0
    assert len(calls) == 1  # the second of two batches
    one, other = Atlas.load("broken"), Atlas.load("whole")
    assert np.array_equal(one.heads["effect"], other.heads["effect"])
    assert {path.name for path in Path("broken").iterdir()} == {"atlas.safetensors", "report.html"}
    assert "has effects already" in refusal(capsys, *broken)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--what", "head"], "did you mean 'heads'"),
        (["--estimate", "gradients"], "did you mean 'gradient'"),
        (["--no-exact"], "name an --estimate"),
        (["--reference", "x.txt"], "no text file 'x.txt'"),
        (["--metric", "accuracy", "--estimate", "gradient"], "accuracy has no gradient"),
        (["--how", "uniform", "--what", "mlp"], "goes with what='heads'"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    words: list[str], more: list[str], said: str, capsys: Capture
) -> None:
    assert said in refusal(capsys, *words, *more, "--atlas", "out")


def test_a_reference_needs_a_mean(words: list[str], text: Path, capsys: Capture) -> None:
    line = refusal(capsys, *words, "--reference", text, "--atlas", "out")
    assert "--how mean or --how resample" in line
    assert main([*words, "--reference", str(text), "--how", "mean", "--atlas", "out"]) == 0
    assert Atlas.load("out").provenance["cause"]["reference"] == 4
