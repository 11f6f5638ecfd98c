"""Heads that became a recurrence."""

import copy

import pytest
import torch
from torch import Tensor

from headwise.compress import most_recent, recency_ratio, replace_heads, steps_of
from headwise.compress.step import read_step, write_step
from headwise.maps import Window
from headwise.maps.dense import DenseEngine
from headwise.models import UnsupportedModelError, view
from headwise.models.backbones import Decoder
from headwise.parts import Attention, GroupedQuery, Rotary
from headwise.parts.watching import watching
from tests.instruments import tiny


def decoder(kv_heads: int = 4) -> Decoder:
    torch.manual_seed(0)
    project = lambda: GroupedQuery(kv_heads)  # noqa: E731
    made = Decoder(30, 32, 3, lambda n: Attention(32, 4, project(), position=Rotary(), causal=True))
    for p in made.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
    return made.eval()


def ids(rows: int = 2, n: int = 20) -> Tensor:
    return torch.randint(30, (rows, n), generator=torch.Generator().manual_seed(1))


HEADS = [(1, 0), (1, 2), *((2, head) for head in range(4))]


@torch.no_grad()
def test_decoding_equals_one_pass_and_the_cache_is_gone() -> None:
    model = decoder()
    full = model.stack.mixers[0].state_bytes(100)
    replace_heads(model, HEADS, states=4, conv=3)
    given = ids()
    states = model.empty_states()
    steps = [model(given[:, :7], states=states)]
    steps += [model(given[:, i : i + 1], states=states) for i in range(7, 20)]
    assert (torch.cat(steps, 1) - model(given)).abs().max() < 1e-4
    for mixer, state in zip(model.stack.mixers, states, strict=True):
        assert state.nbytes() == 2 * mixer.state_bytes(20)
        assert state.seen == 20
    half, none = (model.stack.mixers[layer] for layer in (1, 2))
    assert half.state_bytes(100) == full // 2 + half.state_bytes(0)
    assert none.state_bytes(100) == none.state_bytes(0) == 4 * (4 + 2) * 32


@torch.no_grad()
def test_the_heads_that_stay_compute_what_they_did() -> None:
    model = decoder()
    x = torch.randn(2, 9, 32)
    before = model.stack.mixers[1]
    with watching(before) as seen:
        before(x)
    weight = view(model).attentions[1].output_weight().clone()
    want = sum(seen[0].out[:, h] @ weight[h].T for h in (1, 3))
    replace_heads(model, [(1, 0), (1, 2)])
    after = model.stack.mixers[1]
    assert (after(x) - after.near(x) - want).abs().max() < 1e-5
    columns = torch.cat([weight[0], weight[2]], 1)
    assert torch.equal(after.near.out_proj.weight, columns)


@torch.no_grad()
def test_padding_and_beams() -> None:
    model = decoder()
    replace_heads(model, HEADS)
    given = ids(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), given], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    assert (model(padded, mask)[:, 3:] - model(given)).abs().max() < 1e-4
    both, states = ids(2, 6), model.empty_states()
    model(both[:, :5], states=states)
    for state in states:
        state.select(torch.tensor([1, 1]))
    after = model(both[[1, 1], 5:], states=states)
    assert (after - model(both[[1, 1]])[:, 5:]).abs().max() < 1e-4


def test_the_step_is_done_again_without_data_and_gradients_flow() -> None:
    model = decoder()
    replace_heads(model, HEADS, states=3)
    (step,) = steps_of(model)
    with torch.device("meta"):
        empty = Decoder(30, 32, 3, lambda n: Attention(32, 4, position=Rotary(), causal=True))
    read_step(write_step(step)).apply(empty)
    assert {k: v.shape for k, v in empty.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    model(ids()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(copy.deepcopy(model)(ids()), model(ids()))


@torch.no_grad()
def test_the_ratio_equals_that_of_dense_maps() -> None:
    model, given = decoder(), ids(3, 18)
    with watching(*model.stack.mixers) as seen:
        model(given)
    got = recency_ratio(model, given, window=4)
    for layer, one in enumerate(seen):
        dense = DenseEngine(one.scores).map.double()
        for head in range(4):
            near = whole = 0.0
            for b in range(3):
                for i in range(4, 18):
                    near += float(dense[b, head, i, i - 3 : i + 1].sum())
                    whole += float(dense[b, head, i, 1 : i + 1].sum())
            assert got[layer, head] == pytest.approx(near / whole, abs=1e-4)
    local = Decoder(30, 32, 1, lambda n: Attention(32, 4, pattern=Window(3), causal=True))
    assert (recency_ratio(local, given, window=3) > 0.9999).all()


def test_which_heads_are_chosen() -> None:
    ratios = torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.2, torch.nan]])
    assert most_recent(ratios, 0.6) == [(0, 0), (0, 1), (1, 0)]
    assert most_recent(ratios, 0.4, by_layer=True) == [(0, 0), (1, 0)]
    with pytest.raises(ValueError, match="share"):
        most_recent(ratios, 1.5)


def test_what_is_refused() -> None:
    model = decoder(2)
    before = model(ids())
    for heads, words in (
        ([], "is empty"),
        ([(7, 0)], "no head"),
        ([(0, 4)], "no head"),
        ([(0, 0)], "share a key-value head"),
    ):
        with pytest.raises(ValueError, match=words):
            replace_heads(model, heads)
    assert torch.equal(model(ids()), before)
    replace_heads(model, [(0, 0), (0, 1)])
    assert model.stack.mixers[0].far.size.kv_heads == 1
    with pytest.raises(UnsupportedModelError, match=r"headwise\.parts"):
        replace_heads(tiny.llama(), [(0, 0)])
    with pytest.raises(ValueError, match="longer than the window"):
        recency_ratio(model, ids(1, 4), window=8)
