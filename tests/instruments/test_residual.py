"""Layer columns against the hidden states that the model returns."""

import numpy as np
import torch

from headwise.instruments.residual import Residual
from tests.instruments import tiny


def test_residual_equals_hidden_states() -> None:
    model = tiny.llama(num_hidden_layers=3)
    ids = tiny.ids(50, batch=2)
    results, _ = tiny.measure(model, [Residual()], {"input_ids": ids})
    hidden = tiny.outputs(model, {"input_ids": ids}).hidden_states
    parts = {}
    for number, block in enumerate(model.model.layers):
        for name, module in (("attention", block.self_attn), ("mlp", block.mlp)):
            module.register_forward_hook(_keep(parts, (number, name)))
    with torch.no_grad():
        model(ids)
    for b, result in enumerate(results):
        for layer in range(3):
            before = hidden[layer][b]
            attention, mlp = parts[layer, "attention"][b], parts[layer, "mlp"][b]
            after = before + attention + mlp
            shares = attention.norm(dim=-1) / (attention.norm(dim=-1) + mlp.norm(dim=-1))
            wanted = {
                "residual_norm": after.norm(dim=-1).mean(),
                "residual_peak": after.abs().max(),
                "residual_peak_ratio": after.abs().max() / after.abs().flatten().median(),
                "update_share": ((after - before).norm(dim=-1) / before.norm(dim=-1)).mean(),
                "attention_share": shares.mean(),
            }
            for column, value in wanted.items():
                assert np.isclose(result.layers[column][layer], value, rtol=1e-4), column


def test_one_large_number_is_a_peak() -> None:
    model = tiny.llama()
    before = tiny.measure(model, [Residual()], tiny.ids(40))[0][0].layers
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 7] = 500.0
    after = tiny.measure(model, [Residual()], tiny.ids(40))[0][0].layers
    assert (after["residual_peak"] > 400).all()
    assert (after["residual_peak_ratio"] > 10 * before["residual_peak_ratio"]).all()


def _keep(parts: dict, key: tuple[int, str]):  # type: ignore[no-untyped-def]
    def hook(module: object, args: object, output: object) -> None:
        parts[key] = output[0] if isinstance(output, tuple) else output

    return hook
