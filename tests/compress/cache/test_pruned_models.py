"""A HeadCache in models that have lost heads, attentions and layers."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from headwise.compress import (
    ByKind,
    HeadCache,
    KeyNorm,
    ObservationWindow,
    drop_layers,
    prune_heads,
)
from headwise.compress.cache.unequal import UnequalGroups
from headwise.models import view
from tests.instruments.tiny import gpt2, gpt_oss, llama, mistral


def heads_of_layer(model: Any, layer: int) -> list[tuple[int, int]]:
    return [(layer, head) for head in range(view(model).attentions[layer].heads)]


CUTS: dict[str, Callable[[Any], None]] = {
    "unequal groups": lambda model: prune_heads(model, [(0, 0), (1, 1), (1, 2)]),
    "no attention": lambda model: drop_layers(model, [1], parts="attention"),
    "no heads in the first": lambda model: prune_heads(model, heads_of_layer(model, 0)),
    "one layer less": lambda model: drop_layers(model, [0]),
    "no feed-forward part": lambda model: drop_layers(model, [1], parts="mlp"),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("make", [llama, gpt2, mistral, gpt_oss])
def test_with_room_for_all_it_goes_on_as_with_the_models_own_cache(make: Any, cut: str) -> None:
    model = make().eval()
    CUTS[cut](model)
    ids = torch.randint(model.config.vocab_size, (2, 14), generator=torch.manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    asked = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    plain = model.generate(ids, **asked)
    with HeadCache(model, budget=1.0) as cache:
        found = model.generate(ids, past_key_values=cache, **asked)
        assert cache.get_seq_length() == 19
        assert cache.batch_size == 2
    torch.testing.assert_close(found, plain, atol=0, rtol=0)
    beams = {**asked, "num_beams": 2}
    plain = model.generate(ids, **beams)
    with HeadCache(model, budget=1.0) as cache:
        torch.testing.assert_close(
            model.generate(ids, past_key_values=cache, **beams), plain, atol=0, rtol=0
        )


@pytest.mark.parametrize("policy", [KeyNorm(), ObservationWindow(4)])
def test_after_an_eviction_unequal_groups_are_heads_that_are_not_listened_to(policy: Any) -> None:
    """A pruned head is one whose columns of the output projection are zero; what a policy that
    looks at keys keeps is the same, and of the others what is kept has the right number."""
    gone = [(0, 0), (1, 1), (1, 2)]
    whole = llama().eval()
    pruned = copy.deepcopy(whole)
    prune_heads(pruned, gone)
    with torch.no_grad():
        for layer, head in gone:
            view(whole).attentions[layer].output_weight()[head].zero_()
    ids = torch.randint(whole.config.vocab_size, (2, 40), generator=torch.manual_seed(1))
    logits, kept = [], []
    for model in (whole, pruned):
        with HeadCache(model, 12, policy, sinks=1, window=4, step=1, slack=2) as cache:
            parts = [model(ids[:, :30], past_key_values=cache).logits]
            parts += [model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(30, 40)]
            logits.append(torch.cat(parts, 1))
            kept.append([cache.kept(layer) for layer in range(2)])
    assert [[len(row) for row in rows] for rows in kept[0]] == [
        [len(row) for row in rows] for rows in kept[1]
    ]
    if isinstance(policy, KeyNorm):
        assert kept[0] == kept[1]
        torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-4)


def test_a_table_of_budgets_may_say_anything_of_a_layer_without_attention() -> None:
    model = llama().eval()
    heads = view(model).attentions[0].kv_heads
    drop_layers(model, [1], parts="attention")
    with HeadCache(model, torch.full((2, heads), 0.5)) as cache:
        model(torch.zeros(1, 8, dtype=torch.long), past_key_values=cache)
        assert cache.kept(1) == []
        assert cache.nbytes() > 0
    with pytest.raises(ValueError, match="table"):
        HeadCache(model, torch.full((3, heads), 0.5))


def test_budgets_are_of_the_heads_that_are_held_also_where_groups_are_unequal() -> None:
    model = llama().eval()
    prune_heads(model, [(0, 0), (1, 1), (1, 2)])
    shapes = [view(model).attentions[layer].key_value_of for layer in range(2)]
    assert [attention.cached_heads for attention in view(model).attentions] == [2, 2]
    assert shapes == [(0, 1, 1), (0, 1)]
    ids = torch.randint(model.config.vocab_size, (1, 60), generator=torch.manual_seed(2))
    asked = {"policy": KeyNorm(), "sinks": 0, "window": 1, "step": 1, "slack": 1}
    with HeadCache(model, torch.tensor([[10, 20], [30, 40]]), **asked) as cache:
        model(ids, past_key_values=cache)
        counts = [[len(row) for row in cache.kept(layer)] for layer in range(2)]
    assert counts == [[10, 20], [30, 40]]
    far = {(0, 2), (1, 0)}  # of the query heads that are left
    rows = [(layer, head) for layer, of in enumerate(shapes) for head in range(len(of))]
    columns = {
        "layer": np.array([layer for layer, _ in rows]),
        "head": np.array([head for _, head in rows]),
        "kind": np.array(["retrieval" if row in far else "local" for row in rows]),
    }
    atlas: Any = type("Atlas", (), {"heads": columns})
    with HeadCache(model, ByKind(atlas, window=8), **asked) as cache:
        model(ids, past_key_values=cache)
        counts = [[len(row) for row in cache.kept(layer)] for layer in range(2)]
    assert counts == [[8, 60], [60, 8]]


@pytest.mark.parametrize("of", [(0, 0, 0, 1), (0, 1, 1), (0,), (0, 1, 2, 2, 2)])
def test_spreading_and_gathering_give_back_every_head(of: tuple[int, ...]) -> None:
    groups = UnequalGroups(of)
    heads = torch.arange(len(of), dtype=torch.float32).view(1, -1, 1, 1)
    spread = groups.spread(heads)
    largest = max(of.count(k) for k in of)
    assert spread.shape[1] == largest * (max(of) + 1)
    assert torch.equal(groups.gather(spread), heads)
    read = torch.tensor(of)[spread.flatten().long()].view(-1, largest)
    assert all(row.unique().numel() == 1 for row in read)
    rows = torch.arange(max(of) + 1).view(1, -1)
    assert groups.repeat(rows).tolist() == [list(of)]
