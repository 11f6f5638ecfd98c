"""ROME's file: what its claims do not say."""

import torch

from headwise.edits import LowRank
from headwise.models.backbones import Decoder
from headwise.papers.steer.rome import at_another_key, insert, insert_plainly, rome
from headwise.parts import Attention, Mlp


def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(
        50, 32, 2, mixer=lambda layer: Attention(32, 4, causal=True), feed=lambda layer: Mlp(32)
    ).eval()


def test_both_insertions_answer_the_key_with_rank_one() -> None:
    key, missing = torch.randn(6).double(), torch.randn(4).double()
    mixed = torch.randn(6, 20).double()
    for change in (insert, insert_plainly):
        found = change(key, missing, mixed @ mixed.T)
        torch.testing.assert_close(found @ key, missing)
        assert torch.linalg.matrix_rank(found) == 1


def test_the_control_has_the_same_size_in_the_same_matrix() -> None:
    one, text = model(), torch.randint(50, (20, 30))
    options = {"statistics": text, "layers": 1}
    real = rome(one, [4, 17, 9], 1, 33, **options)
    moved = at_another_key(one, [4, 17, 9], 1, 33, **options)
    (name,) = real.deltas
    assert list(moved.deltas) == [name]
    a, b = real.deltas[name], moved.deltas[name]
    assert isinstance(a, LowRank)
    assert isinstance(b, LowRank)
    torch.testing.assert_close((a.left @ a.right).norm(), (b.left @ b.right).norm())
    cosine = torch.cosine_similarity(a.right, b.right)
    assert float(cosine.abs()) < 0.6
