"""What the claims of LayerShuffle do not say."""

import pytest
import torch

from headwise.papers.depth.layer_shuffle import VARIANTS, LayerShuffle, orders

PIXELS = torch.rand(5, 1, 8, 8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_draws_orders_and_evaluation_does_not(variant: str) -> None:
    torch.manual_seed(0)
    model = LayerShuffle(variant=variant)
    drawn = {round(float(model(PIXELS)[0, 0].detach()), 5) for _ in range(6)}
    assert len(drawn) > 1
    model.eval()
    assert torch.equal(model(PIXELS), model(PIXELS))
    model.order = [0, 1, 2, 3, 4, 5]
    in_turn = model(PIXELS)
    model.order = None
    assert torch.equal(model(PIXELS), in_turn)


def test_in_order_the_plain_network_is_the_vision_transformer() -> None:
    model = LayerShuffle().eval()
    assert torch.allclose(model(PIXELS), model.model(PIXELS), atol=1e-6)


def test_the_guess_of_the_place_is_a_penalty_and_has_gradients() -> None:
    model = LayerShuffle(variant="predict")
    model(PIXELS)
    model.penalty().backward()  # type: ignore[union-attr]
    assert model.guess is not None
    assert all(p.grad is not None for p in model.guess.parameters())
    guessed = torch.as_tensor(model.penalty()).detach()
    assert abs(float(guessed) - 0.1 * float(torch.tensor(6.0).log())) < 0.1
    assert LayerShuffle().penalty() == 0.0


def test_orders_and_variants() -> None:
    assert all(len(set(order)) == 4 for order in orders(4))
    with pytest.raises(ValueError, match="none of plain"):
        LayerShuffle(variant="other")
