"""Value drain and residual share against what the layers themselves compute."""

import numpy as np
import torch

from headwise.instruments.values import Values
from tests.instruments import tiny

N = 120


def test_values_equal_brute_force() -> None:
    model = tiny.gpt2()
    tiny.add_sink(model, 5)
    ids = tiny.ids(N)
    (result,), _ = tiny.measure(model, [Values()], ids)
    out = tiny.outputs(model, {"input_ids": ids})
    seen_by = torch.arange(N, 0, -1)
    found = 0
    for layer, block in enumerate(model.transformer.h):
        hidden = out.hidden_states[layer][0]
        with torch.no_grad():
            values = block.attn.c_attn(block.ln_1(hidden))[:, 64:].view(N, 4, 8).transpose(0, 1)
        weight = block.attn.c_proj.weight.detach()
        for head in range(4):
            at, p, v = layer * 4 + head, out.attentions[layer][0, head], values[head]
            written = (p @ v) @ weight[head * 8 : head * 8 + 8]
            share = (written.norm(dim=-1) / hidden.norm(dim=-1)).mean()
            assert np.isclose(result.heads["residual_share"][at], share, rtol=1e-4)
            sinks = (p.sum(0) / seen_by > 0.3) & (seen_by >= N // 4)
            drain = v[sinks].norm(dim=-1).mean() / v[~sinks].norm(dim=-1).mean()
            mine = result.heads["value_drain"][at]
            assert np.isclose(mine, drain, rtol=1e-4, equal_nan=True), at
            found += int(sinks[5])
    assert found >= 4


def test_every_attention_of_an_encoder_decoder_has_a_share() -> None:
    (result,), _ = tiny.measure(tiny.bart(), [Values()], tiny.ids(20))
    assert (result.heads["residual_share"] > 0).all()
    assert len(result.heads["residual_share"]) == 24
