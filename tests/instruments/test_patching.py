"""Activation patching: each number is one plain run with one value exchanged."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headwise.instruments.metrics import LogitDifference as Difference
from headwise.instruments.metrics import Loss, Metric
from headwise.instruments.patching import patch
from headwise.models import recording, sites_of, touching, view
from headwise.models.backbones import Decoder
from headwise.models.prefix import logits_of
from headwise.models.sites import Write
from headwise.parts import Attention
from tests.instruments import tiny

KINDS = ("residual", "attention", "mlp", "neurons", "heads", "queries", "keys", "values")
BY_HEAD = ("heads", "queries", "keys", "values")
RIGHT, WRONG = torch.tensor([5, 9, 11]), torch.tensor([7, 8, 12])
N = 7


def prompts(n: int = N, examples: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two sets of sentences that differ at some positions."""
    clean, other = tiny.ids(n, seed, examples), tiny.ids(n, seed + 50, examples)
    corrupted = clean.clone()
    corrupted[:, 1:4] = other[:, 1:4]
    return clean, corrupted


def decoder() -> Decoder:
    """A small model of our own."""
    torch.manual_seed(3)
    made = Decoder(tiny.VOCABULARY, 24, 2, mixer=lambda layer: Attention(24, 3, causal=True))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.4)
    return made.eval()


def putting(given: Tensor, head: int | None, position: int) -> Write:
    def write(there: Tensor) -> Tensor:
        made = there.clone()
        if head is None:
            made[:, position] = given[:, position]
        else:
            made[:, position, head] = given[:, position, head]
        return made

    return write


@torch.no_grad()
def slowly(
    model: Any, own: dict[str, Tensor], source: dict[str, Tensor], kind: str, metric: Metric
) -> dict[tuple[int, int | None, int], np.ndarray]:
    """(layer, head, position) -> the metric by example, one plain run for each."""
    look = view(model)
    found = {}
    for site in sites_of(look, kind):
        with recording(look, [site]) as kept:
            model(**source)
        given = kept[site]
        heads = range(given.shape[2]) if kind in BY_HEAD else [None]
        for head, position in itertools.product(heads, range(given.shape[1])):
            write = putting(given, head, position)
            with touching(look, {site: write}):
                scores = metric.score(logits_of(model(**own)), own)
            found[site.layer, head, position] = scores.numpy()
    return found


MODELS = {"gpt2": tiny.gpt2, "llama": tiny.llama, "gpt_oss": tiny.gpt_oss, "own": decoder}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_place_is_a_plain_run_with_one_value_exchanged(name, kind):
    if name == "gpt_oss" and kind == "neurons":
        pytest.skip("experts have no one last projection")
    if name == "own" and kind in ("mlp", "neurons"):
        pytest.skip("this model has attention only")
    model, (clean, corrupted) = MODELS[name](), prompts()
    metric = Difference(RIGHT, WRONG)
    for direction in ("denoise", "noise"):
        table = patch(model, clean, corrupted, metric, kind, "all", direction=direction)
        own, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
        expected = slowly(model, {"input_ids": own}, {"input_ids": source}, kind, metric)
        assert table.examples[0].size == len(expected)
        for (layer, head, position), scores in expected.items():
            at = (layer, position) if head is None else (layer, head, position)
            np.testing.assert_allclose(table.examples[(slice(None), *at)], scores, atol=2e-4)
        assert np.abs(table.effects).max() > 0.01  # something happened


def test_few_rows_a_pass_are_as_good_as_many():
    model, (clean, corrupted) = tiny.llama(), prompts()
    tables = [
        patch(model, clean, corrupted, Difference(RIGHT, WRONG), "heads", pass_tokens=tokens)
        for tokens in (1, 3 * N * 3, 10_000)
    ]
    for table in tables[1:]:
        np.testing.assert_allclose(table.examples, tables[0].examples, atol=1e-4)


def test_the_whole_first_layer_is_the_other_run():
    """All of what the first layer reads, exchanged, is the clean run itself; and heads that are
    patched together at all positions are what stands there."""
    model, (clean, corrupted) = tiny.gpt2(), prompts()
    table = patch(model, clean, corrupted, Difference(RIGHT, WRONG), positions="together")
    assert table.shape == (3,)
    np.testing.assert_allclose(table.examples[:, 0], table.clean, atol=1e-4)
    assert table.normalised[0] == pytest.approx(1, abs=1e-4)
    assert list(table.axes) == ["layer"]


def test_patching_a_run_with_itself_changes_nothing():
    model, (clean, _) = tiny.llama(), prompts()
    table = patch(model, clean, clean, "loss", "mlp", "all")
    assert np.abs(table.effects).max() < 1e-5
    assert np.isnan(table.normalised).all()


def test_named_positions_differ_by_example():
    model, (clean, corrupted) = tiny.gpt2(), prompts()
    metric = Difference(RIGHT, WRONG)
    whole = patch(model, clean, corrupted, metric, positions="all")
    places = torch.tensor([1, 3, 2])
    some = patch(model, clean, corrupted, metric, positions={"name": places, "end": -1})
    assert some.axes["position"] == ("name", "end")
    for example, place in enumerate(places.tolist()):
        np.testing.assert_allclose(
            some.examples[example, :, 0], whole.examples[example, :, place], atol=1e-4
        )
    np.testing.assert_allclose(some.examples[..., 1], whole.examples[..., -1], atol=1e-4)
    listed = patch(model, clean, corrupted, metric, positions=[2, -1], batch_size=2)
    np.testing.assert_allclose(listed.examples, whole.examples[..., [2, -1]], atol=1e-4)


def test_padding_on_the_right_is_not_the_end():
    model, (clean, corrupted) = tiny.llama(), prompts()
    mask = torch.ones_like(clean)
    mask[1, 5:] = 0
    inputs = [{"input_ids": ids, "attention_mask": mask} for ids in (clean, corrupted)]
    table = patch(model, *inputs, Difference(RIGHT, WRONG), positions={"end": -1})
    short = patch(
        model, clean[1:2, :5], corrupted[1:2, :5], Difference(9, 8), positions={"end": -1}
    )
    np.testing.assert_allclose(table.examples[1], short.examples[0], atol=1e-4)


def test_examples_of_several_lengths():
    model = tiny.gpt2()
    pairs = [prompts(n, 1, n) for n in (5, 8, 5)]
    clean, corrupted = ([pair[i][0] for pair in pairs] for i in (0, 1))
    metric = Difference(RIGHT, WRONG)
    table = patch(model, clean, corrupted, metric, "heads")
    for example, (a, b) in enumerate(pairs):
        alone = Difference(int(RIGHT[example]), int(WRONG[example]))
        one = patch(model, a, b, alone, "heads")
        np.testing.assert_allclose(table.examples[example], one.examples[0], atol=1e-4)
    with pytest.raises(ValueError, match="name positions"):
        patch(model, clean, corrupted, metric)


@pytest.mark.parametrize("metric", ["loss", "kl", "accuracy"])
def test_named_metrics(metric):
    model, (clean, corrupted) = tiny.gpt2(), prompts()
    table = patch(model, clean, corrupted, metric, positions="together")
    if metric == "kl":  # from the clean run, which patching the embedding restores
        assert np.abs(table.clean).max() < 1e-6
        assert table.corrupted.min() > 0.01
        assert table.values[0] == pytest.approx(0, abs=1e-5)
    if metric == "loss":
        with torch.no_grad():
            plain = Loss().score(model(corrupted).logits, {"input_ids": corrupted})
        np.testing.assert_allclose(table.corrupted, plain.numpy(), atol=1e-5)


def test_an_encoder_decoder_by_stack():
    model, (clean, corrupted) = tiny.bart(), prompts()
    answers = clean[:, :4]
    inputs = [{"input_ids": ids, "decoder_input_ids": answers} for ids in (clean, corrupted)]
    metric = Difference(RIGHT, WRONG)
    heads = patch(model, *inputs, metric, "residual", stack="encoder")
    assert heads.shape == (3, N)
    cross = patch(model, *inputs, metric, "attention", attention="cross", stack="decoder")
    assert cross.shape == (2, 4)
    assert np.abs(cross.effects).max() > 0.01
    with pytest.raises(ValueError, match="stack="):
        patch(model, *inputs, metric, "residual")


# -- estimates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["residual", "mlp", "heads", "keys"])
def test_the_gradient_estimate_is_the_derivative_of_a_small_exchange(kind):
    """Of a run that is nearly the other, effects are differences times gradients."""
    model = tiny.llama()
    clean = torch.randn(2, N, 32, generator=torch.Generator().manual_seed(0)) * 0.5
    near = clean + 1e-3 * torch.randn(2, N, 32, generator=torch.Generator().manual_seed(1))
    model, metric = model.double(), Difference(5, 7)
    inputs = [{"inputs_embeds": one.double()} for one in (clean, near)]
    exact = patch(model, *inputs, metric, kind, "all")
    for method in ("gradient", "integrated"):
        table = patch(model, *inputs, metric, kind, "all", method=method)
        off = np.abs(table.examples - exact.examples).max()
        size = np.abs(exact.examples - exact.corrupted.reshape(-1, *[1] * len(exact.shape))).max()
        assert off < 0.02 * size, (off, size)
        assert table.rank_correlation(exact) > 0.99


def test_integrated_gradients_of_the_input_add_up():
    """At what the first layer reads, estimates of all positions sum to the gap between the runs
    (completeness of integrated gradients, arXiv 1703.01365); a single gradient's do not."""
    model, (clean, corrupted) = tiny.gpt2(), prompts()
    metric = Difference(RIGHT, WRONG)
    gaps = {}
    for method, steps in (("gradient", 1), ("integrated", 60)):
        table = patch(model, clean, corrupted, metric, layers=[0], method=method, steps=steps)
        total = (table.examples[:, 0] - table.corrupted[:, None]).sum(1)
        gaps[method] = np.abs(total - (table.clean - table.corrupted)).max()
    assert gaps["integrated"] < 0.2
    assert gaps["gradient"] > 0.5


def test_a_metric_without_gradient_is_refused():
    model, (clean, corrupted) = tiny.gpt2(), prompts()
    with pytest.raises(ValueError, match="no gradient"):
        patch(model, clean, corrupted, "accuracy", method="gradient")


# -- what is refused, and what is left behind ---------------------------------------------------


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"site": "scores"}, "site='scores'"),
        ({"direction": "back"}, "direction='back'"),
        ({"method": "guess"}, "method='guess'"),
        ({"positions": "some"}, "'together'"),
        ({"positions": [9]}, "outside of the 7 tokens"),
        ({"positions": []}, "no positions"),
        ({"positions": {"x": [1, 2]}}, "2 examples"),
        ({"layers": [4]}, "no residual in layer 4"),
        ({"stack": "encoder"}, "no stack"),
        ({"metric": "surprise"}, "no metric"),
        ({"method": "integrated", "steps": 0}, "steps=0"),
    ],
)
def test_what_cannot_be_done_is_said(more, told):
    clean, corrupted = prompts()
    given: dict[str, Any] = {"metric": "loss", **more}
    with pytest.raises(ValueError, match=told):
        patch(tiny.gpt2(), clean, corrupted, **given)


def test_prompts_that_do_not_fit_each_other():
    model, (clean, corrupted) = tiny.gpt2(), prompts()
    with pytest.raises(ValueError, match="example 1: input_ids is"):
        patch(model, clean, corrupted[:, 1:], "loss")
    with pytest.raises(ValueError, match="3 clean and 2 corrupted"):
        patch(model, clean, corrupted[1:], "loss")


def test_nothing_is_left_behind():
    model, (clean, corrupted) = tiny.llama(), prompts()
    model.train()
    with torch.no_grad():
        before = model(clean).logits
    for method in ("exact", "gradient"):
        patch(model, clean, corrupted, Difference(RIGHT, WRONG), "heads", method=method)
    with torch.no_grad():
        assert torch.equal(model(clean).logits, before)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_table():
    model, (clean, corrupted) = tiny.gpt2(), prompts()
    table = patch(model, clean, corrupted, Difference(RIGHT, WRONG))
    assert table.axes == {"layer": ("0", "1", "2"), "position": tuple(map(str, range(N)))}
    assert table.shape == (3, N)
    first, second = table.top(2)
    assert abs(first["effect"]) >= abs(second["effect"]) > 0
    assert first["value"] == pytest.approx(table.values[first["index"]])
    np.testing.assert_allclose(table.values, table.examples.mean(0))
    np.testing.assert_allclose(table.errors, table.examples.std(0, ddof=1) / 3**0.5)
    share = (table.values - table.corrupted.mean()) / (table.clean.mean() - table.corrupted.mean())
    np.testing.assert_allclose(table.normalised, share)
    assert "3 layers x 7 positions, 3 examples" in repr(table)
    assert len(table.frame()) == 21
    told = table.record()
    assert told["axes"]["layer"] == ["0", "1", "2"]
    assert np.array(told["examples"]).shape == (3, 3, N)
    with pytest.raises(ValueError, match="same places"):
        table.rank_correlation(patch(model, clean, corrupted, "loss", "mlp"))


def test_the_error_of_the_normalised_values_is_that_of_a_ratio_of_means():
    """Against the spread of the ratio over many draws of examples."""
    from headwise.instruments.patch_table import PatchTable

    random = np.random.default_rng(0)
    ratios, told = [], []
    for _ in range(400):
        low = random.normal(0, 0.3, 40)
        high = low + 3 + random.normal(0, 0.5, 40)
        middle = low + 0.4 * (high - low) + random.normal(0, 0.2, 40)
        table = PatchTable(middle[:, None], high, low, {"layer": ("0",)}, "mlp", "loss")
        ratios.append(table.normalised[0])
        told.append(table.normalised_errors[0])
    assert np.mean(told) == pytest.approx(np.std(ratios), rel=0.15)


def test_rank_correlation_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    from headwise.instruments.patch_table import rank_correlation

    random = np.random.default_rng(1)
    for _ in range(20):
        a, b = random.integers(0, 6, 15).astype(float), random.normal(size=15)
        assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b)[0], abs=1e-9)
