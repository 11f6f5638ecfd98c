"""Deletion and insertion against loops that run the model once a step and an example."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.instruments.attribution import Attribution, attribute
from headwise.instruments.curves import Curves
from headwise.instruments.metrics import LogitDifference
from headwise.instruments.perturbation import perturb
from headwise.report.deletion_picture import deletion_picture
from tests.instruments import tiny

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def made(scores: Tensor, name: str = "mine") -> Attribution:
    rows = scores.numpy()
    labels = [[str(i) for i in range(len(row))] for row in rows]
    return Attribution(name, "", rows, labels, [np.ones(len(row), dtype=bool) for row in rows])


def scores(batch: int, n: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, n, generator=torch.Generator().manual_seed(seed))


def gone_at(order: list[int], step: int, steps: int, mode: str) -> list[int]:
    count = round(step / steps * len(order))
    return order[:count] if mode == "deletion" else order[count:]


@pytest.mark.parametrize("mode", ["deletion", "insertion"])
def test_tokens_are_replaced_by_an_id(mode: str) -> None:
    model, ids, held = tiny.gpt2(), tiny.ids(7, batch=2), scores(2, 7)
    found = perturb(model, ids, made(held), mode=mode, instead=0, steps=3, orders=1, rows=3)
    for b in range(2):
        logits = model(ids[b : b + 1]).logits[0, -1]
        best = int(logits.argmax())
        order = held[b, :6].argsort(descending=True).tolist()  # the last token is read, and stays
        for name, this in (("mine", order), ("mine, reversed", order[::-1])):
            for step in range(4):
                changed = ids[b : b + 1].clone()
                changed[0, gone_at(this, step, 3, mode)] = 0
                right = model(changed).logits[0, -1].softmax(-1)[best].item()
                assert found.curves[name][b, step] == pytest.approx(right, abs=1e-5)


@pytest.mark.parametrize("instead", ["mean", "zero", "tensor"])
def test_what_patches_are_replaced_by(instead: str) -> None:
    model, held = tiny.vit(), scores(2, 17)
    other: Any = torch.arange(32.0) / 32 if instead == "tensor" else instead
    found = perturb(
        model, {"pixel_values": PIXELS}, made(held), 1, instead=other, steps=4, orders=1
    )
    with torch.no_grad():
        there = model.vit.embeddings(PIXELS)
        put = {
            "mean": there.mean((0, 1)),
            "zero": torch.zeros(32),
            "tensor": torch.arange(32.0) / 32,
        }
        for b in range(2):
            order = [i + 1 for i in held[b, 1:].argsort(descending=True).tolist()]
            for step in range(5):
                stream = there[b : b + 1].clone()
                stream[0, gone_at(order, step, 4, "deletion")] = put[instead]
                for layer in model.vit.layers:
                    stream = layer(stream)
                logits = model.classifier(model.vit.layernorm(stream)[:, 0])
                right = logits.softmax(-1)[0, 1].item()
                assert found.curves["mine"][b, step] == pytest.approx(right, abs=1e-5)
    assert found.target == "the probability of 1"


def test_hidden_positions_are_what_a_padding_mask_hides() -> None:
    model, ids, held = tiny.bert(), tiny.ids(6, batch=2), scores(2, 6)
    target = LogitDifference(7, 9)
    found = perturb(model, ids, made(held), target, instead="hide", steps=5, orders=1)
    for b in range(2):
        order = held[b, :5].argsort(descending=True).tolist()
        for step in range(6):
            mask = torch.ones(1, 6)
            mask[0, gone_at(order, step, 5, "deletion")] = 0
            logits = model(input_ids=ids[b : b + 1], attention_mask=mask).logits[0, -1]
            right = (logits[7] - logits[9]).item()
            assert found.curves["mine"][b, step] == pytest.approx(right, abs=1e-4)


@pytest.mark.parametrize("of", ["encoder", "decoder"])
def test_hiding_in_an_encoder_decoder(of: str) -> None:
    model = tiny.bart()
    inputs = {"input_ids": tiny.ids(6), "decoder_input_ids": tiny.ids(5, 1)}
    n = 6 if of == "encoder" else 5
    held = scores(1, n)
    found = perturb(
        model, inputs, made(held), 7, instead="hide", of=of, spare=[-1], steps=n - 1, orders=1
    )
    order = held[0, : n - 1].argsort(descending=True).tolist()
    name = "attention_mask" if of == "encoder" else "decoder_attention_mask"
    for step in range(n):
        mask = torch.ones(1, n, dtype=torch.long)
        mask[0, order[:step]] = 0
        # a row that sees nothing is zero under observation and an even mean in eager attention
        if of == "decoder" and mask[0, 0] == 0:
            continue
        logits = model(**inputs, **{name: mask}).logits[0, -1]
        assert found.curves["mine"][0, step] == pytest.approx(
            logits.softmax(-1)[7].item(), abs=1e-5
        )


def test_padding_and_spared_positions_stay() -> None:
    model, ids, held = tiny.bert(), tiny.ids(6, batch=2), scores(2, 6)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": mask}
    found = perturb(
        model, inputs, made(held), 5, instead=3, spare=[0, -1], steps=2, orders=1, at="tokens"
    )
    changed = ids.clone()
    changed[0, 1:5], changed[1, 1:3] = 3, 3
    logits = model(input_ids=changed, attention_mask=mask).logits
    right = torch.stack([logits[0, 5], logits[1, 3]]).softmax(-1)[:, 5]
    assert torch.allclose(torch.tensor(found.curves["mine"][:, -1]), right, atol=1e-5)
    assert np.allclose(found.curves["mine"][:, [0, -1]], found.random[:, [0, -1]], atol=1e-6)


def test_areas_and_gains() -> None:
    shares = np.linspace(0, 1, 3)
    curves = {"good": np.array([[1.0, 0.0, 0.0], [1.0, 0.2, 0.0]])}
    random = np.array([[1.0, 0.5, 0.0], [1.0, 0.6, 0.0]])
    found = Curves("deletion", "the probability of 1", shares, curves, random)
    assert found.area("good").tolist() == pytest.approx([0.25, 0.35])
    assert found.gain("good").mean == pytest.approx((0.25 + 0.2) / 2)
    assert found.gain("good").error == pytest.approx(np.std([0.25, 0.2], ddof=1) / 2**0.5)
    other = Curves("insertion", "", shares, curves, random)
    assert other.gain("good").mean == pytest.approx(-0.225)
    assert str(found.gain("good")) == "+0.225 ± 0.025"
    with pytest.raises(LookupError, match="no order 'bad'; there are good, random orders"):
        found.area("bad")
    picture = deletion_picture(found)
    assert "share of positions deleted" in picture
    assert "+0.225 ± 0.025" in picture
    pytest.importorskip("pandas")
    assert found.frame().order.tolist() == ["good", "random orders"]


def test_a_head_that_copies_one_token_is_found_by_every_order_that_knows_it() -> None:
    """The answer is made of one position alone: it falls when that one goes, and not before."""
    model, ids = tiny.gpt2(), tiny.ids(8, batch=3)

    def reads_third(logits: Tensor, inputs: Any) -> Tensor:
        return F.one_hot(inputs["input_ids"][:, 2], 60).float().sum(-1) * logits[:, 2, 5]

    knows = made(F.one_hot(torch.tensor([2] * 3), 8).float())
    found = perturb(model, ids, knows, reads_third, instead=0, spare=[], steps=8, orders=4)
    curve = found.curves["mine, reversed"]
    # what comes after the third token cannot matter: nothing changes until something before goes
    assert np.allclose(curve[:, 0], found.curves["mine"][:, 0])
    assert (np.abs(found.curves["mine"][:, 1] - found.curves["mine"][:, 0]) > 1e-4).all()


def test_what_does_not_fit_is_refused() -> None:
    model, ids = tiny.gpt2(), tiny.ids(5, batch=2)
    mine = made(scores(2, 5))
    for wrong, told in (
        ({"mode": "swap"}, "mode='swap'"),
        ({"instead": "noise"}, "instead='noise'"),
        ({"steps": 0}, "steps=0"),
        ({"spare": [9]}, r"spare=\[9\]: there are 5"),
        ({"of": "encoder"}, "of='encoder'"),
    ):
        with pytest.raises(ValueError, match=told):
            perturb(model, ids, mine, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scores 3 examples, the inputs are 2"):
        perturb(model, ids, made(scores(3, 5)))
    with pytest.raises(ValueError, match="scores 4 positions, and 5 can be replaced"):
        perturb(model, ids, made(scores(2, 4)))
    with pytest.raises(ValueError, match="needs input_ids"):
        perturb(tiny.vit(), {"pixel_values": PIXELS}, made(scores(2, 17)), instead=3)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.bert().train()
    held = attribute(model, tiny.ids(5), method="rollout")
    for instead in ("mean", "hide", 4):
        perturb(model, tiny.ids(5), held, instead=instead, steps=2, orders=1)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
