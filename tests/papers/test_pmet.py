"""PMET's file: what its claims do not say."""

import torch

from headwise.edits import Fact
from headwise.models.backbones import Decoder
from headwise.papers.steer.pmet import fine_tuned, pmet
from headwise.parts import Attention, Mlp


def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(
        50, 32, 3, mixer=lambda layer: Attention(32, 4, causal=True), feed=lambda layer: Mlp(32)
    ).eval()


def test_it_changes_the_layers_it_is_given() -> None:
    one, text = model(), torch.randint(50, (20, 30))
    patch = pmet(one, [Fact([4, 17, 9], 1, 33)], layers=[0, 2], statistics=text)
    assert sorted(name.split(".")[2] for name in patch.deltas) == ["0", "2"]
    assert patch.record["layers"] == [0, 2]
    assert patch.record["root"] is True


def test_fine_tuning_as_a_control_says_its_facts_and_leaves_the_model() -> None:
    one = model()
    before = {name: value.clone() for name, value in one.state_dict().items()}
    facts = [Fact([4, 17, 9], 1, 33), Fact([5, 18, 9], 1, 34)]
    patch = fine_tuned(one, facts)
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    with patch, torch.no_grad():
        said = one(torch.tensor([[4, 17, 9], [5, 18, 9]]))[:, -1].argmax(-1)
    assert said.tolist() == [33, 34]
