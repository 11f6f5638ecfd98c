"""Which feed-forward layer a fact is read from: causal tracing at the subject's last token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headwise.edits.at_rest import at_rest, device_of
from headwise.edits.fact_prompts import Wording, rows_of
from headwise.models import ModelView
from headwise.models.errors import UnsupportedModelError
from headwise.models.prefix import logits_of
from headwise.models.sites import Site, Write, recording, sites_of, touching

Progress = Callable[[int, int, str], None]


@torch.no_grad()
def trace_layers(
    view: ModelView,
    wording: Wording,
    *,
    window: int | None = None,
    noise: float = 3.0,
    draws: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """How much of the model's own answer each feed-forward layer brings back, `(layers,)`.

    The subject's tokens get Gaussian noise, `noise` times the deviation of the embeddings. Then
    the outputs of the feed-forward layers in a window around each layer are put back to what they
    were without noise, at the subject's last token only; measured is the probability of the answer
    that the model gave without noise, less that with noise, mean over `draws` (Meng et al. 2022,
    arXiv 2202.05262, section 2.1 and appendix B, there with windows of 10 of 48 layers). NaN where
    a layer has no feed-forward part.

    window: layers put back together, by default a fifth of them, and at least one.
    """
    sites = {site.layer: site for site in sites_of(view, "mlp")}
    if not sites:
        raise UnsupportedModelError("this model has no feed-forward layers to write a fact into")
    embedding = view.embedding
    if embedding is None:
        raise UnsupportedModelError("this model has no table of token embeddings to take noise of")
    rows = rows_of([wording])
    device, count = device_of(view.model), len(view.layers)
    ids = rows.inputs.to(device)
    at, end = int(rows.subjects[0]), int(rows.ends[0])
    generator = torch.Generator().manual_seed(seed)
    shape = draws, wording.stop - wording.start, view.width
    drawn = noise * float(embedding.float().std()) * torch.randn(shape, generator=generator)

    def disturb(residual: Tensor) -> Tensor:
        moved = residual.clone()
        part = drawn.to(residual.device, residual.dtype)
        moved[:, wording.start : wording.stop] += part
        return moved

    with at_rest(view.model):
        with recording(view, sites.values()) as clean:
            logits = logits_of(view.model(input_ids=ids))[0, end]
        answer = int(logits.argmax())
        known = dict(clean)
        many = ids.expand(draws, -1)

        def probability(layers: list[int]) -> float:
            def back(site: Site) -> Write:
                def put(output: Tensor) -> Tensor:
                    moved = output.clone()
                    moved[:, at] = known[site][0, at]
                    return moved

                return put

            first = Site("residual", view.layers[0].index)
            writes: dict[Site, Write] = {first: disturb}
            writes |= {sites[layer]: back(sites[layer]) for layer in layers}
            with touching(view, writes):
                out = logits_of(view.model(input_ids=many))[:, end]
            return float(out.float().softmax(-1)[:, answer].mean())

        wide = window if window is not None else max(1, count // 5)
        worst = probability([])
        effects = torch.full((count,), float("nan"))
        for layer in sorted(sites):
            low = layer - wide // 2
            near = [n for n in range(low, low + wide) if n in sites]
            effects[layer] = probability(near) - worst
            if progress is not None:
                progress(layer + 1, count, "causal tracing")
    return effects


def best_layer(effects: Tensor) -> int:
    """The layer of the largest effect; the earliest of equals."""
    return int(effects.nan_to_num(-float("inf")).argmax())
