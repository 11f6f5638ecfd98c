"""For any shape: what is kept is kept exactly, sinks and window stay, bytes are counted."""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headwise.compress import Adaptive, HeadCache, PerHead, Policy, Seen
from headwise.compress.cache.block_attention import Query
from headwise.compress.cache.budgets import Budget, as_budget
from headwise.compress.cache.policies.accumulated_mass import AccumulatedMass
from headwise.compress.cache.policies.observation_window import ObservationWindow
from headwise.compress.cache.ragged import Ragged
from headwise.compress.cache.rules import Rules
from headwise.compress.cache.store import Plain
from tests.compress.cache.models import MODELS, logits, reference
from tests.instruments import tiny


class Chance(Policy):
    """Any scores at all, infinitely many of them low."""

    def score(self, seen: Seen) -> Tensor:
        return torch.randn(seen.positions.shape)


class Twin:
    """A layer that lets go of nothing: what every entry was."""

    def __init__(self, rows: int, d: int) -> None:
        self.keys, self.values = torch.empty(rows, 0, d), torch.empty(rows, 0, d)
        self.places = torch.empty(rows, 0, dtype=torch.long)

    def add(self, keys: Tensor, values: Tensor, places: Tensor) -> None:
        self.keys = torch.cat([self.keys, keys.flatten(0, 1)], 1)
        self.values = torch.cat([self.values, values.flatten(0, 1)], 1)
        self.places = torch.cat([self.places, places.long()], 1)


def check(layer: Ragged, twin: Twin) -> None:
    """Entries are what they were, to the bit; sinks and window are among them."""
    for block in layer.blocks:
        keys, values = block.store.whole()
        for at, row in enumerate(block.rows.tolist()):
            places = block.positions[at].tolist()
            for n, place in enumerate(places):
                if place >= 0:
                    assert torch.equal(keys[at, n], twin.keys[row, place])
                    assert torch.equal(values[at, n], twin.values[row, place])
            real = [p for p in twin.places[row].tolist() if p >= 0]
            held = [p for p in places if p >= 0]
            assert held == sorted(set(held))
            assert set(held) <= set(real)
            sinks, window = layer.rules.sinks, layer.rules.window
            if layer.window is None:
                must = real[:sinks] + real[-window:]
            else:
                seen = [p for p in real if p > layer.length - layer.window]
                must = seen[-window:]
                if len(real) <= layer.window:
                    must += [p for p in real[:sinks] if p in seen]
            assert set(must) <= set(held)
    assert sorted(row for b in layer.blocks for row in b.rows.tolist()) == list(
        range(len(twin.keys))
    )


def expected(asked: Query, layer: Ragged, kept: list[list[int]], twin: Twin) -> Tensor:
    """Attention over what was kept before the step and all of its own tokens."""
    outs = []
    for row, before in enumerate(kept):
        seen = torch.zeros(asked.count, twin.keys.shape[1], dtype=torch.bool)
        start = twin.keys.shape[1] - asked.count
        for i in range(asked.count):
            own = range(start, start + i + 1)
            looked = [p for p in (*before, *own) if int(twin.places[row, p]) >= 0]
            if layer.window is not None:
                looked = [p for p in looked if p > start + i - layer.window]
            seen[i, looked] = bool(asked.positions[row, i] >= 0)
        outs.append(reference(asked.queries[row], twin.keys[row], twin.values[row], seen, 0.3))
    return torch.stack(outs)


def budgets(heads: int) -> Any:
    table = st.lists(st.integers(1, 20), min_size=heads, max_size=heads)
    return st.one_of(
        st.sampled_from([0.2, 0.5, 1.0, 3, 9, Adaptive(0.4), Adaptive(5, floor=0.0)]),
        table.map(lambda row: PerHead([row])),
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_layer_of_any_shape(data: st.DataObject) -> None:
    batch, heads, group, d = (data.draw(st.integers(1, n)) for n in (3, 3, 2, 4))
    budget: Budget = as_budget(data.draw(budgets(heads)))
    policy = data.draw(st.sampled_from([Chance(), AccumulatedMass(), ObservationWindow(3)]))
    sinks, window = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 4))
    step, slack = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    slides = data.draw(st.one_of(st.none(), st.integers(3, 12)))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    rules = Rules(policy, budget, sinks, window, step, slack, (Plain.make,))
    layer, twin = Ragged(0, slides, rules), Twin(batch * heads, d)
    for m in data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=8)):
        keys, values = torch.randn(batch, heads, m, d), torch.randn(batch, heads, m, d)
        places = torch.arange(layer.length, layer.length + m).expand(batch, m)
        real = None
        if data.draw(st.booleans()):
            real = torch.rand(batch, m) < 0.7
            real[:, -1] |= layer.length == 0  # a sequence has a token
            places = places.masked_fill(~real, -1)
        at = places.repeat_interleave(heads, 0).to(torch.int32)
        asked = Query(torch.randn(batch * heads, group, m, d), at, 0.3, None, None, slides)
        kept = layer.kept()
        twin.add(keys, values, at)
        first = not layer.blocks
        if first:
            layer.begin(keys, values, asked, real)
        else:
            layer.append(keys, values, asked, real)
            got = layer.attend(asked, d)
            want = expected(asked, layer, kept, twin)
            told = (at >= 0)[:, None, :, None].expand_as(got)
            assert torch.allclose(got[told].double(), want[told], atol=1e-5)
        layer.observe(asked)
        layer.let_go(first, wait=False)
        check(layer, twin)
        rest = budget.keep(0, layer.length, []) if not budget.needs_scores else [layer.length]
        most = max(*rest, sinks + window) + step + slack + 12
        assert all(len(places) <= most for places in layer.kept())
        assert layer.nbytes() == reachable(layer)


def reachable(thing: Any) -> int:
    """Bytes of every tensor storage that can be reached from a thing, each once."""
    seen: set[int] = set()
    storages: dict[int, int] = {}
    waiting = [thing]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, weakref.ref):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            storage = one.untyped_storage()
            if storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list | tuple | set):
            waiting += one
        elif hasattr(one, "__dict__") and not isinstance(one, type | torch.nn.Module):
            waiting += vars(one).values()
    return sum(storages.values())


def test_bytes_counted_are_bytes_held() -> None:
    model = MODELS["llama"]()
    for policy, bits in ((ObservationWindow(4), None), (AccumulatedMass(), 4)):
        with HeadCache(model, Adaptive(0.4), policy, bits, slack=4, step=2, window=4) as cache:
            logits(model, cache, tiny.ids(50, batch=2), [30, 6] + [1] * 14)
            assert cache.nbytes() == sum(reachable(layer) for layer in cache.layers) > 0


def test_what_is_let_go_of_is_gone() -> None:
    """The allocator has it back: live tensors are the model's and what nbytes says."""

    def live() -> int:
        gc.collect()
        held = {}
        for one in gc.get_objects():
            # By type, and with care: other tests of this process leave fake, meta, sparse and
            # functional tensors behind, which have no memory to ask for.
            if type(one) not in (Tensor, torch.nn.Parameter) or one.device.type != "cpu":
                continue
            with contextlib.suppress(RuntimeError):
                storage = one.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
        return sum(held.values())

    model = tiny.llama(num_hidden_layers=4, hidden_size=64)
    ids = tiny.ids(400)
    before = live()
    with HeadCache(model, 0.1, Chance()) as cache:
        logits(model, cache, ids, [400])
        assert abs(live() - before - cache.nbytes()) < 4096
        assert cache.nbytes() < 0.5 * 400 * 4 * 4 * 64


def test_a_prefill_holds_one_layer_in_full() -> None:
    """The peak of a prefill in one step: a layer's keys and the rest of those before it."""
    model = tiny.llama(num_hidden_layers=6)
    with HeadCache(model, 16, Chance(), sinks=2, window=4, step=4, slack=8) as cache:
        peaks = []
        layers = [layer.held for layer in cache.layers]

        def hooked(module: Any, args: Any, out: Any) -> None:
            peaks.append([len(places[0]) if (places := h.kept()) else 0 for h in layers])

        handles = [layer.register_forward_hook(hooked) for layer in model.model.layers]
        logits(model, cache, tiny.ids(300), [300])
        for handle in handles:
            handle.remove()
    for index, counts in enumerate(peaks):
        assert counts == [16] * (index + 1) + [0] * (5 - index)


def test_a_chunked_prefill_stays_near_its_budget() -> None:
    model = MODELS["llama"]()
    with HeadCache(model, 24, Chance(), sinks=2, window=4, step=4, slack=8) as cache:
        for start in range(0, 300, 30):
            logits(model, cache, tiny.ids(300)[:, start : start + 30], [30])
            assert [len(places) for places in cache.kept(0)] == [24, 24]
            full = cache.nbytes()
            assert full < 2 * 2 * 2 * 8 * 4 * (24 + 30 + 8) + 4000
