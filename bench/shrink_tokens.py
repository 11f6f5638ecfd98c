"""What fewer tokens cost and save in vision encoders.

    python -m bench.shrink_tokens [--images 1000] [--threads 1] [--repeats 7] [--assets FOLDER]

Two encoders in one run: a ViT-small with random weights on 8 images of 196 patches, whose numbers
are time, FLOPs and how far the class token's output moves; and, where the folder of real weights
is, the MNIST ViT, whose numbers are accuracy and time. Times are processor seconds of medians,
sides interleaved, choosing and joining included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import measure
from headwise.compress import reduce_tokens
from headwise.compress.tokens.ranking import ClassAttention
from headwise.compress.tokens.reduction import Reduction

WAYS: dict[str, str | Reduction] = {
    "class, rest fused": "class",
    "class": ClassAttention(""),
    "received": "received",
    "similar": "similar",
    "flow": "flow",
    "random": "random",
}
KEEPS = (0.7, 0.5)
ASSETS = Path(__file__).resolve().parent.parent.parent / "shared" / "assets"
Side = Callable[[], AbstractContextManager[Any]]


def sides(model: Any) -> dict[tuple[str, str], Side]:
    """(way, keep) -> what is held while the model runs."""
    found: dict[tuple[str, str], Side] = {("all tokens", "1.0"): nullcontext}
    for keep in KEEPS:
        for name, how in WAYS.items():
            found[name, str(keep)] = partial(reduce_tokens, model, keep, how=how)
    return found


def cpu_seconds(
    held: dict[tuple[str, str], Side], work: Callable[[], Any], repeats: int
) -> dict[tuple[str, str], list[float]]:
    """Processor seconds of every side, interleaved, after one round to warm up."""
    times: dict[tuple[str, str], list[float]] = {side: [] for side in held}
    for turn in range(repeats + 1):
        for side, hold in held.items():
            with hold():
                start = time.process_time()
                work()
                if turn:
                    times[side].append(time.process_time() - start)
    return times


@torch.no_grad()
def random_vit(repeats: int) -> list[list[str]]:
    """ViT-small as it comes, with weights that are none."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    model = ViTModel(config, add_pooling_layer=False).eval()
    pixels = torch.randn(8, 3, 224, 224)

    def work() -> Tensor:
        found: Tensor = model(pixels).last_hidden_state[:, 0]
        return found

    whole, held = work(), sides(model)
    times = cpu_seconds(held, work, repeats)
    rows, dense, first = [], statistics.median(times["all tokens", "1.0"]), 0
    for side, hold in held.items():
        with hold(), FlopCounterMode(display=False) as counter:
            moved = float((work() - whole).norm() / whole.norm())
        flops = counter.get_total_flops()
        first = first or flops
        took = statistics.median(times[side])
        rows.append(
            [
                *side,
                f"{1e3 * took:.0f}",
                f"{dense / took:.2f}",
                f"{flops / 8e9:.2f}",
                f"{flops / first:.2f}",
                f"{moved:.3f}",
                measure.spread(times[side]),
            ]
        )
    return rows


@torch.no_grad()
def mnist_vit(assets: Path, images: int, repeats: int) -> list[list[str]]:
    """Six layers, 49 patches, trained; the first test images."""
    from tests.proof.mnist_vit import as_vit
    from tests.proof.weights import loader

    folder = assets / "vit_mnist"
    weights = torch.load(folder / "vit_mnist_gpu.pt", map_location="cpu", weights_only=True)
    model = as_vit(weights)
    pixels, labels = loader(folder / "vit_mnist.py").mnist_test()
    pixels, labels = pixels[:images], labels[:images]

    def work() -> Tensor:
        return torch.cat([model(part).logits for part in pixels.split(250)])

    held = sides(model)
    times = cpu_seconds(held, work, repeats)
    rows, dense = [], statistics.median(times["all tokens", "1.0"])
    for side, hold in held.items():
        with hold():
            right = float((work().argmax(-1) == labels).float().mean())
        took = statistics.median(times[side])
        rows.append(
            [
                *side,
                f"{100 * right:.1f} %",
                f"{1e3 * took:.0f}",
                f"{dense / took:.2f}",
                measure.spread(times[side]),
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(measure.where(), "\n")
    print("ViT-small, random weights, 8 images of 196 patches, kept at layers 3, 6 and 9\n")
    header = ["way", "keep", "CPU ms", "times as quick", "GFLOP / image", "of dense", "moved"]
    print(measure.table([*header, "spread"], random_vit(options.repeats)), "\n")
    if not options.assets.is_dir():
        print(f"the MNIST ViT is not at {options.assets}: left out")
        return
    print(f"MNIST ViT, {options.images} test images, kept at layers 1, 3 and 4\n")
    rows = mnist_vit(options.assets, options.images, options.repeats)
    print(measure.table(["way", "keep", "right", "CPU ms", "times as quick", "spread"], rows))


if __name__ == "__main__":
    main()
