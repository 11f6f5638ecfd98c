"""What the claims of Router-Tuning do not say."""

import torch

from headwise.compress import open_share
from headwise.compress.structure.layer_routers import routers_of
from headwise.models.backbones import Decoder
from headwise.papers.depth.router_tuning import DEPTH, Priced, fixed, task, texts
from headwise.parts import Attention


def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(task().vocabulary, 16, DEPTH, lambda _: Attention(16, 2, causal=True)).eval()


def test_the_price_counts_what_is_open_beyond_the_target() -> None:
    half = Priced(fixed(model(), [0, 1, 2, 3]), 0.25, 2.0)
    with torch.no_grad():
        half(texts()[:2])
    assert float(open_share(half, hard=True)) == 0.5
    soft = torch.tensor([2.0, -2.0]).sigmoid().mean()
    assert abs(float(half.penalty().detach()) - 2.0 * (float(soft) - 0.25)) < 1e-5
    assert float(Priced(half.model, 0.9, 2.0).penalty().detach()) == 0.0


def test_fixed_routers_open_for_the_layers_named() -> None:
    made = fixed(model(), [1, 5])
    with torch.no_grad():
        made(texts()[:2])
    opened = [bool((r.soft > 0.5).all()) for r in routers_of(made)]  # type: ignore[operator]
    assert [n for n, is_open in enumerate(opened) if is_open] == [1, 5]
