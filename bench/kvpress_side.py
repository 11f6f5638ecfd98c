"""kvpress' side of `bench.shrink_peers`; run by the interpreter of an environment that has it.

    python -m bench.kvpress_side FOLDER EXCHANGE POLICY SHARE DECODE REPEATS THREADS CLOCK

FOLDER: a model of transformers; EXCHANGE: a folder with `ids.pt`, into which `kept-POLICY.pt` is
written: for each layer a list of the kept positions of each key-value head. The last line
printed is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import cache_side


def press_of(policy: str, share: float) -> Any:
    """None for `full`."""
    import kvpress

    gone = 1 - share
    made = {
        "full": lambda: None,
        "key norm": lambda: kvpress.KnormPress(gone),
        "window": lambda: kvpress.StreamingLLMPress(gone, n_sink=4),
        "observation": lambda: kvpress.SnapKVPress(gone, window_size=64, kernel_size=5),
        "observation, per head": lambda: kvpress.AdaKVPress(
            kvpress.SnapKVPress(gone, window_size=64, kernel_size=5)
        ),
        "key norm, per head": lambda: kvpress.AdaKVPress(kvpress.KnormPress(gone)),
    }
    return made[policy]()


def held(cache: Any) -> int:
    """Bytes of every storage of the cache, each once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    }
    return sum(storages.values())


def kept(model: Any, cache: Any, ids: Tensor) -> list[list[list[int]]]:
    """By the keys themselves: a prefill without a press has all of them, to the bit."""
    from transformers import DynamicCache

    attentions = [layer.self_attn for layer in model.model.layers]
    masks = [getattr(attention, "masked_key_indices", None) for attention in attentions]
    whole: Any = DynamicCache()
    model(ids, past_key_values=whole)  # it also forgets what was masked
    found = []
    for layer, every, masked in zip(cache.layers, whole.layers, masks, strict=True):
        heads = []
        for head in range(layer.keys.shape[1]):
            places = {key.numpy().tobytes(): at for at, key in enumerate(every.keys[0, head])}
            here = {places[key.numpy().tobytes()] for key in layer.keys[0, head].contiguous()}
            if masked is not None:
                _, of, at = masked
                here -= set(at[of == head].tolist())
            heads.append(sorted(here))
        found.append(heads)
    return found


@torch.no_grad()
def main() -> None:
    folder, exchange, policy, share, decode, repeats, threads, clock = sys.argv[1:]
    torch.set_num_threads(int(threads))
    import kvpress  # noqa: F401  (it wraps the attention functions when it is imported)
    import transformers
    from transformers import DynamicCache

    model = cache_side.load(folder)
    ids = torch.load(Path(exchange) / "ids.pt")
    press = press_of(policy, float(share))

    def prefill(some: Tensor) -> tuple[Any, Tensor]:
        cache = DynamicCache()
        if press is None:
            return cache, model(some, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        with press(model):
            return cache, model(some, past_key_values=cache, logits_to_keep=1).logits[:, -1]

    found, cache = cache_side.run(
        model, ids, int(decode), int(repeats), prefill, held, cache_side.clock_of(clock)
    )
    if policy != "full":
        torch.save(kept(model, cache, ids), Path(exchange) / f"kept-{policy}.pt")
    print(json.dumps({**found, "transformers": transformers.__version__}))


if __name__ == "__main__":
    main()
