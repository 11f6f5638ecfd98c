"""Tokens that leave a decoder early."""

import pytest
import torch
from torch import Tensor, nn

from headwise.compress.structure.early_exit import Confidence, EarlyExit
from headwise.maps import Window
from headwise.models.backbones import Decoder
from headwise.parts import Attention, GroupedQuery, Rotary, SelectiveSSM
from headwise.parts.wiring.sandwich import Sandwich


def model() -> EarlyExit:
    torch.manual_seed(0)
    made = EarlyExit(
        Decoder(
            30,
            32,
            4,
            lambda n: Attention(
                32,
                4,
                GroupedQuery(2),
                position=Rotary(),
                causal=True,
                pattern=Window(5) if n == 1 else None,
            ),
        )
    )
    for p in made.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.3)
    return made.eval()


def ids(rows: int = 2, n: int = 14) -> Tensor:
    return torch.randint(30, (rows, n), generator=torch.Generator().manual_seed(6))


def by_hand(made: EarlyExit, given: Tensor, policy: Confidence) -> tuple[Tensor, Tensor]:
    """Token by token, each with all that is before it, from the copied states of every layer."""
    stack = made.decoder.stack
    rows = []
    for line in given:
        kept: list[list[Tensor]] = [[] for _ in range(made.depth)]  # inputs of each layer
        logits, exits = [], []
        for token in line:
            x, left = made.decoder.embed(token[None, None]), None
            for layer in range(made.depth):
                kept[layer].append(x)
                if left is not None:
                    continue
                so_far = torch.cat(kept[layer], 1)
                x = made._block(layer, so_far, None)[:, -1:]
                here = made.answer(layer, x)
                if layer == made.depth - 1 or bool(policy(layer, x, here)):
                    left, said = layer, here
            logits.append(said)
            exits.append(left)
        rows.append((torch.cat(logits, 1), torch.tensor([exits])))
    assert len(stack.mixers) == made.depth
    return torch.cat([a for a, _ in rows]), torch.cat([b for _, b in rows])


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.1])
def test_in_parallel_and_step_by_step_it_is_what_the_loop_says(threshold: float) -> None:
    made, given, policy = model(), ids(), Confidence(threshold)
    want, left = by_hand(made, given, policy)
    got, exits = made.run(given, policy)
    assert torch.equal(exits, left)
    assert (got - want).abs().max() < 1e-4
    if threshold in (0.3, 0.5):
        assert len(exits.unique()) > 2
    for row in range(2):
        states, steps = made.empty_states(), []
        for i in range(14):
            logits, where = made.run(given[row : row + 1, i : i + 1], policy, states)
            steps.append(logits)
            assert torch.equal(where, left[row : row + 1, i : i + 1])
        assert (torch.cat(steps, 1) - want[row : row + 1]).abs().max() < 1e-4
        assert all(state.seen == 14 for state in states)


@torch.no_grad()
def test_blocks_above_the_exit_do_not_run() -> None:
    made, ran = model(), []
    for layer, block in enumerate(made.decoder.stack.layers):
        block.register_forward_hook(lambda m, args, out, layer=layer: ran.append(layer))
    made.run(ids(1, 1), Confidence(0.0), made.empty_states())
    assert ran == [0]


@torch.no_grad()
def test_without_leaving_it_is_the_decoder() -> None:
    made = model()
    logits, exits = made.run(ids(), Confidence(1.1))
    assert torch.equal(logits, made.decoder(ids()))
    assert bool((exits == 3).all())
    assert torch.equal(made(ids())[:, -1], logits)
    tokens, _ = made.generate(ids(), 5, Confidence(1.1))
    assert torch.equal(tokens, made.decoder.generate(ids(), 5))


def test_all_exits_are_trained() -> None:
    made = model()
    made(ids()).square().mean().backward()
    assert all(p.grad is not None for p in made.parameters())


def test_what_is_refused() -> None:
    def attention(n: int) -> Attention:
        return Attention(8, 2, causal=True)

    with pytest.raises(ValueError, match="PreNorm"):
        EarlyExit(Decoder(9, 8, 2, attention, wiring=Sandwich()))
    with pytest.raises(ValueError, match="no keys and values"):
        EarlyExit(Decoder(9, 8, 2, lambda n: SelectiveSSM(8)))
