"""Changes of attentions out of parts: what they compute, in all the ways in which they are run."""

import copy

import pytest
import torch

import headwise
from headwise.edits import (
    MoveMass,
    Scale,
    ScaleSink,
    ScaleTokens,
    Silence,
    Temperature,
    TowardsSelf,
    Uniform,
)
from headwise.maps import Window
from headwise.models import Site, UnsupportedModelError, observe, recording, view
from headwise.models.backbones import Decoder, EncoderDecoder
from headwise.parts import Alibi, Attention, Entmax, GroupedQuery, Rotary
from tests.edits import slow
from tests.edits.test_changes import ANYWHERE, BY_DISTANCE, close, first_readings

ATTENTIONS = {
    "plain": lambda layer: Attention(32, 4, causal=True),
    "grouped rotary": lambda layer: Attention(
        32, 4, project=GroupedQuery(2), position=Rotary(), causal=True
    ),
    "alibi": lambda layer: Attention(32, 4, position=Alibi(), causal=True),
    "window": lambda layer: Attention(32, 4, pattern=Window(5), causal=True),
}


def decoder(name="plain", depth=2):
    torch.manual_seed(0)
    model = Decoder(40, 32, depth, ATTENTIONS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


def ids(n=9, batch=2):
    return torch.randint(40, (batch, n), generator=torch.Generator().manual_seed(1))


def plain_table(reading):
    """Biases by position as a table, as the written-out attention wants them."""
    bias = reading.map.scores.bias
    if bias is not None and not isinstance(bias, torch.Tensor):
        n = reading.query.shape[2]
        j = torch.arange(n)
        table = bias.tile(j, j)[None]
        object.__setattr__(reading.map.scores, "bias", table)
    return reading


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_heads_compute_what_is_written_out(name, padded):
    model = decoder(name)
    look, given = view(model), {"input_ids": ids()}
    starts = None
    if padded:
        given["attention_mask"] = torch.ones(2, 9).long()
        given["attention_mask"][1, :3] = 0
        starts = torch.tensor([0, 3])
    place = ("decoder", "self")
    before = plain_table(first_readings(model, given, look, 0)[place])
    for change, told in (ANYWHERE | BY_DISTANCE).values():
        with headwise.swap(look, {(0, 1): change}):
            after = first_readings(model, given, look, 0)[place]
        torch.testing.assert_close(
            after.dense[:, [0, 2, 3]], before.dense[:, [0, 2, 3]], atol=1e-6, rtol=1e-6
        )
        for b in range(2):
            want = slow.weights(before, b, 1, starts, **told)
            real = want.sum(-1) > 0
            if starts is not None:
                real &= torch.arange(9) >= int(starts[b])
            close(after.dense[b, 1].double()[real], want[real], str(change))
            out = slow.output(before, b, 1, want)
            close(after.out[b, 1].double()[real], out[real], str(change))


@pytest.mark.parametrize("name", ["plain", "grouped rotary", "alibi"])
@pytest.mark.parametrize(
    "change",
    [ScaleTokens((1, 4), 3.0), MoveMass((0, 2), 0.5), Window(3), TowardsSelf(0.4), ScaleSink(4.0)],
    ids=str,
)
def test_decoding_token_by_token_is_the_parallel_form(name, change):
    model = decoder(name)
    with torch.no_grad(), headwise.swap(model, {(1, (0, 3)): change}):
        whole = model(ids())
        states = model.empty_states()
        steps = [model(ids()[:, n : n + 1], states=states) for n in range(9)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=2e-5, rtol=2e-5)


def test_outputs_are_changed_where_the_projection_reads_them():
    model = decoder()
    look, site = view(model), Site("heads", 1)
    with torch.no_grad(), recording(look, [site]) as kept:
        model(ids())
        plain = kept[site]
        with headwise.swap(look, {(1, 0): Silence(), (1, 2): Scale(-2.0)}):
            model(ids())
    factors = torch.tensor([0.0, 1.0, -2.0, 1.0])[:, None]
    torch.testing.assert_close(kept[site], plain * factors, atol=1e-5, rtol=1e-5)


def test_training_goes_through_a_change():
    """Gradients of the changed model: those of a uniform head do not reach its queries and keys."""
    model = decoder(depth=1).train()
    with headwise.swap(model, {0: Uniform()}):
        model(ids()).square().sum().backward()
    project = model.stack.mixers[0].project
    for silent in (project.query, project.key):
        assert silent.weight.grad is None or not silent.weight.grad.any()
    assert project.value.weight.grad.any()


def test_cross_attention_is_changed_too():
    torch.manual_seed(0)
    model = EncoderDecoder(
        40,
        32,
        1,
        lambda layer: Attention(32, 4),
        lambda layer: Attention(32, 4, causal=True),
        lambda layer: Attention(32, 4, context_dim=32),
    ).eval()
    look, given = view(model), {"input_ids": ids(), "decoder_input_ids": ids(5)}
    place = ("decoder", "cross")
    before = first_readings(model, given, look, 0)[place]
    with headwise.swap(look, {(*place, 0, 1): ScaleTokens((2, 3), 5.0)}):
        after = first_readings(model, given, look, 0)[place]
    want = before.dense[:, 1].clone()
    want[..., 2:4] *= 5.0
    torch.testing.assert_close(after.dense[:, 1], want / want.sum(-1, keepdim=True))
    torch.testing.assert_close(after.dense[:, 0], before.dense[:, 0])


def test_everything_is_as_it_was_afterwards_and_copies_are_not_changed():
    model = decoder()
    with torch.no_grad():
        before = model(ids())
        with headwise.swap(model, {"all": Temperature(3.0)}) as record:
            copied = copy.deepcopy(model)
            changed = model(ids())
            torch.testing.assert_close(copied(ids()), before)
        assert record[0]["heads"] == ["L0", "L1"]
        assert not torch.allclose(changed, before)
        assert torch.equal(model(ids()), before)
    assert all(mixer.editor is None for mixer in model.stack.mixers)


def test_maps_that_are_no_softmax_and_dropout_are_refused():
    model = Decoder(40, 32, 1, lambda layer: Attention(32, 4, normalize=Entmax(1.5), causal=True))
    with pytest.raises(UnsupportedModelError, match=r"no softmax|not a softmax"):
        headwise.swap(model, {0: Silence()})
    model = Decoder(40, 32, 1, lambda layer: Attention(32, 4, dropout=0.5, causal=True)).train()
    with pytest.raises(ValueError, match=r"call model\.eval"), headwise.swap(model, {0: Silence()}):
        model(ids())


def test_what_hides_its_map_is_not_observed():
    model = decoder()
    with (
        pytest.raises(UnsupportedModelError, match="gives what no map"),
        observe(view(model), lambda reading: None),
        headwise.swap(model, {(0, 1): TowardsSelf(0.5)}),
    ):
        model(ids())
