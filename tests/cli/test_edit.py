"""`headwise edit` from the arguments to the patch file and the answers, offline."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from headwise.cli import main
from headwise.edits import KeyStatistics, Patch
from tests.cli import tiny
from tests.cli.command import refusal, spawn

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("offline_and_elsewhere")

FACT = ("--prompt", "A head looks", "--subject", "head", "--target", "up")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose layers say something: the others' tiny one is nearly the embedding alone."""
    folder = tiny.llama(tmp_path_factory.mktemp("models") / "tiny-llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
    return tiny.save(model, folder)


def edited(llama: Path, text: Path, *more: object) -> None:
    words = ["edit", llama, *FACT, "--text", text, "--out", "p.safetensors", "--quiet", *more]
    assert main([str(word) for word in words]) == 0


def test_a_fact_becomes_a_file_that_can_be_applied(
    llama: Path, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    """As a user does it, with nothing but the command."""
    done = spawn(
        "edit", llama, *FACT, "--text", text, "--out", "p.safetensors", "--layer", 0,
        "--paraphrase", "The head looks", "--neighbour", "A tail looks", "--neighbour", "It finds",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in ("rome", "layer 0", "the fact itself", "other wordings", "neighbours",
                  "loss on text", "before", "after", "p.safetensors"):  # fmt: skip
        assert words in done.stdout
    assert "target value" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "p.safetensors"}
    model = AutoModelForCausalLM.from_pretrained(llama)
    patch = Patch.load(tmp_path / "p.safetensors", model)
    assert patch.record["request"] == [
        {"prompt": "A head looks", "subject": "head", "target": "up"}
    ]
    effects = patch.record["effects"]
    (value,) = patch.record["values"]
    assert value["loss_after"] < value["loss_before"] - 0.3
    assert effects["efficacy"]["probability_after"] > effects["efficacy"]["probability_before"]
    assert effects["neighbours"]["asked"] == 2
    assert effects["loss"]["tokens"] > 50
    assert main(["edit", str(llama), "--apply", "p.safetensors", "--ask", "A head looks",
                 "--new-tokens", "3", "--quiet"]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "applied  p.safetensors" in said
    assert said.count("A head looks") == 1


def test_pmet_writes_into_several_layers(llama: Path, text: Path) -> None:
    edited(llama, text, "--method", "pmet", "--layer", "0", "--layer", "1", "--prefixes", "0")
    model = AutoModelForCausalLM.from_pretrained(llama)
    patch = Patch.load("p.safetensors", model)
    assert patch.record["method"] == "pmet"
    assert sorted(patch.deltas) == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    assert patch.record["prefixes"] == []


def test_statistics_are_kept_and_used_again(llama: Path, text: Path) -> None:
    more = ("--layer", "1", "--statistics", "c.safetensors", "--prefixes", "1")
    edited(llama, text, *more)
    kept = KeyStatistics.load("c.safetensors")
    assert sorted(kept.moments) == [1]
    first = Patch.load("p.safetensors")
    edited(llama, text, *more, "--force")
    second = Patch.load("p.safetensors")
    a, b = (next(iter(p.deltas.values())).tensors() for p in (first, second))
    torch.testing.assert_close(a["left"] @ a["right"], b["left"] @ b["right"], rtol=1e-3, atol=1e-5)
    assert second.record["statistics"]["tokens"] == kept.tokens


def test_the_patch_of_another_model_is_refused(
    llama: Path, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    edited(llama, text, "--layer", "0")
    other = tiny.llama(tmp_path / "other", layers=3)
    line = refusal(capsys, "edit", other, "--apply", "p.safetensors", "--ask", "A", "--quiet")
    assert "was made for tiny-llama with weights sha256:" in line


def test_what_is_wrong_is_said_before_anything_is_loaded(
    llama: Path, text: Path, capsys: Capture
) -> None:
    assert "nothing to do" in refusal(capsys, "edit", llama)
    assert "give --subject, --target" in refusal(capsys, "edit", llama, "--prompt", "A head")
    assert "no patch file none" in refusal(capsys, "edit", llama, "--apply", "none", "--ask", "A")
    Path("there").write_text("x")
    assert "there is there already" in refusal(capsys, "edit", llama, *FACT, "--out", "there")
    assert "--ask" in refusal(capsys, "edit", llama, "--apply", "there")
    assert "--text goes with" in refusal(
        capsys, "edit", llama, "--apply", "there", "--ask", "A", "--text", text
    )
    assert "needs --layer" in refusal(capsys, "edit", llama, *FACT, "--statistics", "new")
    assert "does not stand in the prompt" in refusal(
        capsys, "edit", llama, "--prompt", "A tail", "--subject", "head", "--target", "x",
        "--text", text, "--quiet",
    )  # fmt: skip
    assert Path("there").read_text() == "x"
