"""What the claims of S2FT do not say."""

import pytest
import torch

from headwise.compress.structure.split_columns import Split
from headwise.models import view
from headwise.papers.compress.s2ft import permute_heads, recaller, s2ft
from tests.instruments import tiny


def test_only_blocks_are_trained() -> None:
    model = recaller(0)
    splits = s2ft(model, 0.25)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(split.trained) for split in splits}
    assert [tuple(split.trained.shape) for split in splits] == [
        (64, 32),
        (64, 16),
        (64, 32),
        (64, 16),
        (64, 32),
    ]


def test_answers_stay_the_same() -> None:
    model = recaller(1)
    tokens = torch.randint(32, (2, 20))
    with torch.no_grad():
        want = model(tokens)
        splits = s2ft(model, 0.5, seed=3)
        torch.testing.assert_close(model(tokens), want, atol=1e-5, rtol=1e-4)
        adapter = torch.randn_like(splits[0].trained)
        splits[0].put(adapter)
        torch.testing.assert_close(splits[0].adapter(), adapter)
        splits[0].put(None)
        torch.testing.assert_close(model(tokens), want, atol=1e-5, rtol=1e-4)
    assert sum(isinstance(m, Split) for m in model.modules()) == len(splits)


def test_grouped_heads_are_refused() -> None:
    layer = view(tiny.llama()).layers[0]
    with pytest.raises(ValueError, match="share"):
        permute_heads(layer, [1, 0, 2, 3])
