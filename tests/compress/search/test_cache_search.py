from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.compress.search.asking import read_text
from headwise.compress.search.cache_search import search_cache
from headwise.compress.search.cache_settings import CacheSettings, cache_of, settings_of
from headwise.compress.search.cached_reading import Remembered, full_bytes, read_with_cache
from headwise.compress.search.searching import shrink
from headwise.compress.search.targets import Keep, UnreachableError
from headwise.models import UnsupportedModelError
from tests.instruments.tiny import bert, gpt_oss, llama, mistral


def ids(model: Any, batch: int, n: int) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, n), generator=torch.manual_seed(0))


def test_reading_in_pieces_with_all_that_is_kept_is_reading_at_once() -> None:
    model = llama().eval()
    tokens = ids(model, 3, 50)
    with torch.no_grad(), cache_of(model, CacheSettings()) as cache:
        found = read_with_cache(model, tokens, cache, piece=7)
        whole = model(input_ids=tokens).logits[:, 25:]
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [llama, mistral, gpt_oss])
def test_a_full_cache_is_as_large_as_that_of_transformers(make: Any) -> None:
    model = make().eval()
    tokens = ids(model, 2, 33)
    with torch.no_grad():
        held = model(input_ids=tokens, use_cache=True).past_key_values
    counted = sum(layer.keys.nbytes + layer.values.nbytes for layer in held.layers)
    assert full_bytes(model, tokens) == counted


def test_a_sliding_window_is_no_saving_of_ours() -> None:
    """What the model drops by itself is not counted; what is dropped beside it is."""
    model = mistral(window=40).eval()
    curve = shrink(model, "kv=0.6", ids(model, 4, 96))
    assert curve.points[0].left["kv"] == 1.0
    assert curve.met
    assert curve.cache is not None
    with torch.no_grad(), cache_of(model, curve.cache) as cache:
        read_with_cache(model, ids(model, 1, 96), cache)
        held = model(input_ids=ids(model, 1, 96), use_cache=True).past_key_values
    whole = sum(layer.keys.nbytes + layer.values.nbytes for layer in held.layers)
    assert 0.2 < cache.nbytes() / whole <= 0.6 * 1.001


def test_settings_come_back_from_a_file() -> None:
    made = CacheSettings("key norm", 0.5, "by layer", (0.25, 0.75), 4)
    assert settings_of(made.as_dict()) == made
    with pytest.raises(ValueError, match="expected"):
        settings_of({"policy": "key norm", "budget": 3})
    with pytest.raises(ValueError, match="expected one of"):
        CacheSettings("forget")


def test_settings_by_layer_are_told_by_what_the_layers_keep() -> None:
    # the share that they were made from may be capped while some layers keep less
    settings = CacheSettings("key norm", 1.0, "by layer", (0.25, 0.25, 1.0, 1.0), 8)
    assert str(settings) == "8 bits, key norm, by layer 0.625 of the tokens"
    assert str(CacheSettings("key norm", 1.0, "by layer", (1.0, 1.0), 8)) == "8 bits, all tokens"


def test_the_cache_that_is_found_is_within_the_bytes_and_resumes(tmp_path: Path) -> None:
    model = llama().eval()
    tokens = ids(model, 2, 160)
    whole = shrink(model, "kv=0.4", tokens)
    assert whole.met
    assert whole.best.left["kv"] <= 0.4
    assert whole.cache is not None
    assert whole.points[0].left["kv"] == 1.0
    with cache_of(model, whole.cache) as cache, torch.no_grad():
        read_with_cache(model, tokens[:1], cache)
        assert cache.nbytes() / full_bytes(model, tokens[:1]) <= 0.4

    class KilledError(Exception):
        pass

    said: list[str] = []

    def stop(words: str) -> None:
        said.append(words)
        if len(said) == 6:
            raise KilledError

    text = read_text(model, tokens)
    with pytest.raises(KilledError):
        search_cache(model, Keep("kv", 0.4), text, out=tmp_path / "kv", tell=stop)
    done = search_cache(model, Keep("kv", 0.4), text, out=tmp_path / "kv", resume=True)
    assert done.cache == whole.cache
    assert [p.quality for p in done.points] == [p.quality for p in whole.points]
    assert (tmp_path / "kv" / "model" / "config.json").is_file()


def test_what_has_no_cache_or_no_room_is_refused() -> None:
    model = llama().eval()
    with pytest.raises(UnreachableError, match="sinks and window") as refused:
        shrink(model, "kv=0.01", ids(model, 4, 64))
    assert refused.value.reachable > 0.01
    with pytest.raises(UnsupportedModelError, match="no cache"):
        shrink(bert().eval(), "kv=0.5", ids(bert(), 4, 16))


def test_a_search_that_is_killed_anywhere_measures_nothing_twice(tmp_path: Path) -> None:
    """Also while it measures what each layer needs."""

    class KilledError(Exception):
        pass

    model = llama(num_hidden_layers=3).eval()
    text = read_text(model, ids(model, 4, 96))
    told: list[str] = []
    far: list[tuple[int, int]] = []
    whole = search_cache(
        model, Keep("kv", 0.6), text, tell=told.append, step=lambda n, m, w: far.append((n, m))
    )
    assert sum("needs" in words for words in told) == 3
    assert [done for done, _ in far] == sorted(done for done, _ in far)
    assert all(done <= total for done, total in far)
    again: list[str] = []

    def stop(words: str) -> None:
        again.append(words)
        raise KilledError

    done = None
    while done is None:  # a line is told when its thing is measured, so the next run begins after
        try:
            begun = (tmp_path / "curve.json").exists()
            tell = stop if len(again) < 2 else again.append
            done = search_cache(model, Keep("kv", 0.6), text, out=tmp_path, resume=begun, tell=tell)
        except KilledError:
            continue
    assert done.about["needs"] == whole.about["needs"]
    assert done.about["tried"] == whole.about["tried"]
    assert done.cache == whole.cache


def test_what_the_original_says_is_remembered_as_far_as_it_fits() -> None:
    model = llama().eval()
    batches = read_text(model, ids(model, 4, 20)).calibration
    half = model(input_ids=batches[0].inputs["input_ids"]).logits[:, 10:].detach()
    for most in (half.numel(), 0):
        asked = Remembered(model, most)
        with torch.no_grad():
            first, second = asked(batches[0]), asked(batches[0])
        assert (first is second) == bool(most)
        torch.testing.assert_close(first, half, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(second, half, atol=1e-5, rtol=1e-5)


def test_bytes_are_the_same_when_no_answer_is_asked_for() -> None:
    model = llama().eval()
    tokens = ids(model, 2, 64)
    held = []
    for answers in (True, False):
        with torch.no_grad(), cache_of(model, CacheSettings("key norm", 0.5)) as cache:
            read_with_cache(model, tokens, cache, answers=answers)
            held.append(cache.nbytes())
    assert held[0] == held[1]


def test_widths_that_cannot_be_within_the_bytes_are_not_tried() -> None:
    model = llama().eval()
    text = read_text(model, ids(model, 4, 64))
    with pytest.raises(UnreachableError) as refused:
        shrink(model, "kv=0.01", ids(model, 4, 64))
    told: list[str] = []
    found = search_cache(model, Keep("kv", refused.value.reachable * 1.1), text, tell=told.append)
    assert found.met
    bits = {one["settings"]["bits"] for one in found.about["tried"].values()}
    assert None not in bits  # sinks and window alone are more than that
    assert told[0] == "measuring the smallest cache"
