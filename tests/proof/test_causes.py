"""What taking heads out does to models of which it is known what their heads do.

Two-layer induction (JasonGross, MIT): both heads are needed, and the first works through the map
of the second alone; in the broken model neither matters. stories260K and the MNIST transformers:
whole passes with a silenced head, one by one.
"""

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import headwise
from headwise.edits import Silence
from headwise.instruments import ablate_together, ablate_tokens, ablation
from headwise.models import view
from tests.instruments import slow_ablation as slow
from tests.proof.induction_gpt2 import as_gpt2
from tests.proof.mnist_vit import as_vit
from tests.proof.weights import loader, stories

CHANCE = 1 / 26
EXAMPLES = 400


@pytest.fixture(scope="module")
def source(assets):
    return loader(assets / "induction_head_2l" / "load_induction.py")


@pytest.fixture(scope="module")
def task(source):
    """Letters `(400, 8)`, places of the answers `(400,)`, and the share of right answers."""
    ids, answers, places = (part[:EXAMPLES] for part in source.batch())
    known = {tuple(row.tolist()): int(answer) for row, answer in zip(ids, answers, strict=True)}

    def right(logits, inputs):
        wanted = torch.tensor([known[tuple(row.tolist())] for row in inputs["input_ids"]])
        return (logits[:, -1].argmax(-1) == wanted).float()

    return ids, places, right


def effects(source, name, task, **more):
    ids, _, right = task
    return ablation(as_gpt2(source.load(name)), ids, right, batch_size=100, **more)


@pytest.mark.parametrize("name", ["clean", "trained"])
@pytest.mark.parametrize("how", ["zero", "mean", "resample", "uniform"])
def test_without_either_head_induction_is_gone(source, task, name, how):
    atlas = effects(source, name, task, how=how)
    before = atlas.provenance["cause"]["unchanged"]
    assert before > 0.9
    assert (before + atlas.heads["effect"] < 0.25).all()  # trained: a guess among what stood there
    assert (atlas.heads["effect"] < -20 * atlas.heads["effect_se"]).all()


@pytest.mark.parametrize("how", ["zero", "mean", "resample", "uniform"])
def test_the_broken_model_has_nothing_to_lose(source, task, how):
    """The control: the same weights' shapes, and no induction."""
    atlas = effects(source, "broken", task, how=how)
    assert atlas.provenance["cause"]["unchanged"] < 2 * CHANCE
    assert (np.abs(atlas.heads["effect"]) < CHANCE / 2).all()
    ids, _, right = task
    both = ablate_together(as_gpt2(source.load("broken")), ids, ["all"], right, batch_size=100)
    assert abs(both.mean[0]) < CHANCE / 2


@pytest.mark.parametrize("name", ["clean", "trained"])
def test_the_first_head_works_through_the_map_of_the_second(source, task, name):
    """With maps frozen (Olsson et al. 2022) nobody misses the previous-token head: what it wrote
    was there to be looked for. The second head carries the letter itself."""
    atlas = effects(source, name, task, frozen=True)
    before = atlas.provenance["cause"]["unchanged"]
    assert abs(atlas.heads["effect"][0]) < 0.01
    assert before + atlas.heads["effect"][1] < 0.1


def test_the_token_that_is_copied_is_the_one_that_matters(source, task):
    """Hidden from everybody, the letter after the match and the match's own place are missed most;
    the last letter asks and stays."""
    ids, places, right = task
    found = ablate_tokens(as_gpt2(source.load("clean")), ids[:200], right, batch_size=100)
    rows = torch.arange(200)
    missed = -found.effects
    copied = missed[rows, places[:200]]
    others = [
        missed[row, place]
        for row in range(200)
        for place in range(7)
        if place not in (int(places[row]), int(places[row]) - 1)
    ]
    assert copied.mean() > 0.85
    assert np.mean(others) < 0.05


@pytest.fixture(scope="module")
def llama(assets):
    return LlamaForCausalLM.from_pretrained(assets / "stories260K" / "hf").eval()


def test_every_head_of_a_real_llama_by_whole_passes(assets, llama):
    """40 heads, stories of different lengths, swap with Silence one head at a time."""
    texts = [ids[:, :n] for ids, n in zip(stories(assets), (40, 40, 64), strict=False)]
    atlas = ablation(llama, texts, estimate="gradient", what=("heads", "layers"))
    rows = []
    for attention in view(llama).attentions:
        for head in range(attention.heads):
            with headwise.swap(llama, {(attention.layer, head): Silence()}):
                rows.append([slow.loss(slow.answer(llama, {"input_ids": t}), t)[0] for t in texts])
    before = [slow.loss(slow.answer(llama, {"input_ids": t}), t)[0] for t in texts]
    wanted = np.array(rows) - np.array(before)
    assert np.abs(atlas.heads["effect"] - wanted.mean(1)).max() < 2e-5
    assert np.abs(atlas.heads["effect_se"] - wanted.std(1, ddof=1) / 3**0.5).max() < 2e-5
    assert atlas.provenance["cause"]["rank_correlation"]["gradient"] > 0.6
    assert atlas.layers["layer_effect"].argmax() == 0  # the first layer makes words of tokens


def test_every_head_of_a_real_vision_transformer(assets):
    weights = torch.load(
        assets / "vit_mnist" / "vit_mnist_gpu.pt", map_location="cpu", weights_only=True
    )
    model = as_vit(weights)
    images, labels = loader(assets / "vit_mnist" / "vit_mnist.py").mnist_test()
    inputs = {"pixel_values": images[:60], "labels": labels[:60]}
    atlas = ablation(model, inputs, what=("heads", "mlp"), batch_size=30)

    def score(logits):
        logs = logits.double().log_softmax(-1)
        return -logs[torch.arange(60), labels[:60]]

    wanted = [
        slow.effects(model, {"pixel_values": images[:60]}, layer.attention.o_proj, 4, score).mean(1)
        for layer in model.vit.layers
    ]
    assert np.abs(atlas.heads["effect"] - torch.cat(wanted).numpy()).max() < 2e-5
    with torch.no_grad():
        before = score(model(images[:60]).logits).mean()
        for row, layer in enumerate(model.vit.layers):
            handle = layer.mlp.register_forward_hook(lambda m, a, out: torch.zeros_like(out))
            change = score(model(images[:60]).logits).mean() - before
            handle.remove()
            assert atlas.layers["mlp_effect"][row] == pytest.approx(change.item(), abs=2e-5)
