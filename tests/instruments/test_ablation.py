"""Ablation against one plain forward pass a head, and what it gives, refuses and leaves."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from headwise.instruments.ablations import ablation
from headwise.instruments.joint_ablation import ablate_together
from headwise.instruments.metrics import LogitDifference
from headwise.models.backbones import Decoder
from headwise.parts import Attention
from tests.instruments import slow_ablation as slow
from tests.instruments import tiny

CLOSE = 2e-5
MODELS = ("llama", "gpt2", "gpt_oss", "bert", "bart", "vit")


@pytest.fixture(scope="module")
def models():
    return {name: getattr(tiny, name)() for name in MODELS}


def examples(name, n, batch, seed=0, padded=False):
    """Inputs and the slow score of an answer to them."""
    random = torch.Generator().manual_seed(seed)
    if name == "vit":
        pixels = torch.randn(batch, 3, 32, 32, generator=random)
        labels = torch.randint(2, (batch,), generator=random)
        inputs = {"pixel_values": pixels, "labels": labels}

        def score(logits):
            logs = logits.double().log_softmax(-1)
            return -torch.stack([logs[row, labels[row]] for row in range(batch)])

        return inputs, score
    ids = tiny.ids(n, seed, batch)
    inputs = {"input_ids": ids}
    if name == "bart":
        inputs["decoder_input_ids"] = tiny.ids(n, seed + 1, batch)
        if padded:  # of the encoder: what is padding there is seen by nobody
            inputs["attention_mask"] = torch.ones_like(ids)
            inputs["attention_mask"][-1, n // 2 + 1 :] = 0
        return inputs, lambda logits: slow.loss(logits, inputs["decoder_input_ids"])
    mask = torch.ones_like(ids)
    if padded:
        for row in range(batch):
            mask[row, n - (row % max(1, n - 1)) :] = 0
        inputs["attention_mask"] = mask
    return inputs, lambda logits: slow.loss(logits, ids, mask)


def by_slow(model, inputs, score, **more):
    """`(heads, batch)` for all heads in the order of an atlas."""
    plain = {key: value for key, value in inputs.items() if key != "labels"}
    return torch.cat(
        [slow.effects(model, plain, p, 4, score, **more) for p, *_ in slow.projections(model)]
    ).numpy()


@settings(deadline=None, max_examples=24)
@given(
    name=st.sampled_from(MODELS),
    n=st.integers(2, 9),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
    padded=st.booleans(),
    copies=st.sampled_from([None, 1, 3]),
)
def test_every_head_has_the_effect_of_a_whole_pass_without_it(
    models, name, n, batch, seed, padded, copies
):
    inputs, score = examples(name, n, batch, seed, padded)
    atlas = ablation(models[name], inputs, copies=copies)
    wanted = by_slow(models[name], inputs, score)
    assert np.abs(atlas.heads["effect"] - wanted.mean(1)).max() < CLOSE
    if batch > 1:
        error = wanted.std(1, ddof=1) / batch**0.5
        assert np.abs(atlas.heads["effect_se"] - error).max() < CLOSE
    else:
        assert np.isnan(atlas.heads["effect_se"]).all()


def test_a_decoder_of_our_own():
    torch.manual_seed(0)
    model = Decoder(11, 16, 3, mixer=lambda layer: Attention(16, 4, causal=True)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    ids = torch.randint(11, (3, 7))
    atlas = ablation(model, ids)
    for layer in range(3):
        (merge,) = [
            m.merge.linear
            for name, m in model.named_modules()
            if isinstance(m, Attention) and f".{layer}." in f".{name}."
        ]
        mine = atlas.heads["effect"][atlas.heads["layer"] == layer]
        wanted = _without_columns(model, ids, merge).mean(1).numpy()
        assert np.abs(mine - wanted).max() < CLOSE


@torch.no_grad()
def _without_columns(model, ids, merge):
    before, rows, weight = slow.loss(model(ids), ids), [], merge.weight.data.clone()
    for head in range(4):
        merge.weight.data[:, 4 * head : 4 * head + 4] = 0  # the head's columns
        rows.append(slow.loss(model(ids), ids) - before)
        merge.weight.data.copy_(weight)
    return torch.stack(rows)


@pytest.mark.parametrize("name", MODELS)
def test_layers_attentions_and_feed_forward_parts(models, name):
    model = models[name]
    inputs, score = examples(name, 6, 2)
    plain = {key: value for key, value in inputs.items() if key != "labels"}
    atlas = ablation(model, inputs, what=("layers", "attention", "mlp"))
    before = score(slow.answer(model, plain))
    numbers = {
        (s, layer): n
        for n, (s, layer) in enumerate(
            dict.fromkeys((s, layer) for _, s, _, layer in slow.projections(model))
        )
    }
    for projection, stack, kind, layer in slow.projections(model):
        handle = projection.register_forward_hook(lambda m, a, out: torch.zeros_like(out))
        wanted = (score(slow.answer(model, plain)) - before).mean().item()
        handle.remove()
        column = "attention_effect" if kind == "self" else "cross_attention_effect"
        assert atlas.layers[column][numbers[stack, layer]] == pytest.approx(wanted, abs=CLOSE)
    for path, last in slow.layers(model):
        stack = slow.stack_of(model, path)
        row = numbers[stack, int(path.rpartition(".")[2])]
        module = model.get_submodule(path)

        def passed(m, args, kwargs, out):
            stream = args[0] if args else kwargs["hidden_states"]
            return (stream, *out[1:]) if isinstance(out, tuple) else stream

        handle = module.register_forward_hook(passed, with_kwargs=True)
        wanted = (score(slow.answer(model, plain)) - before).mean().item()
        handle.remove()
        assert atlas.layers["layer_effect"][row] == pytest.approx(wanted, abs=CLOSE)

        def nothing(m, args, out):
            return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else 0 * out

        handle = model.get_submodule(f"{path}.{last}").register_forward_hook(nothing)
        wanted = (score(slow.answer(model, plain)) - before).mean().item()
        handle.remove()
        assert atlas.layers["mlp_effect"][row] == pytest.approx(wanted, abs=CLOSE)


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_the_mean_is_that_of_the_reference(models, name, by_position):
    model = models[name]
    inputs, score = examples(name, 6, 3)
    others, _ = examples(name, 6, 4, seed=7)
    atlas = ablation(
        model, inputs, how="mean", reference=others, by_position=by_position, batch_size=3
    )
    wanted = []
    for projection, *_ in slow.projections(model):
        z = slow.outputs(model, others, projection).unflatten(-1, (4, -1))
        mean = z.mean(0) if by_position else z.mean((0, 1))
        wanted.append(
            slow.effects(
                model, inputs, projection, 4, score, lambda z, h, mean=mean: mean[..., h, :]
            )
        )
    assert np.abs(atlas.heads["effect"] - torch.cat(wanted).mean(1).numpy()).max() < CLOSE


def test_resampled_outputs_are_another_example_s(models):
    """Two examples: the other one is the only one that can be drawn."""
    model = models["llama"]
    inputs, score = examples("llama", 6, 2)
    atlas = ablation(model, inputs, how="resample", draws=2)
    wanted = by_slow(model, inputs, score, instead=lambda z, h: z[..., h, :].flip(0))
    assert np.abs(atlas.heads["effect"] - wanted.mean(1)).max() < CLOSE


def test_draws_come_from_a_reference_of_the_same_length(models):
    inputs, _ = examples("gpt2", 6, 1)
    same = {"input_ids": inputs["input_ids"].expand(3, -1)}
    atlas = ablation(models["gpt2"], inputs, how="resample", reference=same)
    assert np.abs(atlas.heads["effect"]).max() < CLOSE  # drawn from itself: nothing changes
    with pytest.raises(ValueError, match="no reference example has the length of example 1"):
        ablation(models["gpt2"], inputs, how="resample", reference=tiny.ids(5))
    with pytest.raises(ValueError, match="runs alone"):
        ablation(models["gpt2"], inputs, how="resample")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss", "bart"])
def test_an_even_map_by_hand(models, name):
    """swap with Uniform, one head at a time."""
    import headwise
    from headwise.edits import Uniform
    from headwise.models import view

    model = models[name]
    inputs, score = examples(name, 6, 2)
    before = score(slow.answer(model, inputs))
    atlas = ablation(model, inputs, how="uniform")
    for row, (attention, head) in enumerate(
        (a, h) for a in view(model).attentions for h in range(a.heads)
    ):
        selector = (attention.stack, attention.kind, attention.layer, head)
        with headwise.swap(model, {selector: Uniform()}):
            wanted = (score(slow.answer(model, inputs)) - before).mean().item()
        assert atlas.heads["effect"][row] == pytest.approx(wanted, abs=CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_frozen_maps_are_those_of_the_clean_run(models, name):
    """Eager weights of the clean run, put in the place of the softmax."""
    model = models[name]
    inputs, score = examples(name, 6, 2)
    frozen = ablation(model, inputs, frozen=True).heads["effect"]
    free = ablation(model, inputs).heads["effect"]
    wanted = slow.with_clean_maps(model, inputs, lambda: by_slow(model, inputs, score))
    assert np.abs(frozen - wanted.mean(1)).max() < CLOSE
    assert np.abs(frozen - free).max() > 1e-3  # and that is another question
    last = frozen[-4:], free[-4:]  # after the last attention nobody looks
    assert np.abs(last[0] - last[1]).max() < CLOSE


def test_sets_are_taken_out_together(models):
    import headwise
    from headwise.edits import Silence

    model = models["llama"]
    inputs, score = examples("llama", 6, 3)
    sets = [[(0, 1), (1, 3), (1, 0)], "L1", [(0, 2)], range(2)]
    found = ablate_together(model, inputs, sets, copies=3)
    before = score(slow.answer(model, inputs))
    for row, one in enumerate([((0, 1), (1, 3), (1, 0)), "L1", (0, 2), range(2)]):
        with headwise.swap(model, {one: Silence()}):
            wanted = score(slow.answer(model, inputs)) - before
        assert np.abs(found.effects[row] - wanted.numpy()).max() < CLOSE
    alone = ablation(model, inputs).heads["effect"]
    assert found.mean[2] == pytest.approx(alone[2], abs=CLOSE)
    assert "L0H1" in repr(found)
    with pytest.raises(ValueError, match="several attentions in one set"):
        ablate_together(model, inputs, [[(0, 1), (1, 3)]], how="uniform")


def test_only_the_row_that_counts_is_read_out(models):
    """A logit difference at the last real token, of examples that end at different places."""
    ids = tiny.ids(7, batch=3)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    right, wrong = torch.tensor([3, 4, 5]), torch.tensor([9, 8, 7])
    inputs = {"input_ids": ids, "attention_mask": mask}
    last = torch.tensor([6, 4, 6])

    def score(logits):
        rows = [logits[b, last[b]] for b in range(3)]
        gaps = [row[r] - row[w] for row, r, w in zip(rows, right, wrong, strict=True)]
        return torch.stack(gaps).double()

    for name in ("llama", "gpt2", "bert"):
        atlas = ablation(models[name], inputs, metric=LogitDifference(right, wrong), batch_size=2)
        wanted = by_slow(models[name], inputs, score)
        assert np.abs(atlas.heads["effect"] - wanted.mean(1)).max() < 1e-4
    where = ablation(models["llama"], inputs, metric=LogitDifference(3, 9, at=2))
    wanted = by_slow(models["llama"], inputs, lambda x: (x[:, 2, 3] - x[:, 2, 9]).double())
    assert np.abs(where.heads["effect"] - wanted.mean(1)).max() < 1e-4


def test_a_feed_forward_part_that_looks_at_other_positions_is_computed_whole():
    """Leaving rows out would change what is read; a trial finds that."""
    model = tiny.gpt2()
    inner = model.transformer.h[1].mlp.c_proj
    inner.register_forward_pre_hook(lambda m, args: (args[0].cumsum(1),))
    ids = tiny.ids(6, batch=2)
    atlas = ablation(model, ids, metric=LogitDifference(3, 9))
    wanted = by_slow(model, {"input_ids": ids}, lambda x: (x[:, -1, 3] - x[:, -1, 9]).double())
    assert np.abs(wanted).max() > 1e-2
    assert np.abs(atlas.heads["effect"] - wanted.mean(1)).max() < 1e-4


def test_examples_of_several_lengths_and_any_batch_size_give_the_same(models):
    texts = [tiny.ids(n, seed=n) for n in (5, 5, 3, 8)]
    one, many = (
        ablation(models["gpt2"], texts, batch_size=size, what=("heads", "mlp")) for size in (1, 16)
    )
    assert np.abs(one.heads["effect"] - many.heads["effect"]).max() < CLOSE
    assert np.abs(one.layers["mlp_effect_se"] - many.layers["mlp_effect_se"]).max() < CLOSE


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_model_is_left_as_it_was(models, name):
    model = models[name].train()
    inputs, _ = examples(name, 5, 2)
    ablation(model, inputs, how="uniform")

    def broken(logits, given):
        raise KeyError("no")

    with pytest.raises(KeyError):
        ablation(model, inputs, metric=broken)
    modules = list(model.modules())
    assert all(module.training for module in modules)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert not any("forward" in vars(m) for m in modules)
    assert all(p.grad is None for p in model.parameters())
    model.eval()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"how": "nothing"}, "expected one of zero, mean, resample, uniform"),
        ({"what": "tokens"}, "ablate_tokens"),
        ({"what": "neurons"}, "expected one or several of heads, layers, attention, mlp"),
        ({"what": ()}, "expected one or several"),
        ({"how": "uniform", "what": ("heads", "mlp")}, "goes with what='heads'"),
        ({"metric": "accuracy", "estimate": "gradient"}, "accuracy has no gradient"),
        ({"metric": "kl", "estimate": "gradient"}, "use estimate='integrated'"),
        ({"estimate": "both"}, "expected 'gradient' or 'integrated'"),
        ({"exact": False}, "name some with estimate="),
        ({"estimate": "gradient", "what": "mlp"}, "add 'heads'"),
        ({"copies": 0}, "expected 1 or more"),
    ],
)
def test_what_cannot_be_asked_is_said(models, asked, said):
    with pytest.raises(ValueError, match=said):
        ablation(models["llama"], tiny.ids(4), **asked)


def test_under_a_swap_the_changed_model_is_measured(models):
    """What is in force stays in force: the effect is one more head's."""
    import headwise
    from headwise.edits import Silence, Uniform

    model, ids = models["llama"], tiny.ids(6, batch=2)
    together = ablate_together(model, ids, [[(0, 1)], [(0, 1), (1, 2)], [(0, 1), (0, 3)]]).mean
    with headwise.swap(model, {(0, 1): Silence()}):
        changed = ablation(model, ids, what=("heads", "mlp"))
    assert changed.heads["effect"][1] == pytest.approx(0, abs=CLOSE)
    assert changed.heads["effect"][6] == pytest.approx(together[1] - together[0], abs=CLOSE)
    assert changed.heads["effect"][3] == pytest.approx(together[2] - together[0], abs=CLOSE)
    assert changed.provenance["edits"]
    with headwise.swap(model, {0: Uniform()}):
        even = ablation(model, ids)
        wanted = by_slow(model, {"input_ids": ids}, lambda x: slow.loss(x, ids))
    assert np.abs(even.heads["effect"] - wanted.mean(1)).max() < CLOSE


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_one_token_has_a_divergence(models, name):
    ids = tiny.ids(1, batch=3)
    atlas = ablation(models[name], ids, metric="kl")
    clean = slow.answer(models[name], {"input_ids": ids}).double().log_softmax(-1)

    def divergence(logits):
        now = logits.double().log_softmax(-1)
        return (clean.exp() * (clean - now)).sum(-1).mean(1)

    wanted = by_slow(models[name], {"input_ids": ids}, divergence)
    assert np.abs(atlas.heads["effect"] - wanted.mean(1)).max() < CLOSE


def test_one_token_has_no_loss(models):
    with pytest.raises(ValueError, match="2 tokens or more"):
        ablation(models["llama"], tiny.ids(1))


def test_an_empty_set_takes_out_nothing():
    model, ids = tiny.llama(), tiny.ids(7, batch=3)
    found = ablate_together(model, ids, [[], [(0, 1)], ()])
    alone = ablate_together(model, ids, [[(0, 1)]])
    assert found.names == ("nothing", "L0H1", "nothing")
    assert not found.effects[[0, 2]].any()
    assert np.allclose(found.effects[1], alone.effects[0], atol=1e-6)
    assert not ablate_together(model, ids, [[]]).effects.any()
