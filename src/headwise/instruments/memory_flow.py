"""One prediction as a sum: which head wrote what from where, and what it adds to a logit.

A head's output is sum_j A_ij m_j with memory values m_j = W_O v_j (Katz and Belinkov 2023, arXiv
2305.13417), and the residual stream before the final norm is the sum of everything that was added
to it. With the norm's size held fixed the logit of a token is linear in that sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headwise.instruments.examples import model_view
from headwise.instruments.folded import attention_at
from headwise.instruments.gains import find_gain
from headwise.instruments.head_vocabulary import token_logits
from headwise.instruments.readout import output_stack
from headwise.instruments.run import evaluating
from headwise.models import (
    ModelView,
    Site,
    UnsupportedModelError,
    observe,
    recording,
    sites_of,
)

__all__ = ["Flow", "flow"]


@dataclass(frozen=True, eq=False)
class Flow:
    """One prediction taken apart. `target`: the token asked about; `logit`: its logit.

    `memory`: layer -> `(heads, n, width)`, A_ij m_j for the position looked at; `parts`: name ->
    `(width,)`, everything else that was added to the residual (embedding, biases, feed-forward).
    `size`: what the final norm divided by; `constant`: what its bias adds to the logit.
    """

    view: ModelView
    target: int
    logit: float
    memory: dict[int, Tensor]
    parts: dict[str, Tensor]
    size: float
    constant: float

    def contribution(self, vectors: Tensor) -> Tensor:
        """What vectors `(..., width)` of the residual add to the target's logit, `(...)`."""
        return token_logits(self.view, vectors)[..., self.target] / self.size

    def contributions(self) -> dict[str, float]:
        """Name -> logits, for parts and heads; with `constant` they sum to `logit`."""
        found = {name: float(self.contribution(part)) for name, part in self.parts.items()}
        for layer, memory in self.memory.items():
            each = self.contribution(memory.sum(1))
            found |= {f"L{layer}H{h}": float(x) for h, x in enumerate(each)}
        return found

    def strongest(self, layer: int, head: int) -> tuple[int, Tensor]:
        """The place of the head's largest memory value, weight included, and its logits
        `(vocabulary,)`."""
        place = int(self.memory[layer][head].norm(dim=-1).argmax())
        return place, token_logits(self.view, self.memory[layer][head, place])


def flow(
    model: nn.Module | ModelView, input_ids: Tensor, at: int = -1, target: int | None = None
) -> Flow:
    """Take the prediction at position `at` of input_ids `(1, n)` apart; the target is the likeliest
    token by default.

    Raises UnsupportedModelError where attention and feed-forward layers are not simply added to the
    residual, or the answer is not read from it linearly.
    """
    view = model_view(model)
    stack = output_stack(view)
    found = [a for a in view.attentions if a.stack == stack]
    residual, mlps = sites_of(view, "residual"), sites_of(view, "mlp")
    values = [Site("values", a.layer) for a in found]
    added = [Site("attention", a.layer) for a in found]
    maps: list[Tensor] = []
    with (
        torch.no_grad(),
        evaluating(view.model),
        recording(view, [residual[0], residual[-1], *mlps, *values, *added]) as kept,
        observe(view, lambda reading: maps.append(reading.map.dense()[0])),
    ):
        output = view.model(input_ids)
    logits = getattr(output, "logits", output)[0, at].double()
    here = {site: kept[site][0, at].double() for site in (residual[0], *mlps, *added)}
    memory, parts = {}, {"embedding": here[residual[0]]}
    for attention, site, out, weights in zip(found, values, added, maps, strict=True):
        value = (
            kept[site][0].double().repeat_interleave(attention.heads // attention.kv_heads, 1)
        )  # (n, heads, d)
        weight = attention_at(view, attention.layer, stack).output_weight().detach().double()
        made = torch.einsum("hj,jhd,hwd->hjw", weights[:, at].double(), value, weight)
        memory[attention.layer] = made
        parts[f"attention {attention.layer} bias"] = here[out] - made.sum((0, 1))
    parts |= {f"mlp {site.layer}": here[site] for site in mlps}
    last = kept[residual[-1]][0, at].double()
    whole = torch.stack([*parts.values(), *(m.sum((0, 1)) for m in memory.values())]).sum(0)
    if (whole - last).norm() > 1e-3 * last.norm():
        raise UnsupportedModelError(
            f"{type(view.model).__name__} does not simply add what its layers make to the residual"
        )
    return _finished(view, logits, memory, parts, last, target)


def _finished(
    view: ModelView,
    logits: Tensor,
    memory: dict[int, Tensor],
    parts: dict[str, Tensor],
    last: Tensor,
    target: int | None,
) -> Flow:
    chosen = int(logits.argmax()) if target is None else target
    size, constant = 1.0, 0.0
    final = find_gain(view.final_norm, view.width)
    if isinstance(final, str):
        raise UnsupportedModelError(final)
    if view.final_norm is not None:
        with torch.no_grad():
            normed = view.final_norm(last.to(next(view.model.parameters()))[None])[0].double()
        bias = torch.zeros_like(last) if final.bias is None else final.bias.to(last)
        linear = final.after_output(last[:, None])[:, 0]
        size = float(linear.pow(2).sum() / (linear * (normed - bias)).sum())
        assert view.unembedding is not None
        constant = float(view.unembedding[chosen].detach().double() @ bias)
    return Flow(view, chosen, float(logits[chosen]), memory, parts, size, constant)
