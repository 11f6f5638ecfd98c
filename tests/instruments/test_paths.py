"""Path patching: two plain runs for each path, with everything else held by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headwise.instruments.metrics import LogitDifference
from headwise.instruments.nodes import Node, heads_of, ports, senders_of
from headwise.instruments.patching import patch
from headwise.instruments.paths import path_patch
from headwise.models import Site, UnsupportedModelError, recording, sites_of, touching, view
from headwise.models.sites import Write
from tests.instruments import tiny
from tests.instruments.test_patching import N, decoder, prompts

METRIC = LogitDifference(torch.tensor([5, 9, 11]), torch.tensor([7, 8, 12]))
MODELS = {
    "gpt2": lambda: tiny.gpt2(),
    "llama": lambda: tiny.llama(num_hidden_layers=3),
    "own": decoder,
}


def putting(value: Tensor, head: int | None = None) -> Write:
    def write(there: Tensor) -> Tensor:
        if head is None:
            return value
        made = there.clone()
        made[:, :, head] = value[:, :, head]
        return made

    return write


@torch.no_grad()
def components(model: Any, ids: Tensor) -> dict[Site, Tensor]:
    look = view(model)
    everything = [Site("residual", 0), *sites_of(look, "heads"), *sites_of(look, "mlp")]
    with recording(look, everything) as kept:
        model(ids)
    return dict(kept)


@torch.no_grad()
def slowly(
    model: Any,
    clean: Tensor,
    mine: dict[Site, Tensor],
    theirs: dict[Site, Tensor],
    sender: Node,
    receiver: Node,
    mlps: str,
) -> Any:
    """The metric after one path, by definition."""
    look = view(model)
    held = sites_of(look, "heads") + (sites_of(look, "mlp") if mlps == "hold" else [])
    seen: dict[str, Tensor] = {}

    def hold(site: Site) -> Write:
        def write(there: Tensor) -> Tensor:
            if receiver.kind != "logits" and site == receiver.site:
                seen["receiver"] = there.clone()
            made = mine[site].clone()
            if site == sender.site:
                made = putting(theirs[site], sender.head)(made)
            return made

        return write

    writes: dict[Site, Write] = {site: hold(site) for site in held}
    if sender.site not in writes:
        writes[sender.site] = putting(theirs[sender.site], sender.head)
    if receiver.kind != "logits" and receiver.site not in writes:

        def read(there: Tensor) -> None:
            seen["receiver"] = there.clone()

        writes[receiver.site] = read
    with touching(look, writes):
        out = model(clean)
    if receiver.kind != "logits":
        with touching(look, {receiver.site: putting(seen["receiver"], receiver.head)}):
            out = model(clean)
    return METRIC.score(getattr(out, "logits", out), {"input_ids": clean}).numpy()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mlps", ["run", "hold"])
def test_every_path_is_two_plain_runs(name, mlps):
    model, (clean, corrupted) = MODELS[name](), prompts()
    senders = list(map(str, senders_of(view(model), mlps == "hold")))
    receivers = ["logits", "L1H2", "L1H1.q", "L1H0.k", "L1H1.v"]
    if name != "own":
        receivers += ["L0 mlp", "L1 mlp"]
    if name == "llama":
        receivers += ["L2H3.q", "L2H1.k"]
    table = path_patch(model, clean, corrupted, METRIC, receivers, mlps=mlps, pass_tokens=100)
    assert list(table.axes["sender"]) == senders
    mine, theirs = components(model, clean), components(model, corrupted)
    moved = 0
    for i, sender in enumerate(map(Node.of, senders)):
        for j, receiver in enumerate(map(Node.of, receivers)):
            expected = table.clean
            if sender.order < receiver.order:
                expected = slowly(model, clean, mine, theirs, sender, receiver, mlps)
                moved += np.abs(expected - table.clean).max() > 1e-2
            np.testing.assert_allclose(table.examples[:, i, j], expected, atol=3e-4)
    assert moved > 10


def test_all_senders_together_are_the_corrupted_run():
    """With every sender's value exchanged, the logits are handed the whole corrupted residual, and
    every receiver its corrupted input."""
    model, (clean, corrupted) = tiny.gpt2(), prompts()
    everything = [str(n) for n in senders_of(view(model), mlps=True)]
    table = path_patch(model, clean, corrupted, METRIC, senders=[everything], mlps="hold")
    np.testing.assert_allclose(table.examples[:, 0, 0], table.corrupted, atol=1e-4)
    below = [name for name in everything if Node.of(name).order < (1, 0)]
    table = path_patch(model, clean, corrupted, METRIC, ["L1H2", "L1H2.k"], [below], mlps="hold")
    whole = patch(model, clean, corrupted, METRIC, "heads", direction="noise")
    np.testing.assert_allclose(table.examples[:, 0, 0], whole.examples[:, 1, 2], atol=1e-4)
    keys = patch(model, clean, corrupted, METRIC, "keys", direction="noise")
    np.testing.assert_allclose(table.examples[:, 0, 1], keys.examples[:, 1, 2], atol=1e-4)


def test_receivers_together():
    """Queries, keys and values together are the head."""
    model, (clean, corrupted) = tiny.gpt2(), prompts()
    three = ["L1H2.q", "L1H2.k", "L1H2.v"]
    table = path_patch(model, clean, corrupted, METRIC, [three, "L1H2"])
    assert table.axes["receiver"] == ("L1H2.q + L1H2.k + L1H2.v", "L1H2")
    np.testing.assert_allclose(table.examples[..., 0], table.examples[..., 1], atol=1e-4)
    early_and_late = path_patch(
        tiny.llama(num_hidden_layers=3), clean, corrupted, METRIC, [["L1H0.k", "L2H0.k"]], ["L1H0"]
    )
    late = path_patch(
        tiny.llama(num_hidden_layers=3), clean, corrupted, METRIC, ["L2H0.k"], ["L1H0"]
    )
    np.testing.assert_allclose(early_and_late.examples, late.examples, atol=1e-5)


def test_lengths_and_batches():
    model = tiny.llama()
    pairs = [prompts(n, 1, n) for n in (5, N, 5)]
    clean, corrupted = ([pair[i][0] for pair in pairs] for i in (0, 1))
    table = path_patch(model, clean, corrupted, METRIC, ["logits", "L1H1.q"], batch_size=2)
    for example, (a, b) in enumerate(pairs):
        alone = LogitDifference(int(METRIC.right[example]), int(METRIC.wrong[example]))
        one = path_patch(model, a, b, alone, ["logits", "L1H1.q"])
        np.testing.assert_allclose(table.examples[example], one.examples[0], atol=2e-4)


def test_names():
    for name in ("embed", "logits", "L0H3", "L2H1.q", "L2H1.k", "L11H0.v", "L4 mlp"):
        assert str(Node.of(name)) == name
    assert str(Node.of("L4mlp")) == "L4 mlp"
    for wrong in ("H1", "L1.k", "L1H2.z", "embedding", "L1H2.k "):
        with pytest.raises(ValueError, match="names no component"):
            Node.of(wrong)
    look = view(tiny.llama())
    assert len(heads_of(look)) == 8
    assert list(map(str, ports(look, Node.of("L1H3")))) == ["L1H3.q", "L1H1.k", "L1H1.v"]
    assert list(map(str, senders_of(look, True)))[:6] == [
        *("embed", "L0H0", "L0H1", "L0H2", "L0H3", "L0 mlp")
    ]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"receivers": ["L1H2.q"], "senders": ["L1H2.q"]}, "sends nothing"),
        ({"receivers": ["embed"]}, "embed: expected heads"),
        ({"receivers": [["logits", "L1H0"]]}, "expected heads"),
        ({"receivers": ["L7H0"]}, "L7H0 is not there"),
        ({"receivers": ["L1H3.k"]}, "L1H3.k is not there"),  # two heads share one
        ({"senders": ["L0H9"]}, "L0H9 is not there"),
        ({"senders": [[]]}, "empty group"),
        ({"mlps": "freeze"}, "mlps='freeze'"),
    ],
)
def test_what_cannot_be_done_is_said(more, told):
    clean, corrupted = prompts()
    with pytest.raises(ValueError, match=told):
        path_patch(tiny.llama(), clean, corrupted, METRIC, **more)


def test_models_of_several_stacks_are_refused():
    clean, corrupted = prompts()
    with pytest.raises(UnsupportedModelError, match="one stack"):
        path_patch(tiny.bart(), clean, corrupted, METRIC)


def test_nothing_is_left_behind():
    model, (clean, corrupted) = tiny.llama(), prompts()
    with torch.no_grad():
        before = model(clean).logits
    path_patch(model, clean, corrupted, METRIC, ["logits", "L1H0.k"])
    with torch.no_grad():
        assert torch.equal(model(clean).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
