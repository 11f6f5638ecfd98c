"""Observed maps against the matrices that the models return themselves with eager attention."""

import pytest
import torch

from headwise.models import observe, view
from tests.models.families import ENCODER_DECODERS, FAMILIES, TEXTS, attentions, inputs, scores

CASES = [(name, None) for name in FAMILIES] + [
    (name, side) for name in TEXTS for side in ("left", "right")
]


def real_rows(name, given, attention, n_q):
    """Queries that are no padding, `(batch, n_q)`: what eager gives for the others is arbitrary."""
    mask = given.get("attention_mask")
    if mask is None or attention.kind == "cross" or attention.stack == "vision":
        return torch.ones(2, n_q, dtype=torch.bool)
    if name in ENCODER_DECODERS and attention.stack == "decoder":
        return torch.ones(2, n_q, dtype=torch.bool)
    return mask.bool()


@pytest.mark.parametrize(("name", "padding"), CASES)
def test_statistics_are_those_of_the_models_own_matrices(name, padding):
    model = FAMILIES[name]()
    given = inputs(model, padding=padding)
    seen = view(model)
    readings = []

    def read(r):
        some = torch.arange(0, r.query.shape[2], 2)
        parts = (r.map.entropy(), r.map.rows(some), some, r.map.max())
        readings.append((r.attention, *parts, r.map.dense(), r.map.received(), r.padding))

    with torch.no_grad():
        output = model(**given, output_attentions=True)
        with observe(seen, read):
            model(**given)
    theirs = attentions(name, output)
    assert len(readings) == len(seen.attentions)
    assert {r[0] for r in readings} == set(seen.attentions)
    for attention, entropy, rows, some, largest, dense, received, keys in readings:
        matrix = theirs[attention.stack, attention.kind][attention.layer]
        real = real_rows(name, given, attention, matrix.shape[2])
        want = -(matrix * matrix.clamp_min(1e-30).log()).sum(-1)
        close(entropy.transpose(1, 2)[real], want.transpose(1, 2)[real], 1e-4)
        close(largest.transpose(1, 2)[real], matrix.amax(-1).transpose(1, 2)[real])
        close(
            rows.transpose(1, 2)[real[:, some]], matrix[:, :, some].transpose(1, 2)[real[:, some]]
        )
        # rows that see nothing are zero here and uniform there: leave them out of the columns
        weighted = matrix * real[:, None, :, None]
        close((dense * real[:, None, :, None]).sum(2), weighted.sum(2), 1e-4)
        if bool(real.all()):
            close(received, matrix.sum(2), 1e-4)
        reaches = attention.kind == "cross" or name not in ENCODER_DECODERS
        if padding is None or attention.stack == "vision":
            assert keys is None
        elif reaches or attention.stack == "encoder":
            assert torch.equal(keys, given["attention_mask"].bool())


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "padding"), CASES)
def test_output_is_what_it_was(name, padding, implementation):
    if implementation == "sdpa" and name in ("gemma2", "gpt_oss"):
        pytest.skip("has no SDPA attention")
    model = FAMILIES[name](implementation)
    given = inputs(model, padding=padding)
    with torch.no_grad():
        before = scores(model(**given))
        with observe(view(model), lambda r: None, lambda r: None):
            during = scores(model(**given))
        after = scores(model(**given))
    assert torch.equal(before, after)
    if padding is not None and before.shape[1] == given["attention_mask"].shape[1]:
        real = given["attention_mask"].bool()
        before, during = before[real], during[real]
    close(during, before, 1e-5)


def state(model):
    """All that observation touches: implementations of every config, and hooks."""
    modules = list(model.modules())
    configs = {id(m.config): m.config for m in modules if hasattr(m, "config")}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
    return [c._attn_implementation for c in configs.values()], hooks


@pytest.mark.parametrize("name", ["llama", "clip", "t5", "whisper", "albert"])
def test_the_model_is_left_as_it_was_found(name):
    model = FAMILIES[name]("sdpa")
    if name == "clip":
        model.set_attn_implementation({"text_config": "eager"})
    before = state(model)
    seen = view(model)
    with torch.no_grad(), observe(seen, lambda r: None, lambda r: None):
        assert set(state(model)[0]) == {"headwise"}
        model(**inputs(model))
    assert state(model) == before

    class BoomError(Exception):
        pass

    def boom(reading):
        raise BoomError

    for read, read_layer in ((boom, None), (None, boom)):
        with pytest.raises(BoomError), torch.no_grad(), observe(seen, read, read_layer):
            model(**inputs(model))
        assert state(model) == before
    with torch.no_grad(), observe(seen, lambda r: None):  # and can be observed again
        model(**inputs(model))


def test_a_pass_that_raised_does_not_spoil_the_next_one():
    model = FAMILIES["llama"]()
    seen = view(model)
    given = inputs(model)
    layers = []
    fail = [True]

    def read(r):
        if fail[0] and r.attention.layer == 1:
            raise KeyError("once")

    with torch.no_grad(), observe(seen, read, lambda r: layers.append(r.layer.index)):
        with pytest.raises(KeyError, match="once"):
            model(**given)
        fail[0] = False
        layers.clear()
        model(**given)
    assert layers == [0, 1, 2]


def test_parts_may_run_alone():
    """generate() calls an encoder by itself; a tower of CLIP can be asked alone."""
    clip = FAMILIES["clip"]()
    seen = view(clip)
    names = []
    with torch.no_grad(), observe(seen, lambda r: names.append(r.attention.stack)):
        clip.get_image_features(pixel_values=inputs(clip)["pixel_values"])
    assert names == ["vision", "vision"]
    t5 = FAMILIES["t5"]()
    names.clear()
    with torch.no_grad(), observe(view(t5), lambda r: names.append(r.attention.stack)):
        encoded = t5.encoder(input_ids=inputs(t5)["input_ids"])
        t5(encoder_outputs=encoded, decoder_input_ids=torch.ones(2, 3, dtype=torch.long))
    assert names == ["encoder"] * 2 + ["decoder"] * 6


def test_two_models_at_once_but_no_model_twice():
    a, b = FAMILIES["llama"](), FAMILIES["gpt2"]()
    seen_a, seen_b = view(a), view(b)
    names = []
    with torch.no_grad(), observe(seen_a, lambda r: names.append("a")):
        with observe(seen_b, lambda r: names.append("b")):
            a(**inputs(a))
            b(**inputs(b))
        with pytest.raises(ValueError, match="observed already"), observe(seen_a, print):
            pass
        a(**inputs(a))
    assert names == ["a"] * 3 + ["b"] * 3 + ["a"] * 3
    assert a.config._attn_implementation == "eager"


def test_gradients_flow_through_an_observed_model():
    model = FAMILIES["llama"]()
    given = inputs(model)
    model(**given).logits.square().mean().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    grads = []
    with observe(view(model), lambda r: grads.append(r.query.requires_grad)):
        model(**given).logits.square().mean().backward()
    assert not any(grads)
    for name, p in model.named_parameters():
        if name in want:
            close(p.grad, want[name], 1e-4)


def test_bfloat16():
    model = FAMILIES["llama"]().to(torch.bfloat16)
    given = inputs(model)
    kinds = set()
    with torch.no_grad():
        before = model(**given).logits
        with observe(view(model), lambda r: kinds.add((r.query.dtype, r.map.entropy().dtype))):
            during = model(**given).logits
    assert kinds == {(torch.bfloat16, torch.float32)}
    torch.testing.assert_close(during, before, atol=0.1, rtol=0.1)
