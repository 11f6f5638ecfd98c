"""Masks are recognised as patterns, and nothing of size n x n is built on the way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from headwise.maps import Causal, Documents, Full, KeyMask, Mask, Padding, Predicate, Window
from headwise.maps.pattern import And
from headwise.models import UnsupportedModelError, observe, view
from headwise.models.masks import PatternMask, mask_function, pattern_of
from headwise.models.rule import Rule, agrees, recognise
from tests.models.families import FAMILIES, inputs, transformers

masking = transformers.masking_utils


def chunked(size, *padding):
    return masking.chunked_causal_mask_function(size, torch.tensor(padding))


def packed(batch, n, rule):
    ids = torch.stack([(torch.arange(n) + 3 * b) // 5 for b in range(batch)])
    position = torch.stack([(torch.arange(n) + 3 * b) % 5 for b in range(batch)])
    return masking.packed_sequence_compatibility_function(rule, position, ids)


WINDOW = masking.sliding_window_causal_mask_function
TWO_SIDED = masking.sliding_window_bidirectional_mask_function
RULES = {
    "causal": (masking.causal_mask_function, Causal),
    "full": (masking.bidirectional_mask_function, Full),
    "window": (WINDOW(4), Window),
    "window of one": (WINDOW(1), Window),
    "two-sided window": (TWO_SIDED(3), Window),
    "chunks": (chunked(5, 0, 2), And),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("n_q", "n_k", "q_offset", "kv_offset"),
    [
        (13, 13, 0, 0),
        (1, 1, 0, 0),
        (1, 13, 12, 0),  # one token against a cache
        (4, 13, 9, 0),  # a chunk against a cache
        (1, 4, 20, 17),  # a sliding cache, which has forgotten the first keys
        (3, 7, 20, 16),
        (5, 16, 0, 0),  # a static cache with room to spare, at its start
        (1, 16, 8, 0),  # and later
        (7, 3, 0, 0),  # more queries than keys (cross-attention)
    ],
)
def test_patterns_equal_transformers_own_masks(name, n_q, n_k, q_offset, kv_offset):
    rule, kind = RULES[name]
    sizes = {"q_length": n_q, "kv_length": n_k, "q_offset": q_offset, "kv_offset": kv_offset}
    mask = mask_function(2, **sizes, mask_function=rule)
    want = masking.sdpa_mask(2, **sizes, mask_function=rule, allow_is_causal_skip=False)
    assert torch.equal(mask.dense(), want)
    if n_q == n_k > 1:
        assert isinstance(mask.pattern, kind)


def test_windows_count_as_transformers_does():
    def of(rule, n=30):
        return mask_function(1, n, n, mask_function=rule).pattern

    assert of(WINDOW(4)) == Window(4)
    assert of(TWO_SIDED(3)) == Window(4, 3)
    assert of(masking.causal_mask_function) == Causal()
    assert of(WINDOW(40)) == Causal()  # a window longer than the text limits nothing


def test_room_to_spare_shifts_the_window():
    def of(rule, n_q, q_offset):
        return mask_function(1, n_q, 16, q_offset=q_offset, mask_function=rule).pattern

    assert of(masking.causal_mask_function, 5, 0) == Window(None, -11)
    assert of(masking.causal_mask_function, 1, 7) == Window(None, -8)
    assert of(WINDOW(4), 5, 6) == Window(9, -5)
    assert of(masking.bidirectional_mask_function, 5, 0) == Full()


@settings(deadline=None, max_examples=150)
@given(
    rule=st.one_of(
        st.just(masking.causal_mask_function),
        st.just(masking.bidirectional_mask_function),
        st.integers(1, 20).map(WINDOW),
        st.integers(0, 20).map(TWO_SIDED),
        st.tuples(st.integers(1, 20), st.integers(0, 5)).map(lambda t: chunked(t[0], 0, t[1])),
    ),
    n_q=st.integers(1, 24),
    more=st.integers(0, 24),
    spare=st.integers(0, 5),
    kv_offset=st.integers(0, 9),
    padded=st.integers(-24, 24),
)
def test_any_mask_equals_transformers_own(rule, n_q, more, spare, kv_offset, padded):
    """A cache of `more` keys, `spare` places after the queries, `padded` at the left or right."""
    n_k = n_q + more + spare
    real = torch.ones(2, n_k + kv_offset).bool()
    if padded > 0:
        real[1, : min(padded, n_k - 1) + kv_offset] = False
    elif padded < 0:
        real[1, padded:] = False
    sizes = (2, n_q, n_k, kv_offset + more, kv_offset, rule, real)
    want = masking.sdpa_mask(*sizes, allow_is_causal_skip=False)
    assert torch.equal(mask_function(*sizes).dense(), want)


def test_packed_sequences_are_documents():
    rule = packed(2, 12, masking.causal_mask_function)
    pattern = mask_function(2, 12, 12, mask_function=rule).pattern
    assert isinstance(pattern, And)
    assert isinstance(pattern.a, Documents)
    assert pattern.b == Causal()
    want = masking.sdpa_mask(2, 12, 12, mask_function=rule, allow_is_causal_skip=False)
    assert torch.equal(pattern.mask(12, 12, 2), want)
    windowed = packed(1, 40, WINDOW(3))
    pattern = mask_function(1, 40, 40, mask_function=windowed).pattern
    want = masking.sdpa_mask(1, 40, 40, mask_function=windowed, allow_is_causal_skip=False)
    assert torch.equal(pattern.mask(40, 40, 1), want)


@pytest.mark.parametrize(
    ("real", "kind"),
    [
        ([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], Padding),
        ([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]], Padding),
        ([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], KeyMask),
        ([[1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], KeyMask),
        ([[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], Padding),
    ],
)
def test_padding(real, kind):
    real = torch.tensor(real).bool()
    mask = mask_function(2, 6, 6, attention_mask=real)
    assert mask.pattern.a == Causal()
    assert isinstance(mask.pattern.b, kind)
    assert torch.equal(mask.keys, real)
    want = masking.sdpa_mask(2, 6, 6, attention_mask=real, allow_is_causal_skip=False)
    assert torch.equal(mask.dense(), want)
    # a longer cache than the mask knows of: what it does not reach is not there
    mask = mask_function(2, 1, 9, q_offset=5, attention_mask=real)
    want = masking.sdpa_mask(2, 1, 9, 5, attention_mask=real, allow_is_causal_skip=False)
    assert torch.equal(mask.dense(), want)
    assert mask_function(2, 6, 6, attention_mask=torch.ones(2, 6).bool()).pattern == Causal()


def prefix(b, h, q, k):
    return (k <= q) | (k < 5)


def sinks_and_window(b, h, q, k):
    return (k <= q) & ((k > q - 4) | (k < 2))


def one_hole(b, h, q, k):
    return (k <= q) & ~((q == 11) & (k == 3))


def second_sequence_only(b, h, q, k):
    return (k <= q) & ((b == 0) | (k % 3 == 0) | (k == q))


@pytest.mark.parametrize("n", [16, 1500])
@pytest.mark.parametrize("rule", [prefix, sinks_and_window, second_sequence_only])
def test_what_is_no_pattern_is_taken_as_it_is(rule, n):
    pattern = mask_function(2, n, n, mask_function=rule).pattern
    assert isinstance(pattern, Predicate)
    want = masking.sdpa_mask(2, n, n, mask_function=rule, allow_is_causal_skip=False)
    assert torch.equal(pattern.mask(n, n, 2), want.expand(2, 1, n, n))


def test_a_single_hole_in_a_small_mask_is_found():
    assert isinstance(mask_function(1, 16, 16, mask_function=one_hole).pattern, Predicate)
    assert agrees(Rule(one_hole, 1, 16, 16), Predicate(one_hole))
    assert not agrees(Rule(one_hole, 1, 16, 16), Causal())


def for_single_indices(b, h, q, k):
    """As somebody may write it for vmap: `any` joins what broadcasting keeps apart."""
    return torch.stack([k <= q, k == 0]).any()


def test_functions_for_single_indices_are_tabulated():
    rule = Rule(for_single_indices, 2, 6, 6, vectorised=False)
    assert isinstance(recognise(rule), Mask)
    mask = mask_function(2, 6, 6, mask_function=for_single_indices, use_vmap=True)
    want = masking.sdpa_mask(2, 6, 6, allow_is_causal_skip=False)
    assert torch.equal(mask.dense(), want)
    # but one that takes tensors just as well is asked with tensors
    mask = mask_function(2, 6, 6, mask_function=WINDOW(2), use_vmap=True)
    assert mask.pattern == Window(2)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().size())
        return made


@pytest.mark.parametrize(
    "rule", [masking.causal_mask_function, WINDOW(512), TWO_SIDED(64), chunked(4096, 0)]
)
def test_long_masks_stay_small(rule):
    n = 32_768
    with Largest() as largest:
        mask = mask_function(1, n, n, mask_function=rule)
    assert mask.shape == (1, 1, n, n)
    assert not isinstance(mask.pattern, (Mask, Predicate))
    assert largest.numbers < n * n / 30  # bytes


@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        ("llama", [Causal()]),
        ("mistral", [Window(4)]),
        ("gemma2", [Window(4), Causal()]),
        ("gemma3", [Window(4), Causal()]),
        ("gpt_oss", [Window(4), Causal()]),
        ("modernbert", [Full(), Window(4, 3)]),
        ("vit", [Full()]),
        ("whisper", [Full(), Causal()]),
    ],
)
def test_models_hand_over_patterns(name, patterns):
    model = FAMILIES[name]("sdpa" if name not in ("gemma2", "gpt_oss") else "eager")
    found = []
    with torch.no_grad(), observe(view(model), lambda r: found.append(r.map.scores.pattern)):
        model(**inputs(model))
    assert list(dict.fromkeys(found)) == patterns


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "bert"])
def test_instruments_never_get_n_by_n(name):
    model = FAMILIES[name](**{"n_positions" if name == "gpt2" else "max_position_embeddings": 2048})
    n = 2000

    def read(r):
        with Largest() as largest:
            r.map.summary()
        assert largest.numbers < 4 * n * n

    given = inputs(model, n)
    head_by_head = 2 * 4 * n * n * 4  # bytes of one layer's matrices
    with torch.no_grad(), Largest() as largest, observe(view(model), read):
        model.base_model(**given)
    assert largest.numbers < head_by_head / 4


def test_ready_made_masks():
    model = FAMILIES["llama"]("sdpa")
    given = inputs(model)
    n = given["input_ids"].shape[1]
    boolean = torch.rand(2, 1, n, n) > 0.4
    boolean |= torch.eye(n).bool()
    additive = torch.randn(2, 1, n, n).masked_fill(~boolean, torch.finfo(torch.float32).min)
    for mask, bias in ((boolean, False), (additive, True)):
        found = []
        with torch.no_grad():
            before = model(input_ids=given["input_ids"], attention_mask=mask).logits
            with observe(view(model), lambda r, found=found: found.append(r.map.scores)):
                during = model(input_ids=given["input_ids"], attention_mask=mask).logits
        torch.testing.assert_close(during, before, atol=1e-5, rtol=1e-5)
        assert isinstance(found[0].pattern, Mask)
        assert torch.equal(found[0].pattern.table, boolean)
        assert (found[0].bias is not None) == bias


def test_masks_that_mean_nothing_here_are_refused():
    with pytest.raises(UnsupportedModelError, match="reached an attention of 5 queries and 5 keys"):
        pattern_of(torch.ones(2, 5).bool(), 5, 5)
    with pytest.raises(UnsupportedModelError, match="of 5 queries and 4 keys"):
        pattern_of(mask_function(1, 5, 5), 5, 4)
    with pytest.raises(UnsupportedModelError, match=r"torch\.int64"):
        pattern_of(torch.ones(1, 1, 5, 5).long(), 5, 5)


def test_a_model_may_compute_with_its_mask():
    """It gets the tensor that its own implementation would have built."""
    boolean = mask_function(2, 5, 5)
    want = masking.sdpa_mask(2, 5, 5, allow_is_causal_skip=False)
    assert torch.equal(boolean[:, :, 1:3], want[:, :, 1:3])
    assert torch.equal(~boolean, ~want)
    assert isinstance(boolean.contiguous(), PatternMask)  # nothing was computed
    additive = PatternMask.of(Causal(), (2, 5, 5), dtype=torch.float32)
    want = masking.eager_mask(2, 5, 5)
    assert torch.equal(additive + 1.0, want + 1.0)
    longer = torch.cat([additive, torch.zeros(2, 1, 5, 2)], -1)
    pattern, bias, _ = pattern_of(longer, 5, 7)
    assert bias is None
    assert torch.equal(pattern.table, longer == 0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_models_that_join_their_mask_are_observed_rightly(implementation):
    model = FAMILIES["llama"](implementation)
    for layer in model.model.layers:  # attend to nothing new, but touch the mask on the way
        own = layer.self_attn.forward

        def touched(hidden_states, attention_mask=None, own=own, **more):
            if attention_mask is not None:
                parts = attention_mask[..., :4], attention_mask[..., 4:]
                attention_mask = torch.cat(parts, -1)
            return own(hidden_states=hidden_states, attention_mask=attention_mask, **more)

        layer.self_attn.forward = touched
    given = inputs(model, padding="right")
    found = []
    with torch.no_grad():
        before = model(**given).logits
        with observe(view(model), lambda r: found.append(r.map.scores)):
            during = model(**given).logits
    torch.testing.assert_close(during, before, atol=1e-5, rtol=1e-5)
    assert all(isinstance(s.pattern, Mask) and s.bias is None for s in found)
