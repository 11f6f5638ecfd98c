"""The dispatcher: targets, labels, ragged inputs, and what is refused before anything runs."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headwise import instruments
from headwise.instruments import attribute
from headwise.instruments.attribution import METHODS, method_of
from headwise.instruments.metrics import LogitDifference, Metric
from headwise.instruments.targets import LogitOf, read_target
from headwise.models import ModelView, view
from tests.instruments import tiny

SEEN: list[tuple[Metric, dict[str, Any]]] = []


def slopes(view: ModelView, inputs: dict[str, Any], metric: Metric, *, scale: float = 1) -> Tensor:
    """A method of one's own: the score of every example at each position."""
    with torch.no_grad():
        score = metric.score(view.model(**inputs).logits, inputs)
    SEEN.append((metric, inputs))
    return scale * score[:, None] * torch.arange(1, inputs["input_ids"].shape[1] + 1)


def score(given: Any, inputs: Any, model: Any = None) -> np.ndarray:
    return np.stack([row[:1] for row in attribute(model, inputs, given, slopes).scores])[:, 0]


def test_a_target_is_a_prediction_an_id_ids_a_metric_or_a_function() -> None:
    model, ids = tiny.gpt2(), tiny.ids(6, batch=3)
    logits = model(ids).logits.detach()[:, -1]
    best = logits.amax(-1).numpy()
    assert score(None, ids, model) == pytest.approx(best, rel=1e-5)
    assert score(7, ids, model) == pytest.approx(logits[:, 7].numpy(), rel=1e-5)
    each = [4, 5, 6]
    right = logits[range(3), each].numpy()
    for given in (each, torch.tensor(each), np.array(each)):
        assert score(given, ids, model) == pytest.approx(right, rel=1e-5)
    assert score(LogitDifference(torch.tensor(each), 9), ids, model) == pytest.approx(
        right - logits[:, 9].numpy(), rel=1e-4
    )

    def twice(logits: Tensor, inputs: Any) -> Tensor:
        return 2 * logits[:, -1, 7]

    found = attribute(model, ids, twice, slopes)
    assert found.scores[:, 0] == pytest.approx(2 * logits[:, 7].numpy(), rel=1e-5)
    assert found.target == "the twice"
    assert attribute(model, ids, 7, slopes).target == "the logit of 7"
    assert attribute(model, ids, None, slopes, scale=2.0).scores[:, 0] == pytest.approx(2 * best)


def test_ids_go_with_their_examples_through_batches_and_lengths() -> None:
    model = tiny.gpt2()
    texts = [tiny.ids(6)[0], tiny.ids(6, 1)[0], tiny.ids(4, 2)[0]]
    found = attribute(model, texts, [4, 5, 6], slopes, batch_size=1)
    assert isinstance(found.scores, list)
    assert [row.shape for row in found.scores] == [(6,), (6,), (4,)]
    for row, ids, token in zip(found.scores, texts, [4, 5, 6], strict=True):
        right = model(ids[None]).logits[0, -1, token].item()
        assert row[0] == pytest.approx(right, rel=1e-4)
    same = attribute(model, texts, [4, 5, 6], slopes, batch_size=16)
    for one, other in zip(found.scores, same.scores, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_padding_is_left_out() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = {"input_ids": tiny.ids(5, batch=2), "attention_mask": mask}
    found = attribute(tiny.gpt2(), inputs, None, slopes)
    assert (found.scores[1, 3:] == 0).all()
    assert [len(row) for row in found.top(9)] == [5, 3]
    last = tiny.gpt2()(**inputs).logits[1, 2].max().item()
    assert found.scores[1, 0] == pytest.approx(last, rel=1e-4)
    pytest.importorskip("pandas")
    frame = found.frame()
    assert list(frame.columns) == ["example", "position", "label", "score"]
    assert frame.example.tolist() == [0] * 5 + [1] * 3


def test_labels_are_tokens_ids_or_places() -> None:
    words = tiny.Words()
    found = attribute(tiny.gpt2(), "abca", None, slopes, tokenizer=words)
    assert found.labels == [["a", "b", "c", "a"]]
    assert found.top(1)[0][0][:2] in (("a", 3), ("a", 0))
    assert attribute(tiny.gpt2(), torch.tensor([[5, 9]]), None, slopes).labels == [["5", "9"]]
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = attribute(tiny.vit(), {"pixel_values": pixels}, method="rollout")
    assert seen.labels[0][:3] == ["class", "0,0", "0,1"]
    assert seen.labels[0][-1] == "3,3"
    assert len(seen.labels[0]) == 17


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.bert().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for method in ("rollout", "generic", "raw_attention", "random"):
        attribute(model, tiny.ids(5), method=method)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert torch.is_grad_enabled()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_does_not_exist_is_refused_before_anything_runs() -> None:
    model, ids = tiny.gpt2(), tiny.ids(4, batch=2)
    with pytest.raises(ValueError, match="no method 'saliency'; there are gradient_x_input"):
        attribute(model, ids, method="saliency")
    with pytest.raises(ValueError, match="rollout has no option 'steps'; it has of, fuse"):
        attribute(model, ids, method="rollout", steps=4)
    with pytest.raises(ValueError, match="3 ids for 2 examples"):
        attribute(model, ids, [1, 2, 3], slopes)
    with pytest.raises(ValueError, match="logits for ids 0 to 59"):
        attribute(model, ids, 60, slopes)
    with pytest.raises(TypeError, match="float32"):
        attribute(model, ids, torch.tensor(1.0), slopes)
    with pytest.raises(TypeError, match="True"):
        attribute(model, ids, True, slopes)
    for name in ("kl", "accuracy"):
        with pytest.raises(ValueError, match="no gradient at the unchanged model"):
            attribute(model, ids, name, slopes)

    def flat(view: ModelView, inputs: dict[str, Any], metric: Metric) -> Tensor:
        return torch.zeros(3)

    with pytest.raises(ValueError, match=r"gave \(3,\) for 2 examples"):
        attribute(model, ids, None, flat)
    with pytest.raises(ValueError, match="hidden states and no logits"):
        attribute(tiny.bert().bert, ids, method="rollout")


def test_targets_know_their_rows() -> None:
    target = read_target(torch.tensor([3, 4, 5]), 3)
    metric = target.of(view(tiny.gpt2()), {}, slice(1, 3))
    assert isinstance(metric, LogitOf)
    assert torch.equal(torch.as_tensor(metric.ids), torch.tensor([4, 5]))
    rows = torch.randn(4, 9)  # two copies of two examples
    assert torch.equal(metric.score(rows, {}), rows[range(4), [4, 5, 4, 5]])


def test_every_listed_method_of_this_installation_is_a_function() -> None:
    assert instruments.attribute is attribute
    for name in ("rollout", "flow", "generic", "raw_attention", "random"):
        assert name in METHODS
        assert callable(method_of(name, {})[1])
