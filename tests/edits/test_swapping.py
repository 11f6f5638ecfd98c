"""Swaps come and go, in each other and in observing, and leave nothing."""

import copy
import json
import weakref
from contextlib import nullcontext

import pytest
import torch

import headwise
from headwise.edits import Scale, Silence, Temperature, Uniform, active
from headwise.edits.swapping import _ACTIVE
from headwise.maps import Sinks, Window
from headwise.models import (
    UnknownAttentionArgumentError,
    UnobservedError,
    UnsupportedModelError,
    interface,
    observe,
    view,
)
from headwise.models.implementation import HELD
from tests.models import families
from tests.models.families import FAMILIES, inputs, scores, transformers
from tests.models.test_traps import with_argument


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    assert not interface.EDITORS
    assert not interface.OBSERVERS
    assert not HELD
    assert not _ACTIVE


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def run(model, given):
    with torch.no_grad():
        return scores(model(**given))


IMPLEMENTATIONS = [
    (name, implementation)
    for name in FAMILIES
    for implementation in ("eager", "sdpa")
    if not (implementation == "sdpa" and name in ("gemma2", "gpt_oss"))
]


@pytest.mark.parametrize(("name", "implementation"), IMPLEMENTATIONS)
def test_without_changes_it_is_the_same_model_to_the_bit(name, implementation):
    model = FAMILIES[name](implementation)
    given = inputs(model)
    want = run(model, given)
    with headwise.swap(model, {}) as record:
        assert torch.equal(run(model, given), want)
        assert model.config._attn_implementation == implementation
    assert record == []
    assert repr(record) == "nothing is changed"


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize(("name", "implementation"), IMPLEMENTATIONS)
def test_attentions_without_changes_are_the_same_to_the_bit(name, implementation, padding):
    """Only the last attention is changed: all before it must give what they gave."""
    if padding is not None and name not in families.TEXTS:
        padding = None
    model = FAMILIES[name](implementation)
    given = inputs(model, padding=padding)
    look = view(model)
    last = look.attentions[-1]
    seen = []

    def keep(module, args, output):
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    ends = [a.module.register_forward_hook(keep) for a in look.attentions if a is not last]
    before, count = run(model, given), hooks(model)
    plain, seen = seen, []
    with headwise.swap(look, {(last.stack, last.kind, last.layer, 1): Scale(-3.0)}):
        during = run(model, given)
    assert hooks(model) == count
    for handle in ends:
        handle.remove()
    assert len(seen) == len(plain)
    if sum(a.module is last.module for a in look.attentions) == 1:
        assert all(torch.equal(a, b) for a, b in zip(seen, plain, strict=True))
    assert not torch.allclose(before, during, atol=1e-4) or name == "clip"
    assert torch.equal(run(model, given), before)
    assert model.config._attn_implementation == implementation


# -- generation -----------------------------------------------------------------------------------

CHANGES = {
    (0, 0): Window(3),
    (0, 1): Sinks(2) | Window(2),
    (1, None): Temperature(1.7),
    (2, 0): "scalesink(3.0, 2)",
    (2, 1): "loglength(5)",
    (2, 2): "alibi(0.3) + scale(2)",
    (2, 3): Uniform(),
}


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", families.DECODERS)
def test_generation_is_the_same_as_whole_passes_without_a_cache(name, padding, cache):
    model = FAMILIES[name]("eager" if name in ("gemma2", "gpt_oss") else "sdpa")
    given = inputs(model, padding=padding)
    prompt, new = given["input_ids"].shape[1], 6
    with torch.no_grad(), headwise.swap(model, CHANGES):
        found = model.generate(
            **given, max_new_tokens=new, min_new_tokens=new, do_sample=False, **cache,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        ids = found.sequences
        more = {}
        if padding is not None:
            mask = torch.cat([given["attention_mask"], torch.ones(2, new, dtype=torch.long)], 1)
            more = {"attention_mask": mask}
            if name != "opt":  # which counts by itself
                more["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
        for step in range(new):
            cut = {key: value[:, : prompt + step] for key, value in more.items()}
            whole = model(input_ids=ids[:, : prompt + step], use_cache=False, **cut).logits
            torch.testing.assert_close(whole[:, -1], found.logits[step], atol=2e-4, rtol=2e-4)
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False, **more).logits
    assert not torch.allclose(plain[:, prompt - 1], found.logits[0], atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_a_sequence_alone_is_the_same_as_in_a_padded_batch(name):
    model = FAMILIES[name]("sdpa")
    given = inputs(model, padding="left")
    alone = {"input_ids": given["input_ids"][1:, 3:]}
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with headwise.swap(model, CHANGES):
        together = model.generate(**given, **how)[1, 3:]
        assert torch.equal(model.generate(**alone, **how)[0], together)


@pytest.mark.parametrize("name", ["llama", "mistral", "bart", "t5", "whisper", "moonshine"])
def test_beams_find_what_they_find_without_a_cache(name):
    model = FAMILIES[name]("sdpa", **({"num_layers": 3} if name == "t5" else {}))
    given = {k: v for k, v in inputs(model).items() if not k.startswith("decoder")}
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 3}
    if name == "whisper":
        how |= {"decoder_input_ids": inputs(model)["decoder_input_ids"]}
    changes = {("decoder", "self", 0, 0): Window(2), ("decoder", "self", 1): "loglength(3)"}
    if model.config.is_encoder_decoder:
        changes |= {("cross", 1, 2): Sinks(3), ("encoder", 0, 1): Window(2, 2)}
    with headwise.swap(model, changes):
        got = model.generate(**given, **how)
        want = model.generate(**given, **how, use_cache=False)
    assert torch.equal(got, want)


# -- nesting, order, ends -------------------------------------------------------------------------


def test_the_inner_swap_changes_what_the_outer_one_left():
    model = FAMILIES["llama"]("sdpa")
    given = inputs(model)
    plain = run(model, given)
    # a window, then uniform weights over what is left; the other way round is the same, but a
    # temperature after Uniform is nothing, and Uniform after it too
    with headwise.swap(model, {(0, 1): [Window(3), Uniform(), Scale(2.0)]}):
        want = run(model, given)
    with headwise.swap(model, {(0, 1): Window(3)}):
        outer = run(model, given)
        with headwise.swap(model, {(0, 1): Uniform()}), headwise.swap(model, {(0, 1): Scale(2.0)}):
            torch.testing.assert_close(run(model, given), want)
            names = [(entry["heads"], entry["change"]) for entry in active(model)]
        assert torch.equal(run(model, given), outer)
    assert names == [
        (["L0H1"], "Window(left=3, right=0)"),
        (["L0H1"], "Uniform()"),
        (["L0H1"], "Scale(factor=2.0)"),
    ]
    assert torch.equal(run(model, given), plain)


def test_the_order_of_changes_counts():
    from headwise.edits import Change

    class Plus(Change):
        def after(self, call, out):
            return out + 1

    model = FAMILIES["llama"]("sdpa")
    given = inputs(model)
    with headwise.swap(model, {(0, 1): Plus()}), headwise.swap(model, {(0, 1): Silence()}):
        last_silent = run(model, given)
    with headwise.swap(model, {(0, 1): Silence()}):
        silent = run(model, given)
        with headwise.swap(model, {(0, 1): Plus()}):
            last_plus = run(model, given)
    torch.testing.assert_close(last_silent, silent)
    assert not torch.allclose(last_plus, silent, atol=1e-3)


def test_swaps_may_end_in_any_order():
    model = FAMILIES["llama"]("sdpa")
    given = inputs(model)
    plain = run(model, given)
    a = headwise.swap(model, {0: Window(2)})
    b = headwise.swap(model, {1: Uniform()})
    with b:
        only_b = run(model, given)
    a.apply()
    b.apply()
    a.undo()
    assert torch.equal(run(model, given), only_b)
    assert not a.applied
    a.undo()  # twice is once
    with pytest.raises(RuntimeError, match="in force already"):
        b.apply()
    assert b.applied
    b.undo()
    assert torch.equal(run(model, given), plain)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("outside", ["nothing", "swap", "observe"])
def test_after_an_exception_all_is_as_it_was(outside):
    model = FAMILIES["llama"]("sdpa")
    given = inputs(model)
    plain, count = run(model, given), hooks(model)

    def broken():
        with headwise.swap(model, {0: Window(2), "all": "positions(2)"}):
            run(with_argument(model, block_indices=torch.ones(1)), given)

    forwards = [layer.self_attn.forward for layer in model.model.layers]
    around = {
        "nothing": nullcontext(),
        "swap": headwise.swap(model, {1: Uniform()}),
        "observe": observe(view(model), lambda r: None),
    }
    with pytest.raises(UnknownAttentionArgumentError), around[outside]:
        broken()
    for layer, forward in zip(model.model.layers, forwards, strict=True):
        layer.self_attn.forward = forward
    assert torch.equal(run(model, given), plain)
    assert hooks(model) == count
    assert model.config._attn_implementation == "sdpa"


def test_a_change_that_raises_leaves_a_model_that_works():
    from headwise.edits import Change

    class Broken(Change):
        def __init__(self):
            self.working = False

        def after(self, call, out):
            if not self.working:
                raise KeyError("mine")
            return torch.zeros_like(out)

    model = FAMILIES["albert"]("sdpa")  # one module for all layers, whose runs are counted
    given = inputs(model)
    plain = run(model, given)
    with headwise.swap(model, {(1, 0): Silence()}):
        silent = run(model, given)
    broken = Broken()
    with headwise.swap(model, {(1, 0): broken}):
        for _ in range(2):
            with pytest.raises(KeyError, match="mine"):
                run(model, given)
        broken.working = True
        torch.testing.assert_close(run(model, given), silent)
    assert torch.equal(run(model, given), plain)


@pytest.mark.parametrize("name", ["albert", "albert_groups"])
def test_a_layer_of_a_shared_module_is_changed_alone(name):
    model = FAMILIES[name]("sdpa")
    given = inputs(model)
    outs = {}

    def see(change):
        outs.clear()
        with (
            headwise.swap(model, change),
            observe(view(model), lambda r: outs.__setitem__(r.attention.layer, r.out.clone())),
        ):
            run(model, given)
            run(model, given)  # the count begins anew
        return dict(outs)

    plain, changed = see({}), see({(1, 2): Silence()})
    torch.testing.assert_close(changed[0], plain[0])
    assert changed[1][:, 2].abs().max() == 0
    assert changed[2][:, 2].abs().max() > 0
    torch.testing.assert_close(changed[1][:, 1], plain[1][:, 1])


# -- observing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "bert", "t5", "gpt_oss"])
@pytest.mark.parametrize("padding", [None, "left"])
def test_what_is_observed_is_what_is_computed(name, padding):
    """The map times the values is the output, for heads that are changed in different ways."""
    model = FAMILIES[name]("eager" if name in ("gpt_oss",) else "sdpa")
    given = inputs(model, padding=padding)
    stack = "encoder" if name in ("bert", "t5") else "decoder"
    changes = [
        ((stack, "self", 0, 0), [Window(3, 1), Temperature(2.0)]),
        ((stack, "self", 0, 1), ["alibi(0.2)", "scalesink(2.0)"]),
        ((stack, "self", 1, (0, 1)), ["loglength(4)", Sinks(2) | Window(2)]),
        ((stack, "self", 1, 2), Uniform()),
    ]
    readings = {}

    def read(r):
        dense = r.map.dense()
        group = r.query.shape[1] // r.value.shape[1]
        out = dense @ r.value.repeat_interleave(group, 1)
        torch.testing.assert_close(out, r.out, atol=2e-5, rtol=2e-5)
        rows = torch.arange(r.query.shape[2])
        torch.testing.assert_close(r.map.rows(rows), dense, atol=1e-5, rtol=1e-5)
        safe = -(dense * dense.clamp_min(1e-30).log()).sum(-1)
        torch.testing.assert_close(r.map.entropy(), safe, atol=1e-4, rtol=1e-4)
        readings[r.attention.stack, r.attention.kind, r.attention.layer] = dense

    with headwise.swap(model, changes), observe(view(model), read):
        inner = run(model, given)
    first, readings = readings, {}
    with observe(view(model), read), headwise.swap(model, changes):
        torch.testing.assert_close(run(model, given), inner)
    for key, dense in first.items():
        torch.testing.assert_close(readings[key], dense)
    readings = {}
    with observe(view(model), read):
        run(model, given)
    key = (stack, "self", 0)
    assert not torch.allclose(readings[key][:, 0], first[key][:, 0], atol=1e-3)
    torch.testing.assert_close(readings[key][:, 2:], first[key][:, 2:])


def test_an_atlas_of_a_changed_model_says_so():
    model = FAMILIES["llama"]("sdpa")
    ids = torch.randint(3, families.VOCABULARY, (1, 40))
    plain = headwise.see(model, ids, instruments=["shape"])
    assert "edits" not in plain.provenance
    with headwise.swap(model, {(0, (0, 1)): Window(4)}) as record:
        atlas = headwise.see(model, ids, instruments=["shape"])
    assert atlas.provenance["edits"] == record
    assert json.loads(json.dumps(record)) == record
    assert repr(record) == "L0H0, L0H1: Window(left=4, right=0)"
    assert (atlas.heads["effective_keys"][:2] <= 4).all()
    assert (plain.heads["effective_keys"][:2] > 4).all()
    other = FAMILIES["gpt2"]("sdpa")
    with headwise.swap(other, {0: Window(4)}):
        assert active(model) == []


def test_an_atlas_hands_over_its_heads():
    model = FAMILIES["bart"]("sdpa")
    atlas = headwise.see(model, torch.randint(3, families.VOCABULARY, (1, 20)), "shape")
    chosen = atlas.where("layer == 1 and head in (0, 3) and attention == 'cross'")
    assert chosen == [("decoder", "cross", 1, 0), ("decoder", "cross", 1, 3)]
    with headwise.swap(model, {chosen: Silence()}) as record:
        pass
    assert record[0]["heads"] == ["decoder cross L1H0", "decoder cross L1H3"]
    assert [atlas.name(row) for row in range(len(atlas)) if "cross L1H0" in atlas.name(row)] == [
        "decoder cross L1H0"
    ]


# -- what cannot be changed -----------------------------------------------------------------------


def test_attentions_outside_the_interface_are_refused_by_name():
    config = transformers.GPTJConfig(vocab_size=61, n_embd=40, n_layer=2, n_head=4, rotary_dim=4)
    model = transformers.GPTJForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match="GPTJAttention computes its attention by"):
        headwise.swap(model, {0: Silence()})


def test_an_attention_that_attends_twice_is_noticed():
    made = transformers.DiffLlamaConfig(**families.DECODER | {"num_hidden_layers": 1})
    model = transformers.DiffLlamaForCausalLM(made).eval()
    model.set_attn_implementation("sdpa")
    with (
        pytest.raises(UnobservedError, match="2 times in one run instead of once"),
        headwise.swap(model, {0: Silence()}),
    ):
        run(model, inputs(model))


def test_an_attention_that_goes_its_own_way_is_noticed():
    model = FAMILIES["llama"]("sdpa")
    model.model.layers[1].self_attn.forward = lambda hidden_states, **more: (hidden_states, None)
    with (
        pytest.raises(UnobservedError, match=r"layers\.1\.self_attn .*0 times"),
        headwise.swap(model, {1: Silence()}),
    ):
        run(model, inputs(model))
    with headwise.swap(model, {0: Silence()}):  # what is not to be changed may do as it likes
        run(model, inputs(model))


def test_dropout_of_changed_weights_is_refused():
    model = FAMILIES["llama"](attention_dropout=0.5).train()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"), headwise.swap(model, {0: Silence()}):
        run(model, inputs(model))


def test_a_copy_of_a_changed_model_is_told_apart():
    model = FAMILIES["llama"]("sdpa")
    given = inputs(model)
    plain = run(model, given)
    with headwise.swap(model, {0: Window(2)}):
        copied = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="inside `with"):
            run(copied, given)
    with pytest.raises(UnsupportedModelError, match="a copy of a model"):
        headwise.swap(copied, {0: Window(2)}).apply()
    copied.set_attn_implementation("sdpa")
    assert torch.equal(run(copied, given), plain)


def test_nothing_keeps_a_model_alive():
    model = FAMILIES["llama"]("sdpa")
    with headwise.swap(model, {0: Window(2), "all": "positions(2)"}):
        run(model, inputs(model))
    gone = weakref.ref(model)
    import gc

    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("padding", [None, "left"])
def test_blocks_chosen_by_content_are_the_same_with_a_cache(padding, cache):
    from headwise.parts.choose.blocks import TopBlocks

    model = FAMILIES["llama"]("sdpa")
    given = inputs(model, length=24, padding=padding)
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    changes = {(0, (1, 2)): TopBlocks(4, 2), (1, None): TopBlocks(3, 1)}
    with headwise.swap(model, changes):
        got = model.generate(**given, **how, **cache)
        want = model.generate(**given, **how, use_cache=False)
    plain = model.generate(**given, **how)
    for a, b, c in zip(got.logits, want.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(a, c, atol=1e-3)


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("name", ["llama", "mistral", "bert", "t5", "bart"])
def test_attentions_without_changes_are_given_the_masks_that_they_had(name, padding, monkeypatch):
    """No dense mask where the model's implementation skips it: that would cost n x n numbers."""
    interface_of = transformers.AttentionInterface()
    own, given_masks = interface_of["sdpa"], []

    def spy(module, query, key, value, attention_mask, **more):
        given_masks.append((attention_mask, more.get("is_causal")))
        return own(module, query, key, value, attention_mask, **more)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "sdpa", spy)
    model = FAMILIES[name]("sdpa")
    given = inputs(model, padding=padding)
    run(model, given)
    plain, given_masks = given_masks, []
    last = view(model).attentions[-1]
    with headwise.swap(model, {(last.stack, last.kind, last.layer, 0): Silence()}):
        run(model, given)
    assert len(given_masks) > 1
    # but for the one that is changed, and the piece of it that is compared with our own
    for (mask, causal), (want, was_causal) in zip(given_masks, plain[:-1], strict=False):
        assert (mask is None) == (want is None)
        assert mask is None or torch.equal(mask, want)
        assert type(mask) in (type(None), torch.Tensor)
        assert causal == was_causal
