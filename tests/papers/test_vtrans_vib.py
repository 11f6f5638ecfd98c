import torch

from headwise.compress import steps_of
from headwise.models import Site, view
from headwise.models.backbones import Decoder
from headwise.papers.compress import vtrans_vib as paper
from headwise.parts import Attention, TokenShift
from headwise.parts.feed.mlp import Mlp

torch.set_num_threads(1)


def _fresh():
    torch.manual_seed(0)

    def mixer(layer):
        if not layer:
            return TokenShift(paper.WIDTH, causal=True)
        return Attention(paper.WIDTH, paper.HEADS, causal=True)

    return Decoder(
        32,
        paper.WIDTH,
        3,
        mixer,
        lambda n: Mlp(paper.WIDTH, paper.HIDDEN) if n else None,
        tied=False,
    ).eval()


def test_what_is_cut_out_is_gone_and_meets_the_budget():
    model = _fresh()

    def parameters(one):
        return sum(p.numel() for n, p in one.named_parameters() if "mixers" in n or "feeds" in n)

    small = paper.vtrans(model, paper.examples(0), 0.5, steps=3)
    assert 0.4 < parameters(small) / parameters(model) < 0.56
    assert {type(s).__name__ for s in steps_of(small)} == {"PruneHeads", "PruneChannels"}
    assert not steps_of(model)


def test_planted_units_compute_nothing():
    model = _fresh()
    paper._plant(model, 0, 0.0)
    given = paper.examples(0)["input_ids"]
    with torch.no_grad():
        before = model(given)
        paper._plant(model, 0, 1.0)
        torch.testing.assert_close(model(given), before)
    sizes = paper.magnitudes(model).scores
    for site, units in paper.planted(0).items():
        others = [n for n in range(len(sizes[site])) if n not in units]
        assert float(sizes[site][units].min()) > float(sizes[site][others].max())
    assert Site("heads", 1) in sizes
    assert len(view(model).layers) == 3
