"""Moved and scaled attention against dense matrices, on every family, with and without padding."""

import pytest
import torch

import headwise
from headwise.edits import CalibrateSinks, MoveMass, ScaleTokens
from headwise.edits.notation import read_changes
from headwise.models import view
from tests.edits import slow
from tests.edits.test_changes import CASES, close, first_readings
from tests.models.families import ENCODER_DECODERS, FAMILIES, inputs

HEADS = (1, 2)
TOKENS, TO = (1, 4, 7), (0, 2, 3)


def scaled(matrix, tokens, first):
    """Weights of TOKENS times 3, rows to their sum (a learned sink has a share of its own)."""
    out = matrix.clone()
    for r in range(len(matrix)):
        rest = 1 - float(matrix[r].sum())  # the learned sink, 0 where there is none
        for c, t in enumerate(tokens):
            if t in TOKENS:
                out[r, c] *= 3.0
        total = float(out[r].sum()) + rest
        out[r] = out[r] / total if total > 1e-9 else 0
    return out


def moved(to, share, rows=None):
    def change(matrix, tokens, first):
        out = matrix.clone()
        for r in range(len(matrix)):
            if rows is not None and first(r) not in rows:
                continue
            source = [c for c, t in enumerate(tokens) if t in TOKENS]
            goal = [c for c, t in enumerate(tokens) if t not in TOKENS and (to is None or t in to)]
            held = sum(float(matrix[r, c]) for c in source)
            theirs = sum(float(matrix[r, c]) for c in goal)
            if held == 0 or theirs == 0:
                continue
            for c in source:
                out[r, c] *= 1 - share
            for c in goal:
                out[r, c] *= 1 + share * held / theirs
        return out

    return change


CHANGES = {
    "scaled": (ScaleTokens(TOKENS, 3.0), scaled),
    "moved to all": (MoveMass(TOKENS, 0.6), moved(None, 0.6)),
    "moved to some": (MoveMass(TOKENS, 0.3, to=TO), moved(TO, 0.3)),
    "all moved": (MoveMass(TOKENS, 1.0, to=TO), moved(TO, 1.0)),
    "in some rows": (MoveMass(TOKENS, 0.5, queries=range(5, 9)), moved(None, 0.5, range(5, 9))),
}


@pytest.mark.parametrize(("name", "padding"), CASES)
def test_weights_are_what_is_written_out(name, padding):
    model = FAMILIES[name]("eager")
    given = inputs(model, padding=padding)
    look = view(model)
    plain = first_readings(model, given, look, 0)
    for (stack, kind), before in plain.items():
        starts = None
        reached = name not in ENCODER_DECODERS or stack == "encoder" or kind == "cross"
        if padding == "left" and reached and stack != "vision":
            starts = given["attention_mask"].argmax(-1)
        for change, write in CHANGES.values():
            if kind == "cross" and change.__class__ is MoveMass and change.queries is not None:
                continue
            with headwise.swap(look, {(stack, kind, 0, HEADS): change}):
                after = first_readings(model, given, look, 0)[stack, kind]
            torch.testing.assert_close(after.dense[:, [0, 3]], before.dense[:, [0, 3]])
            n_q, n_k = before.dense.shape[-2:]
            for b in range(2):
                p, t = slow.tokens(n_q, n_k, 0 if starts is None else int(starts[b]))
                for h in HEADS:
                    matrix = before.dense[b, h].double()
                    want = write(matrix, t, lambda r, p=p: p[r])
                    real = matrix.sum(-1) > 0
                    if starts is not None and kind == "self":
                        real = real & (torch.arange(n_q) >= int(starts[b]))
                    close(after.dense[b, h].double()[real], want[real], str(change))
                    out = slow.output(before, b, h, want)
                    close(after.out[b, h].double()[real], out[real], str(change))


@pytest.mark.parametrize("name", ["llama", "llama_mqa", "gpt2", "gemma2", "gpt_oss", "bert"])
def test_sinks_are_found_by_what_they_receive(name):
    model = FAMILIES[name]("eager")
    given, look = inputs(model), view(model)
    before = first_readings(model, given, look, 0)
    (place,) = before
    change = CalibrateSinks(alpha=1.3, keep=0.25)
    with headwise.swap(look, {(*place, 0): change}):
        after = first_readings(model, given, look, 0)[place]
    dense = before[place].dense.double()
    n = dense.shape[-1]
    found = 0
    for b in range(dense.shape[0]):
        for h in range(dense.shape[1]):
            want = dense[b, h].clone()
            sinks = [c for c in range(1, n) if float(dense[b, h, :, c].mean()) > 1.3 / n]
            rest = [c for c in range(1, n) if c not in sinks]
            found += len(sinks)
            for r in range(n):
                held = sum(float(dense[b, h, r, c]) for c in sinks)
                theirs = sum(float(dense[b, h, r, c]) for c in rest)
                if held == 0 or theirs == 0:
                    continue
                for c in sinks:
                    want[r, c] *= 0.25
                for c in rest:
                    want[r, c] *= 1 + 0.75 * held / theirs
            close(after.dense[b, h].double(), want, name)
    assert found > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
def test_decoding_with_a_cache_is_the_parallel_form(name):
    """Token numbers count in the whole sequence, also where one query reads a cache."""
    model = FAMILIES[name]("eager")
    ids = inputs(model)["input_ids"]
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    mask[0, 2:5], mask[1, 4:9] = True, True
    for change in (ScaleTokens(mask, 4.0), MoveMass(mask, 0.7, to=(0, 1))):
        with torch.no_grad(), headwise.swap(model, {"all": change}):
            whole = model(ids).logits
            cached = model(ids[:, :7], use_cache=True)
            steps = [cached.logits]
            for n in range(7, ids.shape[1]):
                cached = model(ids[:, n : n + 1], past_key_values=cached.past_key_values)
                steps.append(cached.logits)
        torch.testing.assert_close(torch.cat(steps, 1), whole, atol=2e-5, rtol=2e-5)


def test_a_row_for_each_sequence_serves_its_beams():
    model = FAMILIES["llama"]("sdpa")
    ids = inputs(model)["input_ids"]
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    mask[0, 2:5], mask[1, 4:9] = True, True
    with torch.no_grad(), headwise.swap(model, {"all": MoveMass(mask, 0.7)}):
        twice = model(ids.repeat_interleave(2, 0)).logits
        once = model(ids).logits
    torch.testing.assert_close(twice, once.repeat_interleave(2, 0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change", [MoveMass(TOKENS, 0.0), CalibrateSinks(keep=1.0), ScaleTokens(TOKENS, 1.0)]
)
def test_nothing_moved_changes_nothing(change):
    model = FAMILIES["llama"]("sdpa")
    given = inputs(model)
    with torch.no_grad():
        want = model(**given).logits
        with headwise.swap(model, {"all": change}):
            got = model(**given).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_gradients_pass_through_moved_mass():
    model = FAMILIES["llama"]("sdpa").double()
    ids = inputs(model)["input_ids"]
    look = view(model)
    weight = look.attentions[0].module.q_proj.weight
    with headwise.swap(model, {0: MoveMass(TOKENS, 0.5, to=TO)}):
        model(ids).logits[:, -1, 3].sum().backward()
        analytic = float(weight.grad[3, 2])
        sides = []
        with torch.no_grad():
            for step in (1e-3, -1e-3):  # norms compute in float32
                weight[3, 2] += step
                sides.append(float(model(ids).logits[:, -1, 3].sum()))
                weight[3, 2] -= step
    assert analytic == pytest.approx((sides[0] - sides[1]) / 2e-3, rel=1e-3)


def test_text_writes_them():
    assert repr(read_changes("movemass((1, 4), 0.5)")) == repr(MoveMass((1, 4), 0.5))
    assert read_changes("scaletokens(3, 2.0)").factor == 2.0
    assert read_changes("calibratesinks(4, keep=0.3)").keep == 0.3


def test_what_is_no_set_of_tokens_is_refused():
    for wrong in ("ab", 1.5, (1, -2), torch.ones(3), torch.ones(1, 1, 3, dtype=torch.bool), True):
        with pytest.raises(ValueError, match=r"give token numbers|counted from 0"):
            MoveMass(wrong, 0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        MoveMass(1, 1.5)
    with pytest.raises(ValueError, match="more than 0"):
        ScaleTokens(1, 0.0)
    with pytest.raises(ValueError, match="alpha > 0"):
        CalibrateSinks(alpha=0)
    model = FAMILIES["llama"]("sdpa")
    three = torch.zeros(3, 5, dtype=torch.bool)
    with (
        pytest.raises(ValueError, match="tokens of 3 sequences are given, 2 are running"),
        headwise.swap(model, {0: MoveMass(three, 0.5)}),
    ):
        model(**inputs(model))
