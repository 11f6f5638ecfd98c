"""Similarity of heads against exact cosines of dense maps."""

import numpy as np
import pytest
import torch

from headwise.instruments.instrument import Tables
from headwise.instruments.similarity import ROWS, WIDTH, Similarity
from tests.instruments import tiny


def exact(model: object, ids: torch.Tensor, rest: bool = False) -> np.ndarray:
    """Cosines of all rows `(heads, heads, rows)`, from eager matrices."""
    dense = np.concatenate([layer[0] for layer in tiny.maps(model, {"input_ids": ids})])
    if rest:
        dense = dense[:, 1:, 1:]  # the first row has no rest
    unit = dense / np.linalg.norm(dense, axis=-1, keepdims=True)
    return np.einsum("ain,bin->abi", unit, unit)


def test_short_inputs_on_all_rows_are_exact() -> None:
    """As many rows as are sampled, so that the sample is the whole."""
    model = tiny.llama()
    ids = tiny.ids(ROWS)
    (result,), _ = tiny.measure(model, [Similarity()], ids)
    cosines = exact(model, ids)
    assert np.allclose(result.pairs["similarity"], cosines.mean(-1), atol=1e-5)
    variance = cosines.var(-1, ddof=1) / ROWS
    assert np.allclose(result.pairs["similarity_se"], variance, atol=1e-6)
    rest = exact(model, ids, rest=True).mean(-1)
    assert np.allclose(result.pairs["similarity_rest"], rest, atol=1e-5)
    assert np.triu(result.pairs["similarity"], 1).max() < 0.9999


def test_folded_and_sampled_rows_estimate_the_whole() -> None:
    """Longer than the width of a fold: within four standard errors nearly everywhere."""
    model = tiny.llama(max_position_embeddings=4096)
    ids = tiny.ids(3 * WIDTH + 77)
    (result,), _ = tiny.measure(model, [Similarity()], ids)
    cosines = exact(model, ids).mean(-1)
    error = np.sqrt(result.pairs["similarity_se"]) + 1 / np.sqrt(WIDTH * ROWS)
    off = ~np.eye(8, dtype=bool)
    distance = np.abs(result.pairs["similarity"] - cosines)[off]
    assert (distance < 4 * error[off]).mean() > 0.95
    assert distance.max() < 0.1
    assert cosines[off].max() > 3 * cosines[off].min()  # there is something to tell apart


def test_a_fold_keeps_inner_products() -> None:
    """Unbiased: over many seeds the mean error goes to zero."""
    random = torch.Generator().manual_seed(0)
    rows = torch.rand((2, 1, 5 * WIDTH), generator=random) ** 8
    rows = rows / rows.sum(-1, keepdim=True)
    wanted = float(rows[0, 0] @ rows[1, 0])
    found, norms = [], rows.norm(dim=-1)[:, 0]
    for seed in range(300):
        instrument = Similarity()
        instrument.start(None, seed)  # type: ignore[arg-type]
        whole, _ = instrument._fold(rows, torch.tensor([0]))
        found.append(float(whole.folded[0, 0] @ whole.folded[1, 0]))
    scale = float(norms[0] * norms[1]) / WIDTH**0.5
    assert np.std(found) < 2 * scale
    assert abs(np.mean(found) - wanted) < 4 * np.std(found) / 300**0.5


def test_the_same_head_twice_is_found() -> None:
    model = tiny.llama(num_key_value_heads=4)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            for name in ("q_proj", "k_proj"):
                weight = getattr(layer.self_attn, name).weight
                weight[8:16] = weight[24:32]
    instrument = Similarity()
    (result,), _ = tiny.measure(model, [instrument], tiny.ids(700))
    tables = Tables(1, {}, {}, dict(result.pairs))
    instrument.conclude(tables)
    assert tables.heads["similar_to"][5] == 7
    assert tables.heads["similar_to"][7] == 5
    assert tables.heads["similarity"][5] == pytest.approx(1, abs=1e-3)
    assert tables.heads["similarity"][4] < 0.95
    assert np.isnan(tables.layers["next_similarity"][1])
    block = result.pairs["similarity"][:4, 4:]
    assert tables.layers["next_similarity"][0] == pytest.approx(block.max(1).mean())


def test_maps_between_other_sequences_are_not_compared() -> None:
    (result,), _ = tiny.measure(tiny.bart(), [Similarity()], tiny.ids(30))
    known = ~np.isnan(result.pairs["similarity"])
    # encoder self 8; decoder layers of 4 self and 4 cross each
    group = np.array([0] * 8 + [1] * 4 + [2] * 4 + [1] * 4 + [2] * 4)
    assert np.array_equal(known, group[:, None] == group)


def test_heads_with_a_sink_are_alike_in_it_and_not_in_the_rest() -> None:
    model = tiny.gpt2()
    tiny.add_sink(model, 0, strength=1.5)
    (result,), _ = tiny.measure(model, [Similarity()], tiny.ids(200))
    off = ~np.eye(4, dtype=bool)
    assert result.pairs["similarity"][:4, :4][off].min() > 0.95
    assert result.pairs["similarity_rest"][:4, :4][off].max() < 0.8
