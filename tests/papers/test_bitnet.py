"""What the claims of BitNet do not say."""

import torch

from headwise.compress.bits.packed import PackedBitLinear, pack_bits
from headwise.compress.bits.ternary import BitLinear
from headwise.papers.compress.bitnet import TASK, bitnet, recaller, three_values


def test_embeddings_and_output_keep_their_precision() -> None:
    model = bitnet(recaller(0))
    names = [name for name, m in model.named_modules() if isinstance(m, BitLinear)]
    assert len(names) == 14
    assert not any("embed" in name or name.startswith("head") for name in names)


def test_packed_models_answer_as_before() -> None:
    tokens = TASK.batch(0, 4).inputs
    for make in (lambda seed: bitnet(recaller(seed)), three_values):
        model = make(0).eval()
        with torch.no_grad():
            want = model(**tokens)
            pack_bits(model)
            got = model(**tokens)
        assert any(isinstance(m, PackedBitLinear) for m in model.modules())
        # the last digit of a layer may tip a token's rounding in the next one
        assert float((got - want).norm() / want.norm()) < 0.01
