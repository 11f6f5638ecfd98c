"""Retaining heads: small modules that learn on a frozen model which entries will be asked for."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.instruments.examples import model_view
from headwise.instruments.run import evaluating
from headwise.models import ModelView, observe
from headwise.models.reading import AttentionReading

Asked = tuple[dict[str, Tensor], Tensor]
"""Inputs of a model and, `(batch, n)` boolean, the queries at which answers are given."""


class RetainingHeads(nn.Module):
    """s = silu([q, k, v] W_1) W_2 of one token: one number for each of a layer's key-value heads,
    from the queries, keys and values of all its heads.

    `forward(queries (R, g, m, d), keys (R, m, d), values (R, m, d_v), heads (R,)) -> (R, m)`, R =
    batch * kv_heads, the heads of a sequence side by side, as `Learned` calls it. Raises
    ValueError where heads are missing: a cache whose heads have budgets of their own hands its
    rows over in several pieces.

    Source: Huang et al., "Locret", arXiv 2410.01805, section 3.1, equation 1; width 1,024 there.
    """

    def __init__(
        self, kv_heads: int, group: int, head_dim: int, value_dim: int, width: int = 1024
    ) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        wide = kv_heads * (group * head_dim + head_dim + value_dim)
        self.inner = nn.Linear(wide, width, bias=False)
        self.outer = nn.Linear(width, kv_heads, bias=False)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, heads: Tensor) -> Tensor:
        every = torch.arange(self.kv_heads, device=heads.device)
        if not torch.equal(heads, every.repeat(max(1, len(heads) // self.kv_heads))):
            raise ValueError(
                f"retaining heads look at all {self.kv_heads} key-value heads of a layer "
                f"together, and were given the rows of {heads.tolist()}: use one budget for all "
                "heads of a layer"
            )
        whole = [queries.transpose(1, 2).flatten(2), keys, values]
        told = [x.unflatten(0, (-1, self.kv_heads)).transpose(1, 2).flatten(2) for x in whole]
        score: Tensor = self.outer(F.silu(self.inner(torch.cat(told, -1).to(self.inner.weight))))
        return score.transpose(1, 2).flatten(0, 1)


def importance(reading: AttentionReading, asked: Tensor) -> tuple[Tensor, Tensor]:
    """What is learned: `(batch, kv_heads, n)` the largest score scale * q . k that an asked query
    at or after token k gives it, over the heads of the group, and `(batch, n)` where there is one.

    `asked`: `(batch, n)` boolean. Source: Locret, section 3.2 (there the queries of the answer,
    and the tokens of the prompt before it).
    """
    queries, keys = reading.query.float(), reading.key.float()
    heads = queries.shape[1]
    # whoever is asked in any of the sequences
    at = asked.any(0).nonzero()[:, 0]
    some = queries[:, :, at].unflatten(1, (keys.shape[1], -1)).flatten(2, 3)  # (batch, kv, g*a, d)
    score = reading.map.scores.scale * some @ keys.transpose(-1, -2)
    places = torch.arange(keys.shape[2], device=at.device)
    later = asked[:, at, None] & (places <= at[:, None])  # (batch, a, n)
    if reading.padding is not None:
        later = later & reading.padding[:, None]
    allowed = later[:, None, None].expand(-1, -1, heads // keys.shape[1], -1, -1).flatten(2, 3)
    best = score.masked_fill(~allowed, float("-inf")).amax(2)
    there = later.any(1)
    return best.masked_fill(~there[:, None], 0.0), there


def train_retaining_heads(
    model: nn.Module | ModelView,
    examples: Iterable[Asked],
    width: int = 1024,
    rate: float = 5e-4,
    smooth: float = 2.5e-3,
    clip: float = 0.5,
    seed: int = 0,
) -> tuple[list[RetainingHeads], list[float]]:
    """Modules for `Learned`, one for each layer, and the loss of every step; one step for each
    of `examples`, which is as long as the training is to be.

    The model is only read, its weights stay as they are and get no gradients. Loss: smooth L1
    between score and `importance`, plus `smooth` times the squared difference of neighbouring
    tokens' scores, mean over tokens and heads, sum over layers; AdamW with `rate`, warmed up over
    two thirds of the steps and falling after that; gradients clipped by value.

    Raises ValueError without examples, or where nothing is asked. Source: Locret, section 3.2 and
    appendix, with the settings of the authors' program.
    """
    look = model_view(model)
    steps = list(examples)
    if not steps or not all(bool(asked.any()) for _, asked in steps):
        raise ValueError("give examples, each with the queries at which something is asked")
    made: dict[int, RetainingHeads] = {}
    losses: list[float] = []
    optimizer: torch.optim.Optimizer | None = None
    for number, (inputs, asked) in enumerate(steps):
        seen = _seen(look, inputs, asked)
        if optimizer is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                for layer, ((queries, _, values), want, _) in seen.items():
                    made[layer] = RetainingHeads(
                        want.shape[1], queries.shape[1], queries.shape[3], values.shape[2], width
                    ).to(want.device)
            weights = [p for heads in made.values() for p in heads.parameters()]
            optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95))
        with torch.enable_grad():
            loss = torch.stack(
                [_loss(made[layer], *told, smooth) for layer, told in seen.items()]
            ).sum()
            optimizer.zero_grad()
            loss.backward()
        nn.utils.clip_grad_value_(weights, clip)
        optimizer.param_groups[0]["lr"] = rate * _share(number, len(steps))
        optimizer.step()
        losses.append(float(loss.detach()))
    return [made[layer].eval() for layer in sorted(made)], losses


Tokens = tuple[Tensor, Tensor, Tensor]


def _seen(
    look: ModelView, inputs: dict[str, Tensor], asked: Tensor
) -> dict[int, tuple[Tokens, Tensor, Tensor]]:
    """Layer -> ((queries, keys, values) as `RetainingHeads` takes them, importance, where)."""
    found: dict[int, tuple[Tokens, Tensor, Tensor]] = {}

    def read(r: AttentionReading) -> None:
        group = r.query.shape[1] // r.key.shape[1]
        tokens = (
            r.query.unflatten(1, (-1, group)).flatten(0, 1).clone(),
            r.key.flatten(0, 1).clone(),
            r.value.flatten(0, 1).clone(),
        )
        found[r.attention.layer] = (tokens, *importance(r, asked))

    with torch.no_grad(), evaluating(look.model), observe(look, read):
        look.model(**inputs)
    return found


def _loss(
    heads: RetainingHeads, tokens: Tokens, want: Tensor, there: Tensor, smooth: float
) -> Tensor:
    """Of one layer."""
    batch, kv_heads = want.shape[:2]
    number = torch.arange(kv_heads, device=want.device).repeat(batch)
    told = heads(*tokens, number).unflatten(0, (batch, kv_heads)).float()
    near = F.smooth_l1_loss(told, want, reduction="none")
    both = there[:, 1:] & there[:, :-1]
    steps = (told[..., 1:] - told[..., :-1]).square()
    mean = (near * there[:, None]).sum() / there.sum() / kv_heads
    return mean + smooth * (steps * both[:, None]).sum() / both.sum().clamp_min(1) / kv_heads


def _share(step: int, steps: int) -> float:
    """Of the highest rate: up over two thirds of the steps, and down again."""
    done, top = (step + 1) / steps, 2 / 3
    return min(done / top, 1.0) if done <= top else (1 - done) / (1 - top) + 1 / steps
