"""The 260K-parameter Llama on a story: facts that hold by a wide margin, and its own matrices."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headwise.instruments import INSTRUMENTS, Atlas, see
from tests.instruments import tiny


@pytest.fixture(scope="module")
def stories(assets: Path) -> tuple[Any, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    folder = assets / "stories260K"
    spec = importlib.util.spec_from_file_location("llama2c", folder / "llama2c.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = module.Tok(folder / "tok512.bin", 512)
    text = (assets / "text" / "tinystories_sample.txt").read_text(encoding="utf-8")[:1500]
    model = AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    return model, torch.tensor(words.enc(text)[:400])


@pytest.fixture(scope="module")
def atlas(stories: tuple[Any, torch.Tensor]) -> Atlas:
    return see(*stories)


def test_previous_token_heads(atlas: Atlas) -> None:
    found = set(atlas.heads_of("previous-token"))
    assert found >= {(1, 3), (1, 5), (3, 6)}
    assert atlas.head(3, 6)["previous_token_score"] > 0.7
    assert atlas.head(3, 6)["previous_mass"] > 0.5
    assert 4 not in {layer for layer, _ in found}


def test_it_has_neither_induction_nor_sinks(atlas: Atlas) -> None:
    """Too small for either: a measurement that finds them everywhere would be wrong."""
    assert atlas.heads["induction_score"].max() < 0.1
    assert atlas.heads["sink_mass"].max() < 0.1
    assert atlas.heads["dormant_share"].max() == 0
    assert not atlas.heads_of(("induction", "sink", "retrieval"))


def test_the_residual_stream_grows(atlas: Atlas) -> None:
    assert (np.diff(atlas.layers["residual_norm"]) > 0).all()
    assert (atlas.heads["residual_share"] > 0.02).all()
    assert (atlas.heads["residual_share"] < 0.5).all()


def test_numbers_equal_its_own_matrices(stories: tuple[Any, torch.Tensor], atlas: Atlas) -> None:
    model, ids = stories
    dense = np.concatenate(tiny.maps(model, {"input_ids": ids[None]}), 1)[0]
    n = len(ids)
    entropy = -(dense * np.log(np.maximum(dense, 1e-300))).sum(-1).mean(-1)
    previous = np.diagonal(dense, -1, 1, 2).sum(-1) / n
    same = (ids[:, None] == ids).numpy() & ~np.eye(n, dtype=bool)
    wanted = {
        "entropy": entropy,
        "previous_mass": previous,
        "sink_mass": dense[:, :, 0].mean(-1),
        "max_weight": dense.max(-1).mean(-1),
        "same_token": (dense * same).sum((1, 2)) / n,
    }
    for column, values in wanted.items():
        assert np.allclose(atlas.heads[column], values, rtol=1e-3, atol=1e-4), column


def test_every_instrument_can_be_chosen_alone(stories: tuple[Any, torch.Tensor]) -> None:
    model, ids = stories
    for name, instrument in INSTRUMENTS.items():
        alone = see(model, ids[:120], name)
        tables = {**alone.heads, **alone.layers}
        assert all(column.name in tables for column in instrument.columns), name
