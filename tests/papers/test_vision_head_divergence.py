"""VHD and VHR against loops, and what alpha = 1 must not do."""

import torch

from headwise.models import Site, touching, view
from headwise.models.backbones import Decoder
from headwise.papers.steer import vision_head_divergence as paper
from headwise.parts import Attention


def small(layers: int = 2) -> Decoder:
    torch.manual_seed(0)
    return Decoder(
        paper.Colours.vocabulary, 16, layers, lambda layer: Attention(16, 4, causal=True)
    ).eval()


def test_alpha_of_one_changes_nothing() -> None:
    model, batch = small(), paper.Colours().batch(0, 5)
    found = paper.reinforced(model, batch.inputs, batch.facts["image"], 1.0)
    assert torch.allclose(found, model(**batch.inputs), atol=1e-6)
    assert torch.equal(model(**batch.inputs), model(**batch.inputs))


def test_divergence_is_between_attention_to_all_and_to_words() -> None:
    """One layer, by hand: softmax over all tokens, and over the two words alone."""
    model, batch = small(1), paper.Colours().batch(0, 3)
    found = paper.vhd(view(model), batch.inputs, batch.facts["image"])
    (attention,) = view(model).attentions
    x = attention.norm(model.embed(batch.inputs["input_ids"])) if attention.norm else None
    assert x is not None
    for head in range(4):
        q, k, v = (
            x @ weight[head].T
            for weight in (
                attention.query_weight(),
                attention.key_weight(),
                attention.value_weight(),
            )
        )
        for b in range(3):
            scores = q[b, -1] @ k[b].T / 2
            both = scores.softmax(-1) @ v[b]
            words = scores[-2:].softmax(-1) @ v[b, -2:]
            assert torch.isclose(found[b, 0, head], (both - words).norm(), atol=1e-5)


def test_reinforcement_multiplies_half_of_the_heads_layer_after_layer() -> None:
    model, batch = small(), paper.Colours().batch(1, 1)
    look, image = view(model), batch.facts["image"]
    first = paper.vhd(look, batch.inputs, image)[0, 0].topk(2).indices

    def louder(chosen: torch.Tensor) -> paper.Write:
        def write(heads: torch.Tensor) -> torch.Tensor:
            more = heads.clone()
            more[:, -1, chosen] *= 3
            return more

        return write

    writes = {Site("heads", 0): louder(first)}
    second = paper.vhd(look, batch.inputs, image, writes=writes)[0, 1].topk(2).indices
    writes[Site("heads", 1)] = louder(second)
    with touching(look, writes):
        right = model(**batch.inputs)
    found = paper.reinforced(model, batch.inputs, image, 3.0)
    assert torch.allclose(found, right, atol=1e-6)
    assert not torch.allclose(found, model(**batch.inputs), atol=1e-3)


def test_the_task_has_a_habit() -> None:
    batch = paper.Colours().batch(0, 4000)
    usual = (batch.targets[:, -1] == batch.facts["habit"]).float().mean()
    assert abs(usual - 0.95) < 0.02
    shown = (batch.inputs["input_ids"][:, : paper.PATCHES] == batch.targets[:, -1:]).float().mean()
    assert abs(shown - (0.4 + 0.6 / paper.COLOURS)) < 0.02
    never = paper.Colours(usual=0.0).batch(0, 200)
    assert (never.targets[:, -1] != never.facts["habit"]).all()
