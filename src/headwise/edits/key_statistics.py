"""What the neurons of a feed-forward layer usually are: C = E[k k^T] over the tokens of a text.

ROME and PMET measure with it how far an update reaches: directions that ordinary text uses are
left alone (Meng et al. 2022, arXiv 2202.05262, eq. 2 and appendix A).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from headwise.edits.at_rest import at_rest, device_of
from headwise.edits.fact_prompts import encode, require_tokenizer
from headwise.models import ModelView, view
from headwise.models.atomic import write_atomically
from headwise.models.identity import model_name, weights_hash
from headwise.models.sites import Site, Write, touching

Progress = Callable[[int, int, str], None]
SINGULAR = 1e-10
"""Smallest over largest pivot of C under which it is taken for singular."""
RIDGE = 1e-4
"""Of the mean second moment of a neuron: what is then added to the diagonal."""

_KEY = "headwise_key_statistics"


@dataclass(frozen=True, eq=False)
class KeyStatistics:
    """Uncentred second moments of neurons, by layer: `(hidden, hidden)`, float64.

    tokens: how many were averaged over. record: the model (name, class, weights hash) and the
    hash of the token ids, JSON-able.
    """

    moments: dict[int, Tensor]
    tokens: int
    record: dict[str, Any] = field(default_factory=dict)

    def moment(self, layer: int) -> Tensor:
        """C of one layer. Raises ValueError for a layer that was not collected."""
        if layer not in self.moments:
            raise ValueError(
                f"no statistics of layer {layer}, only of {sorted(self.moments)}; collect them "
                "with collect_key_statistics(model, text, layers)"
            )
        return self.moments[layer]

    def ridge(self, layer: int) -> float:
        """What has to be added to C's diagonal before it can be inverted: 0 where nothing."""
        moment = self.moment(layer)
        factor, info = torch.linalg.cholesky_ex(moment)
        pivots = factor.diagonal().square()
        if int(info) == 0 and float(pivots.min()) > SINGULAR * float(pivots.max()):
            return 0.0
        return RIDGE * float(moment.diagonal().mean())

    def solve(self, layer: int, keys: Tensor, ridge: float | None = None) -> Tensor:
        """`(C + ridge I)^-1 keys` for keys `(hidden,)` or `(hidden, n)`, in float64."""
        moment = self.moment(layer)
        used = self.ridge(layer) if ridge is None else ridge
        whole = moment + used * torch.eye(len(moment), dtype=moment.dtype)
        given = keys.detach().cpu().double()
        found: Tensor = torch.linalg.solve(whole, given)
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """As safetensors, whole or not at all. C is symmetric and is kept in float32."""
        tensors = {str(layer): moment.float() for layer, moment in self.moments.items()}
        told = json.dumps({"tokens": self.tokens, "record": self.record}, sort_keys=True)
        write_atomically(Path(path), safetensors.torch.save(tensors, {_KEY: told}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Raises FileNotFoundError, and ValueError for files of another kind."""
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no file of key statistics {file}")
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                told = json.loads((opened.metadata() or {}).get(_KEY, "null"))
                moments = {int(n): opened.get_tensor(n).double() for n in opened.keys()} if told \
                    else {}  # noqa: SIM118  # fmt: skip
        except (safetensors.SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} holds no key statistics: {error}") from error
        if not told:
            raise ValueError(f"{file} holds no key statistics: its header has no {_KEY}")
        return cls(moments, told["tokens"], told["record"])

    def check(self, model: nn.Module) -> None:
        """Raises ValueError for statistics of a model with another name or class."""
        made = self.record.get("model", {})
        have = {"name": model_name(model), "class": type(model).__name__}
        if made and any(made[key] != have[key] for key in have):
            raise ValueError(
                f"these key statistics are of {made['name']} ({made['class']}), the model is "
                f"{have['name']} ({have['class']}); collect them on this model"
            )


class _EnoughError(Exception):
    """Ends a forward pass behind the last layer that is wanted."""


@torch.no_grad()
def collect_key_statistics(
    model: nn.Module | ModelView,
    texts: str | Tensor | Sequence[str] | Iterable[Tensor],
    layers: int | Sequence[int],
    tokenizer: Any | None = None,
    *,
    window: int = 256,
    most: int | None = None,
    progress: Progress | None = None,
) -> KeyStatistics:
    """Collect C of some layers over texts (or token ids `(n,)`, `(batch, n)`), window by window.

    window: tokens that are read together. most: at most so many tokens in all. The model runs up
    to the last of the layers only. Several times as many tokens as a layer has neurons give a C
    that can be inverted. Raises ValueError for layers without a feed-forward part and for texts
    without tokens.
    """
    look = model if isinstance(model, ModelView) else view(model)
    wanted = [layers] if isinstance(layers, int) else sorted(set(layers))
    windows = list(_windows(texts, tokenizer, window, most))
    if not windows:
        raise ValueError("no tokens to collect statistics on")
    sums: dict[int, Tensor] = {}
    total = sum(one.numel() for one in windows)
    digest, done = hashlib.sha256(), 0

    def adding(layer: int) -> Write:
        def add(neurons: Tensor) -> None:
            flat = neurons.flatten(0, -2).float()
            product = (flat.T @ flat).cpu().double()
            sums[layer] = sums[layer] + product if layer in sums else product
            if layer == wanted[-1]:
                raise _EnoughError

        return add

    writes = {Site("neurons", layer): adding(layer) for layer in wanted}
    with at_rest(look.model), touching(look, writes):
        for ids in windows:
            with suppress(_EnoughError):
                look.model(input_ids=ids.to(device_of(look.model)))
            digest.update(ids.contiguous().numpy().tobytes())
            done += ids.numel()
            if progress is not None:
                progress(done, total, "statistics of keys")
    known = {
        "name": model_name(look.model),
        "class": type(look.model).__name__,
        "weights": weights_hash(look.model),
    }
    record = {"model": known, "tokens_sha256": digest.hexdigest(), "window": window}
    return KeyStatistics({k: s / total for k, s in sums.items()}, total, record)


def _windows(texts: Any, tokenizer: Any | None, window: int, most: int | None) -> Iterable[Tensor]:
    """Token ids `(rows, n)`, at most `most` in all."""
    given = [texts] if isinstance(texts, str | Tensor) else list(texts)
    left = most if most is not None else 1 << 62
    for one in given:
        if isinstance(one, str):
            require_tokenizer(tokenizer)
            ids = torch.tensor(encode(tokenizer, one), dtype=torch.long)
        else:
            ids = torch.as_tensor(one).detach().cpu().long()
        lines = [ids] if ids.dim() == 2 else list(ids.split(window))
        for line in lines:
            rows = line if line.dim() == 2 else line[None]
            if rows.numel() > left:
                rows = rows[:, :left] if len(rows) == 1 else rows[: left // rows.shape[1]]
            if rows.numel():
                left -= rows.numel()
                yield rows
