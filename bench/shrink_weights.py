"""What fewer bits for weights and activations save, and what they cost, in one run.

    python -m bench.shrink_weights [--threads 1] [--repeats 15] [--only embedded|wide] [--json FILE]

Two models: the embedded one (192 wide, trained: with the rise of its loss on held-out text) and a
random one 768 wide. Each row is a copy of the model in another form; sides are interleaved, times
are medians, of processor time where one thread is used. Bytes are those of parameters and buffers
in the layers, counted on the tensors themselves.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import measure
from headwise.compress.bits.packed import pack_bits
from headwise.compress.bits.ternary import to_bit_linear
from headwise.compress.bits.thresholds import threshold_activations
from headwise.compress.bits.weights import quantise
from headwise.compress.structure.matrices import matrices_of
from headwise.instruments.metrics import metric_of
from headwise.models import view
from headwise.models.default import default_model_path, default_text

Make = Callable[[nn.Module, dict[str, Tensor]], nn.Module]


def _ours(bits: int, group: int | None, activations: str) -> Make:
    def make(model: nn.Module, given: dict[str, Tensor]) -> nn.Module:
        quantise(model, bits, group, activations)
        return model

    return make


def _bfloat16(model: nn.Module, given: dict[str, Tensor]) -> nn.Module:
    return model.bfloat16()


def _in_bfloat16(make: Make) -> Make:
    return lambda model, given: make(model.bfloat16(), given)


def _ternary(model: nn.Module, given: dict[str, Tensor]) -> nn.Module:
    to_bit_linear(model, levels=3)
    pack_bits(model)
    return model


def _skipping(sparsity: float) -> Make:
    def make(model: nn.Module, given: dict[str, Tensor]) -> nn.Module:
        threshold_activations(model, given, sparsity)
        return model

    return make


def _torchao(name: str, dtype: torch.dtype = torch.float32) -> Make:
    def make(model: nn.Module, given: dict[str, Tensor]) -> nn.Module:
        import torchao.quantization as ao

        wanted = {id(m) for m in matrices_of(view(model)).values()}
        model.to(dtype)
        ao.quantize_(model, getattr(ao, name)(), filter_fn=lambda m, _: id(m) in wanted)
        return model

    return make


FORMS: dict[str, Make] = {
    "float32": lambda model, given: model,
    "bfloat16": _bfloat16,
    "8 bits": _ours(8, None, "float"),
    "8 bits, bfloat16": _in_bfloat16(_ours(8, None, "float")),
    "8 bits, tokens in 8": _ours(8, None, "int8"),
    "4 bits by 64": _ours(4, 64, "float"),
    "4 bits a row, tokens in 8": _ours(4, None, "int8"),
    "2 bits a row, tokens in 8": _ours(2, None, "int8"),
    "ternary, tokens in 8 (untrained)": _ternary,
    "70 % of neurons skipped": _skipping(0.7),
    "90 % of neurons skipped": _skipping(0.9),
    "torchao Int8WeightOnly": _torchao("Int8WeightOnlyConfig"),
    "torchao Int8WeightOnly, bfloat16": _torchao("Int8WeightOnlyConfig", torch.bfloat16),
    "torchao Int8DynamicActivationInt8Weight": _torchao("Int8DynamicActivationInt8WeightConfig"),
}

HEADER = ("model", "form", "bytes in layers", "of float32", "ms a token", "ms 128 tokens", "loss")


def layer_bytes(model: nn.Module) -> int:
    """Of parameters and buffers in the layers; torchao's tensors are asked for their parts."""
    held: dict[int, int] = {}
    layers = model.get_submodule("model.layers")  # torchao's weights cannot be viewed by head
    for tensor in [*layers.parameters(), *layers.buffers()]:
        for part in _parts(tensor):
            held[id(part)] = part.nbytes
    return sum(held.values())


def _parts(tensor: Any) -> list[Tensor]:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [part for name in flatten()[0] for part in _parts(getattr(tensor, name))]


def embedded() -> tuple[nn.Module, Tensor]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(default_model_path())
    ids = torch.as_tensor(words(default_text(60_000)[0], return_tensors="pt")["input_ids"])[0]
    model: nn.Module = AutoModelForCausalLM.from_pretrained(default_model_path())
    return model.eval(), ids.unfold(0, 128, 128)[:64]


def wide() -> tuple[nn.Module, Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=12,
    )
    return LlamaForCausalLM(config).eval(), torch.randint(2048, (64, 128))


def loss(model: nn.Module, ids: Tensor) -> float:
    found = [
        metric_of("loss").score(model(input_ids=some).logits.float(), {"input_ids": some})
        for some in ids.split(16)
    ]
    return float(torch.cat(found).mean())


@torch.no_grad()
def rows(name: str, make: Callable[[], tuple[nn.Module, Tensor]], repeats: int) -> list[list[str]]:
    plain, ids = make()
    calibration, held_out = {"input_ids": ids[:16]}, ids[16:]
    sides: dict[str, nn.Module] = {}
    for form, change in FORMS.items():
        try:
            sides[form] = change(copy.deepcopy(plain), calibration)
        except ImportError as error:
            print(f"left out: {form} ({error})")
    times: dict[tuple[str, int], list[float]] = {}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for tokens in (1, 128):
        for repeat in range(repeats + 2):
            for form, model in sides.items():
                start = clock()
                model(input_ids=ids[:1, :tokens], use_cache=False)
                if repeat > 1:  # the first two warm up
                    times.setdefault((form, tokens), []).append(clock() - start)
    whole = layer_bytes(sides["float32"])
    base = loss(plain, held_out) if name == "embedded" else 0.0
    found = []
    for form, model in sides.items():
        held = layer_bytes(model)
        rise = f"{loss(model, held_out) - base:+.4f}" if name == "embedded" else ""
        one, many = (1e3 * measure.median(times[form, tokens]) for tokens in (1, 128))
        cells = [name, form, f"{held:,}", f"{held / whole:.3f}", f"{one:.2f}", f"{many:.1f}", rise]
        found.append(cells)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", choices=("embedded", "wide"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for talking in ("torchao", "torch.utils._pytree"):
        logging.getLogger(talking).setLevel(logging.ERROR)
    found = []
    for name, make in (("embedded", embedded), ("wide", wide)):
        if options.only in (None, name):
            found += rows(name, make, options.repeats)
    print(measure.where())
    print(measure.table(HEADER, found))
    if options.json:
        records = [dict(zip(HEADER, row, strict=True)) for row in found]
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
