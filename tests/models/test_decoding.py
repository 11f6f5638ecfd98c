"""Queries against a longer cache stand at its end."""

import pytest
import torch

from headwise.models import observe, view
from tests.models.families import FAMILIES, inputs, transformers

CUTS = (5, 9, 10, 11)  # a prefill, a chunk, and two single tokens


def whole(model, given):
    """Dense maps by layer, and logits, of one pass over everything."""
    maps = {}
    with (
        torch.no_grad(),
        observe(view(model), lambda r: maps.__setitem__(r.attention.layer, r.map.dense())),
    ):
        logits = model(**given).logits
    return maps, logits


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "mistral", "gemma2", "gemma3", "gpt_oss", "qwen2_window", "opt"]
)
def test_chunks_against_a_cache_are_rows_of_the_whole(name, padding):
    model = FAMILIES[name]()
    given = inputs(model, padding=padding)
    maps, logits = whole(model, given)
    cache = transformers.DynamicCache(config=model.config)
    ids, mask = given["input_ids"], given.get("attention_mask")
    seen, start = view(model), 0
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    for stop in CUTS:
        pieces = {}
        with (
            torch.no_grad(),
            observe(
                seen,
                lambda r, into=pieces: into.__setitem__(r.attention.layer, (r.map.dense(), r.out)),
            ),
        ):
            step = {"input_ids": ids[:, start:stop], "past_key_values": cache}
            if mask is not None:
                step["attention_mask"] = mask[:, :stop]
            part = model(**step).logits
        here = real[:, start:stop]
        torch.testing.assert_close(part[here], logits[:, start:stop][here], atol=2e-4, rtol=2e-4)
        for layer, (piece, _) in pieces.items():
            first = stop - piece.shape[-1]  # a sliding cache has forgotten the keys before
            want = maps[layer][:, :, start:stop, first:stop]
            torch.testing.assert_close(piece, want, atol=2e-5, rtol=2e-5)
        start = stop


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_cache_with_room_to_spare(name):
    """A static cache hands over keys that are not there yet; queries do not stand at its end."""
    model = FAMILIES[name]("sdpa")
    ids = inputs(model)["input_ids"]
    maps, logits = whole(model, {"input_ids": ids})
    cache = transformers.StaticCache(config=model.config, max_cache_len=20)
    start = 0
    for stop in CUTS:
        pieces = []
        with (
            torch.no_grad(),
            observe(view(model), lambda r, into=pieces: into.append(r.map.dense())),
        ):
            part = model(input_ids=ids[:, start:stop], past_key_values=cache).logits
        torch.testing.assert_close(part, logits[:, start:stop], atol=2e-4, rtol=2e-4)
        if name == "llama":
            for layer, piece in enumerate(pieces):
                want = maps[layer][:, :, start:stop, :stop]
                torch.testing.assert_close(piece[..., :stop], want, atol=2e-5, rtol=2e-5)
                assert not piece[..., stop:].any()
        start = stop


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("name", ["llama", "gemma3", "bart", "t5", "whisper"])
def test_generation_is_what_it_was(name, how):
    # T5 sizes its caches by the encoder's layers, so both stacks have three here
    model = FAMILIES[name]("sdpa", **({"num_layers": 3} if name == "t5" else {}))
    given = {k: v for k, v in inputs(model).items() if not k.startswith("decoder")}
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **how}
    if name == "whisper":
        how |= {"decoder_input_ids": inputs(model)["decoder_input_ids"]}
    want = model.generate(**given, **how)
    steps = []
    with observe(view(model), lambda r: steps.append((r.attention.stack, r.query.shape[2]))):
        got = model.generate(**given, **how)
    assert torch.equal(got, want)
    # 4 passes of the decoder; an encoder runs once, and by itself
    seen = view(model)
    per_pass = sum(a.stack == "decoder" for a in seen.attentions)
    assert sum(stack == "decoder" for stack, _ in steps) == 4 * per_pass
    once = sum(a.stack == "encoder" for a in seen.attentions)
    assert sum(stack == "encoder" for stack, _ in steps) == once
