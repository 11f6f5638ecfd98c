"""A GPT-2 whose heads are built by hand, so that it is known what each of them does.

    layer 0: previous token, sink, uniform, itself     layer 1: induction, sink, uniform, previous

The residual stream has three parts: a code of the token, one of the position, and room where the
previous-token head writes the code of the token before. Codes have mean zero and equal norm, so a
LayerNorm only divides by a number that is known: its weight undoes that.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

CODE = 32
WIDTH = 4 * CODE
HEADS = 4
STRENGTH = 60.0
KINDS = (
    *("previous-token", "sink", "broad", "positional"),
    *("induction", "sink", "broad", "previous-token"),
)
TOKEN, POSITION, BEFORE = slice(0, CODE), slice(CODE, 3 * CODE), slice(3 * CODE, WIDTH)


def token_codes(vocabulary: int) -> Tensor:
    """Balanced signs `(vocabulary, CODE)`: equal to itself CODE, to others much less."""
    random = torch.Generator().manual_seed(0)
    half = torch.cat([torch.ones(CODE // 2), -torch.ones(CODE // 2)])
    return torch.stack([half[torch.randperm(CODE, generator=random)] for _ in range(vocabulary)])


def position_codes(positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(positions, CODE)` at random frequencies, which are one when positions
    agree; and the frequencies."""
    random = torch.Generator().manual_seed(3)
    frequency = torch.rand(CODE // 2, generator=random) * math.pi
    angle = torch.arange(positions)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], 1), frequency


def turn_back(frequency: Tensor) -> Tensor:
    """The matrix that turns the code of position i into that of i - 1: row vectors from left."""
    c, s = torch.diag(frequency.cos()), torch.diag(frequency.sin())
    # cos(a - w) = cos a cos w + sin a sin w; sin(a - w) = sin a cos w - cos a sin w
    return torch.cat([torch.cat([c, -s], 1), torch.cat([s, c], 1)])


def model(vocabulary: int = 90, positions: int = 200) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=WIDTH,
        n_layer=2,
        n_head=HEADS,
        n_positions=positions,
        bos_token_id=None,
        eos_token_id=None,
    )
    built = GPT2LMHeadModel(config).eval()
    code, frequency = position_codes(positions)
    body: Any = built.transformer
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "ln" not in name:
                parameter.zero_()
        body.wte.weight[:, TOKEN] = token_codes(vocabulary)
        body.wpe.weight[:, POSITION] = torch.cat([code, -code], 1)
        for layer, parts in enumerate((2, 3)):  # of CODE times mean square one
            variance = parts * CODE / WIDTH if layer else (CODE + CODE) / WIDTH
            body.h[layer].ln_1.weight.fill_(math.sqrt(variance + 1e-5))
        first, second = body.h[0].attn, body.h[1].attn
        here = slice(CODE, 2 * CODE)  # the first copy of the position code
        both = 2 / CODE  # |code|^2 is CODE / 2
        _asks(first, 0, here, here, turn_back(frequency) * both)
        _writes(first, 0, TOKEN, BEFORE)
        _asks_always(first, 1, here, code[0] * both)
        _asks(first, 3, here, here, torch.eye(CODE) * both)
        _asks(second, 0, TOKEN, BEFORE, torch.eye(CODE) / CODE)
        _asks_always(second, 1, here, code[0] * both)
        _asks(second, 3, here, here, turn_back(frequency) * both)
    return built


def _columns(head: int, part: int) -> slice:
    """Where the fused projection keeps a head's queries (0), keys (1) and values (2)."""
    return slice(part * WIDTH + head * CODE, part * WIDTH + (head + 1) * CODE)


def _asks(attention: Any, head: int, source: slice, target: slice, matrix: Tensor) -> None:
    """Logits STRENGTH * source_i matrix target_j."""
    scale = STRENGTH * math.sqrt(CODE)
    attention.c_attn.weight[source, _columns(head, 0)] = matrix * scale
    attention.c_attn.weight[target, _columns(head, 1)] = torch.eye(CODE)


def _asks_always(attention: Any, head: int, target: slice, wanted: Tensor) -> None:
    """Logits STRENGTH * wanted target_j, whatever the query is."""
    attention.c_attn.bias[_columns(head, 0)] = wanted * STRENGTH * math.sqrt(CODE)
    attention.c_attn.weight[target, _columns(head, 1)] = torch.eye(CODE)


def _writes(attention: Any, head: int, source: slice, target: slice) -> None:
    """Adds what stands in source at the keys to target."""
    attention.c_attn.weight[source, _columns(head, 2)] = torch.eye(CODE)
    attention.c_proj.weight[head * CODE : (head + 1) * CODE, target] = torch.eye(CODE)
