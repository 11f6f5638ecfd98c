"""Shared maps, routers and recurrent heads come back from a folder."""

from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.compress import (
    load,
    replace_heads,
    route_attention,
    save,
    share_attention,
    steps_of,
)
from headwise.models.backbones import Decoder
from headwise.parts import Attention, Rotary
from tests.instruments import tiny

IDS = torch.randint(1, 30, (2, 9), generator=torch.Generator().manual_seed(1))


def ours() -> Decoder:
    torch.manual_seed(3)
    return Decoder(30, 16, 3, lambda n: Attention(16, 2, position=Rotary(), causal=True)).eval()


CHANGES: dict[str, Any] = {
    "shared maps": (lambda: tiny.llama(num_hidden_layers=3), lambda m: share_attention(m, {2: 1})),
    "a fused projection": (tiny.gpt2, lambda m: share_attention(m, {1: 0})),
    "routers": (lambda: tiny.llama(num_hidden_layers=3), lambda m: route_attention(m, [1])),
    "our shared maps": (ours, lambda m: share_attention(m, {2: 0})),
    "our routers": (ours, route_attention),
    "recurrent heads": (ours, lambda m: replace_heads(m, [(0, 1), (2, 0), (2, 1)])),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_what_comes_back_computes_the_same(name: str, tmp_path: Path) -> None:
    make, change = CHANGES[name]
    model = make()
    change(model)
    save(model, tmp_path / "it")
    again = load(tmp_path / "it", into=ours() if isinstance(model, Decoder) else None)
    assert steps_of(again) == steps_of(model)
    a, b = model(IDS), again(IDS)
    assert torch.equal(getattr(a, "logits", a), getattr(b, "logits", b))
    if hasattr(model, "config"):
        how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(IDS, **how), again.generate(IDS, **how))
