"""Tokens really go, by every way, in every encoder; what is computed is what the formulas say."""

import copy

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from headwise.compress import ReduceTokens, reduce_tokens, take
from headwise.compress.step import read_step, steps_of, write_step
from headwise.compress.tokens.ranking import ClassAttention, Flow
from headwise.compress.tokens.reducing import WAYS, record_of, stages
from headwise.models import observe, view
from headwise.models.backbones import Decoder, VisionPatches
from headwise.models.errors import UnsupportedModelError
from headwise.parts import Attention, Rotary
from tests.compress.tokens import slow
from tests.compress.tokens.encoders import MAKE, PATCHES, SPECIAL, answer, images, make


def ways(name: str) -> list[str]:
    return [how for how in WAYS if SPECIAL[name] or not WAYS[how].needs_class]


@pytest.mark.parametrize("name", MAKE)
def test_tensors_are_shorter_and_a_keep_of_one_changes_no_bit(name):
    model, pixels, special = make(name), images(), SPECIAL[name]
    lengths: list[int] = []
    hooks = [
        layer.module.register_forward_hook(
            lambda m, a, out: lengths.append((out[0] if isinstance(out, tuple) else out).shape[1])
        )
        for layer in view(model).layers
    ]
    with torch.no_grad():
        whole = answer(model, pixels)
        for how in ways(name):
            for place in ("before", "middle", "after"):
                with reduce_tokens(model, keep=1.0, how=how, place=place):
                    assert torch.equal(answer(model, pixels), whole)
                lengths.clear()
                with reduce_tokens(model, schedule={1: 0.5, 2: 5}, how=how, place=place) as record:
                    less = answer(model, pixels)
                more = how == "class"  # the fused rest is one more token
                assert record.counts == {1: 18 + more, 2: 5 + more}
                # hooks of this test came first: they see a layer's tokens before any go after it
                seen = [36, 36, 18 + more, 5 + more] if place != "before" else lengths_before(more)
                assert lengths == [special + n for n in seen]
                assert (less - whole).abs().max() > 1e-4
    for hook in hooks:
        hook.remove()
    assert torch.equal(answer(model, pixels).detach(), whole)


def lengths_before(more: bool) -> list[int]:
    return [36, 18 + more, 5 + more, 5 + more]


@pytest.mark.parametrize("fuse", ["", "scores"])
def test_class_attention_is_evit_computed_slowly(fuse):
    model, pixels = make("vit"), images()

    def reduce(layer, x, probabilities, keys, sizes):
        if layer in (1, 2):
            x = slow.evit(x, probabilities, 0.6, bool(fuse))
        return x, np.ones(len(x))

    expected = slow.vit_logits(model, pixels, reduce)
    with torch.no_grad(), reduce_tokens(model, schedule={1: 0.6, 2: 0.6}, how=ClassAttention(fuse)):
        found = answer(model, pixels)
    assert np.abs(found.numpy() - expected).max() < 1e-4


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_similarity_is_tome_computed_slowly(name):
    model, pixels = make("vit"), images()
    model.set_attn_implementation(name)

    def reduce(layer, x, probabilities, keys, sizes):
        return slow.tome(x, keys, sizes, 7)

    expected = slow.vit_logits(model, pixels, reduce)
    schedule = {layer: PATCHES - 7 * (layer + 1) for layer in range(4)}
    with torch.no_grad(), reduce_tokens(model, schedule=schedule, how="similar") as record:
        found = answer(model, pixels)
    assert np.abs(found.numpy() - expected).max() < 1e-4
    assert sorted(patch for token in record.members(3) for patch in token) == list(
        range(PATCHES)
    )  # nobody is lost


def test_our_own_attention_weighs_keys_by_sizes_too():
    """A token of size s counts as s equal tokens: joining equal patches changes nothing."""
    model = make("patches")
    pixels = images(1).repeat(1, 1, 1, 1)
    pixels[:] = pixels[:, :, :4, :4].repeat(1, 1, 6, 6)  # all patches alike
    with torch.no_grad():
        for parameter in model.positions.parameters():
            parameter.zero_()
        whole = answer(model, pixels)
        with reduce_tokens(model, schedule={0: 20, 2: 3}, how="similar"):
            joined = answer(model, pixels)
        plain = type(WAYS["similar"]())(proportional=False)
        with reduce_tokens(model, schedule={0: 20, 2: 3}, how=plain):
            unweighted = answer(model, pixels)
    assert (joined - whole).abs().max() < 1e-5
    assert (unweighted - whole).abs().max() > 1e-4


@pytest.mark.parametrize("name", MAKE)
def test_what_a_reduction_sees_is_the_models_own_map(name):
    """Class row and received mass against the map that observing the same pass gives."""
    if not SPECIAL[name]:
        pytest.skip("no class token")
    model, pixels, special = make(name), images(), SPECIAL[name]
    rows, received, maps = [], [], []

    class Looking(ClassAttention):
        def scores(self, sight):
            rows.append(sight.class_attention())
            received.append(sight.received())
            return super().scores(sight)

    with torch.no_grad(), reduce_tokens(model, schedule={0: 0.9, 1: 0.9}, how=Looking()):
        with observe(view(model), lambda r: maps.append(r.map.dense())):
            answer(model, pixels)
        for layer in (0, 1):
            dense = maps[layer]
            assert (rows[layer] - dense[:, :, 0, special:]).abs().max() < 1e-5
            assert (received[layer] - dense.mean(2)[..., special:]).abs().max() < 1e-5


def test_before_a_layer_its_own_attention_is_read_one_step_ahead():
    model, pixels = make("vit"), images()
    rows, maps = [], []

    class Looking(ClassAttention):
        def scores(self, sight):
            rows.append(sight.class_attention())
            return super().scores(sight)

    with torch.no_grad():
        with observe(view(model), lambda r: maps.append(r.map.dense())):
            answer(model, pixels)
        with reduce_tokens(model, schedule={2: 0.5}, how=Looking(), place="before"):
            answer(model, pixels)
    assert (rows[0] - maps[2][:, :, 0, 1:]).abs().max() < 1e-5


def test_work_is_what_the_counts_say():
    model, pixels = make("vit"), images(2)

    def flops() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            answer(model, pixels)
        return counter.get_total_flops()

    def layers(before: list[int], after: list[int]) -> int:
        """Projections and maps on the tokens before attention, the MLP on those after it."""
        w, hidden = 32, 48
        return sum(
            2 * 2 * (4 * n * w * w + 2 * n * n * w + 2 * m * w * hidden)
            for n, m in zip(before, after, strict=True)
        )

    model.set_attn_implementation("eager")
    whole = flops()
    with reduce_tokens(model, schedule={1: 9}, how="random"):
        less = flops()
    assert whole - less == layers([37] * 4, [37] * 4) - layers([37, 37, 10, 10], [37, 10, 10, 10])


@pytest.mark.parametrize("how", WAYS)
def test_for_good_is_the_same_and_is_remembered(how):
    model, pixels = make("vit"), images()
    with torch.no_grad(), reduce_tokens(model, keep=0.6, how=how) as record:
        expected = answer(model, pixels)
    step = ReduceTokens.of(model, keep=0.6, how=how)
    assert read_step(write_step(step)) == step
    take(model, step)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(answer(model, pixels), expected)
        mine = record_of(model).kept(3)
        assert torch.equal(mine, record.kept(3))
        assert (answer(twin, pixels[:1]) - expected[:1]).abs().max() < 1e-5
        assert torch.equal(record_of(model).kept(3), mine)  # a copy has a record of its own
    assert steps_of(model) == (step,)
    with pytest.raises(ValueError, match="already"):
        take(model, step)


def test_a_step_is_done_again_on_a_model_without_data():
    step = ReduceTokens.of(make("vit"), keep=0.6)
    with torch.device("meta"):
        empty = MAKE["vit"]()
    take(empty, step)
    assert record_of(empty).counts == {}


def test_the_record_says_where_every_patch_is():
    model, pixels = make("vit"), images()
    with torch.no_grad(), reduce_tokens(model, schedule={1: 10, 2: 4}) as record:
        with pytest.raises(ValueError, match="run the model"):
            record.kept(1)
        answer(model, pixels)
        assert record.kept(0).tolist() == [list(range(PATCHES))] * 3
        for layer, m in ((1, 11), (2, 5), (3, 5)):
            groups = record.kept(layer)
            assert groups.shape == (3, PATCHES)
            assert set(groups.flatten().tolist()) == set(range(m))
            for image in range(3):
                members = record.members(layer, image)
                assert [groups[image, p] for t in members for p in t] == [
                    t for t, some in enumerate(members) for _ in some
                ]
        # the fused token of the first time may be kept or fused again, whole in both cases
        first, second = record.kept(1), record.kept(2)
        for image in range(3):
            assert len(set(second[image][first[image] == 10].tolist())) == 1


def test_gradients_pass_through_what_stays_and_what_is_fused():
    model = make("vit")
    pixels = images().requires_grad_()
    with reduce_tokens(model, keep=0.5):
        answer(model, pixels).pow(2).sum().backward()
    touched = pixels.grad.unfold(2, 4, 4).unfold(3, 4, 4).abs().amax((1, 4, 5)) > 0
    assert touched.all()
    assert all(p.grad is not None for p in model.vit.layers.parameters())


def test_nothing_is_left_behind_after_an_exception():
    for name in ("vit", "patches"):
        model = make(name)
        with pytest.raises(RuntimeError), reduce_tokens(model, keep=0.5, how="similar"):
            raise RuntimeError
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert getattr(module, "editor", None) is None


def test_flow_notes_every_layer_and_chooses_counts():
    """Against the formulas, one image at a time: scores from layer 0 on, counts by entropy."""
    model, pixels = make("vit"), images(1)
    seen, states, counts = [], [], []

    class Looking(Flow):
        def observe(self, sight):
            seen.append(sight)
            states.append(super().observe(sight))
            return states[-1]

        def count(self, sight):
            counts.append((sight.patches, super().count(sight)))
            return counts[-1][1]

    with torch.no_grad(), reduce_tokens(model, schedule=dict.fromkeys((1, 3)), how=Looking(4)):
        answer(model, pixels)
    assert len(states) == 4
    old = None
    for i, sight in enumerate(seen):
        a = sight.class_attention().double().mean(1)[0].numpy()
        v = sight.values[0].double().numpy()
        b = np.mean([slow._softmax(v[h] @ v[h, 0])[1:] for h in range(4)], 0)
        new = (a / a.sum() + b / b.sum()) * np.abs(v.mean(0)[1:]).sum(-1)
        if old is not None and i != 2:
            new = 0.5 * old + 0.5 * new
        if i != 2:  # tokens went after layer 1: their scores went along
            assert np.abs(states[i][0].numpy() - new).max() < 1e-4
            old = new
        else:
            old = states[2][0].double().numpy()
    a = seen[1].class_attention().double().mean(1)[0].numpy()
    p = a / a.sum()
    sharp = 1 - (-(p * np.log(p)).sum() / np.log(36)) ** 2
    assert counts[0] == (36, 36 - round(32 / 2**0.5 * sharp))
    assert counts[1][1] == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "either keep"),
        ({"keep": 0.5, "schedule": {1: 3}}, "either keep"),
        ({"keep": 0.0}, "neither a count"),
        ({"keep": 1.5}, "neither a count"),
        ({"schedule": {}}, "name a layer"),
        ({"schedule": {4: 3}}, "layer 4"),
        ({"schedule": {1: 0}}, "neither a count"),
        ({"schedule": {1: True}}, "neither a count"),
        ({"keep": 0.5, "how": "nobody"}, "expected one of class"),
        ({"keep": 0.5, "place": "inside"}, "expected one of before"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, says):
    model = make("vit")
    with pytest.raises(ValueError, match=says), reduce_tokens(model, **arguments):
        pass
    assert not model.vit.layers[0]._forward_pre_hooks


def test_encoders_whose_tokens_have_places_are_refused():
    grid = VisionPatches(
        24, 4, dim=32, depth=2, mixer=lambda layer: Attention(32, 4, position=Rotary(axes=2))
    )
    with pytest.raises(UnsupportedModelError, match="position"), reduce_tokens(grid, keep=0.5):
        pass
    causal = Decoder(10, 32, 2, mixer=lambda layer: Attention(32, 4, causal=True))
    with pytest.raises(UnsupportedModelError, match="looks back"), reduce_tokens(causal, keep=0.5):
        pass
    siglip = make("siglip")
    with pytest.raises(ValueError, match="no class token"), reduce_tokens(siglip, keep=0.5):
        pass


def test_a_mask_that_hides_something_is_refused():
    model = make("vit")
    with pytest.raises(UnsupportedModelError, match="hides"), reduce_tokens(model, keep=0.5):
        model(pixel_values=images(), attention_mask=torch.tensor([[1] * 36 + [0]] * 3))


def test_stages_are_those_of_evit():
    assert stages(12) == (3, 6, 9)
    assert stages(4) == (1, 2, 3)
