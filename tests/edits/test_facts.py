"""Facts written into small models: the algebra against slow twins, and every kind of model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.edits import (
    Fact,
    LowRank,
    ValueSearch,
    collect_key_statistics,
    edit_fact,
    edit_facts,
    patches_in,
)
from headwise.edits.fact_prompts import read_wording, rows_of, target_logs
from headwise.edits.pmet import ridge_update, shares
from headwise.edits.rank_one import rank_one_update
from headwise.edits.target_values import read_keys
from headwise.models import view
from headwise.models.backbones import Decoder
from headwise.models.projections import features_first
from headwise.models.spots import down_projection
from headwise.parts import Attention, Mlp
from tests.instruments import tiny

LINES = torch.randint(1, 20, (12, 30), generator=torch.Generator().manual_seed(1))
"""Token ids to collect statistics on."""


def decoder() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(
        20, 16, 2, mixer=lambda i: Attention(16, 2, causal=True), feed=lambda i: Mlp(16, 24)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.4)
    return model.eval()


def model_of(name: str) -> Any:
    return decoder() if name == "decoder" else getattr(tiny, name)()


def logits(model: Any, ids: Tensor) -> Tensor:
    out = model(input_ids=ids)
    found: Tensor = getattr(out, "logits", out)
    return found.detach()


def numbers(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_rank_one_is_the_solution_of_the_constrained_least_squares() -> None:
    """min ||(W' - W) K||_F subject to W' k = v, by its optimality conditions, solved whole."""
    g = torch.Generator().manual_seed(0)
    width, hidden, many = 5, 7, 40
    weight = torch.randn(width, hidden, generator=g).double()
    keys = torch.randn(hidden, many, generator=g).double()
    key, value = (torch.randn(n, generator=g).double() for n in (hidden, width))
    moment = keys @ keys.T / many
    out, into = rank_one_update(key, value - weight @ key, torch.linalg.solve(moment, key))
    new = weight + out @ into
    # unknowns: the rows of D = W' - W, and one multiplier a row; D (K K^T) = l k^T, D k = v - W k
    for row in range(width):
        system = torch.zeros(hidden + 1, hidden + 1, dtype=torch.float64)
        system[:hidden, :hidden] = keys @ keys.T
        system[:hidden, hidden] = -key
        system[hidden, :hidden] = key
        right = torch.zeros(hidden + 1, dtype=torch.float64)
        right[hidden] = value[row] - weight[row] @ key
        wanted = torch.linalg.solve(system, right)[:hidden]
        torch.testing.assert_close((new - weight)[row], wanted)
    torch.testing.assert_close(new @ key, value)
    assert torch.linalg.matrix_rank(new - weight) == 1
    with pytest.raises(ValueError, match="more than 0"):
        rank_one_update(torch.zeros(3), value[:2], torch.zeros(3))


@pytest.mark.parametrize("weight", [0.0, 0.3, 20.0])
def test_ridge_update_is_least_squares_over_stacked_rows(weight: float) -> None:
    g = torch.Generator().manual_seed(0)
    width, hidden, facts, many = 4, 9, 3, 50
    keys = torch.randn(hidden, facts, generator=g).double()
    usual = torch.randn(hidden, many, generator=g).double()
    missing = torch.randn(width, facts, generator=g).double()
    moment = usual @ usual.T / many
    out, into = ridge_update(missing, keys, moment, weight)
    # min ||D K - R||^2 + weight/many ||D usual||^2: one least squares with more rows
    rows = torch.cat([keys.T, (weight / many) ** 0.5 * usual.T])
    right = torch.cat([missing.T, torch.zeros(many, width, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(rows, right, driver="gelsd").solution.T
    torch.testing.assert_close(out @ into, wanted, rtol=1e-6, atol=1e-8)
    if weight == 0:
        torch.testing.assert_close(out @ into @ keys, missing)
    with pytest.raises(ValueError, match="weight"):
        ridge_update(missing, keys, moment, -1.0)


def test_shares() -> None:
    assert shares(3) == pytest.approx([3**0.5, 2**0.5, 1.0])
    assert shares(3, root=False) == [3.0, 2.0, 1.0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "decoder"])
def test_keys_are_what_the_projection_reads(name: str) -> None:
    model = model_of(name)
    look = view(model)
    lines = [read_wording(LINES[i, : 4 + i], 2, None) for i in range(3)]
    rows = rows_of(lines)
    keys, outputs = read_keys(look, look.layers[1], rows)
    module = down_projection(look.layers[1])
    table, bias = features_first(module).detach(), module.bias
    slow = keys @ table.T + (bias if bias is not None else 0.0)
    torch.testing.assert_close(outputs, slow.detach(), rtol=1e-4, atol=1e-5)
    for i, line in enumerate(lines):  # filling up on the right changes nothing
        alone, _ = read_keys(look, look.layers[1], rows_of([line]))
        torch.testing.assert_close(keys[i], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "decoder"])
def test_statistics_are_the_mean_outer_product(name: str, tmp_path: Any) -> None:
    model = model_of(name)
    look = view(model)
    found = collect_key_statistics(model, LINES, [0, 1])
    assert found.tokens == LINES.numel()
    for layer in (0, 1):
        slow: Any = 0.0
        count = 0
        for line in LINES:
            for at in range(len(line)):
                key = read_keys(look, look.layers[layer], rows_of([read_wording(line, at, None)]))
                slow = slow + torch.outer(key[0][0].double(), key[0][0].double())
                count += 1
            if count >= 60:
                break
        part = collect_key_statistics(model, LINES[: count // 30], layer)
        torch.testing.assert_close(part.moment(layer), slow / count, rtol=1e-4, atol=1e-6)
    found.save(tmp_path / "c")
    again = type(found).load(tmp_path / "c")
    torch.testing.assert_close(again.moment(1), found.moment(1), rtol=1e-6, atol=1e-7)
    assert again.record == found.record
    assert again.tokens == found.tokens
    again.check(model)
    with pytest.raises(ValueError, match="no statistics of layer 5"):
        again.moment(5)


def test_a_singular_moment_gets_a_ridge() -> None:
    few = collect_key_statistics(tiny.llama(), LINES[:1, :7], 0)
    assert few.ridge(0) > 0
    many = collect_key_statistics(tiny.llama(), LINES, 0)
    assert many.ridge(0) == 0
    key = torch.randn(48)
    torch.testing.assert_close(many.moment(0) @ many.solve(0, key), key.double())
    assert few.solve(0, key).isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "decoder"])
def test_rome_makes_the_layer_say_the_value_and_the_model_the_target(name: str) -> None:
    model = model_of(name)
    before, ids = numbers(model), LINES[0, :6]
    plain = logits(model, ids[None])
    target = int(plain[0, -1].topk(4).indices[-1])
    patch = edit_fact(model, ids, 5, target, layers=0, statistics=LINES)
    (delta,) = patch.deltas.values()
    assert isinstance(delta, LowRank)
    assert delta.rank == 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert patches_in(model) == []
    assert all(p.requires_grad for p in model.parameters())
    look = view(model)
    with patch:
        told = patch.record["values"][0]
        _, now = read_keys(look, look.layers[0], rows_of([read_wording(ids, 5, None)]))
        after = logits(model, ids[None])
        loss = -float(after[0, -1].log_softmax(-1)[target])
    # the layer says the value exactly; the other tokens' keys are moved a little, too
    assert loss == pytest.approx(told["loss_after"], abs=0.1)
    assert told["loss_after"] < 0.5 * told["loss_before"]
    assert torch.equal(logits(model, ids[None]), plain)
    # what was searched and what the layer now says: the same change
    _, then = read_keys(look, look.layers[0], rows_of([read_wording(ids, 5, None)]))
    change = float((now - then).norm() / then.norm())
    assert change == pytest.approx(told["relative_change"], rel=1e-3)


def test_target_of_several_tokens_and_prefixes() -> None:
    model = tiny.llama()
    ids, target = LINES[0, :6], torch.tensor([7, 3])
    prefixes = [LINES[3, :3], LINES[4, :5]]
    patch = edit_fact(
        model, ids, (4, 6), target, layers=0, statistics=LINES, prefixes=prefixes,
        search=ValueSearch(steps=40),
    )  # fmt: skip
    lines = [read_wording(ids, (4, 6), None, one) for one in ["", *prefixes]]
    rows = rows_of(lines, target)
    slow = 0.0
    with patch:
        told = target_logs(logits(model, rows.inputs), rows, target)
        for line in lines:
            whole = torch.cat([line.ids, target])
            logs = logits(model, whole[None])[0].log_softmax(-1)
            slow += sum(float(logs[len(line.ids) - 1 + i, target[i]]) for i in range(2)) / 2
    assert float(told.mean()) == pytest.approx(slow / 3, abs=1e-4)
    assert patch.record["prefixes"] == [one.tolist() for one in prefixes]


@pytest.mark.parametrize("name", ["llama", "gpt2", "decoder"])
def test_pmet_changes_feed_forward_matrices_only(name: str) -> None:
    model = model_of(name)
    before, ids = numbers(model), LINES[0, :6]
    target = int(logits(model, ids[None])[0, -1].topk(4).indices[-1])
    patch = edit_fact(
        model, ids, 5, target, method="pmet", layers=[0, 1], statistics=LINES, weight=0.01
    )
    look = view(model)
    names = {id(p): n for n, p in model.named_parameters()}
    wanted = {names[id(down_projection(layer).weight)] for layer in look.layers}
    assert set(patch.deltas) == wanted
    with patch:
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        now = -float(logits(model, ids[None])[0, -1].log_softmax(-1)[target])
    assert wanted <= changed
    assert changed == wanted
    assert now < patch.record["values"][0]["loss_before"]


def test_pmet_in_one_layer_with_weight_zero_answers_every_key() -> None:
    model = decoder()
    look = view(model)
    facts = [Fact(LINES[i, :5], 4, int(LINES[i, 7])) for i in range(3)]
    patch = edit_facts(model, facts, method="pmet", layers=1, statistics="identity", weight=0.0)
    rows = [rows_of([read_wording(f.prompt, 4, None)]) for f in facts]  # type: ignore[arg-type]
    plain = [read_keys(look, look.layers[1], one)[1][0] for one in rows]
    with patch:
        said = [read_keys(look, look.layers[1], one)[1][0] for one in rows]
    for was, now, told in zip(plain, said, patch.record["values"], strict=True):
        change = float((now - was).norm() / was.norm())
        assert change == pytest.approx(told["relative_change"], rel=1e-3)


def test_several_facts_with_rome() -> None:
    model = decoder()
    facts = [Fact(LINES[i, :5], 4, int(LINES[i, 7])) for i in range(3)]
    patch = edit_facts(model, facts, layers=0, statistics=LINES, search=ValueSearch(steps=60))
    (delta,) = patch.deltas.values()
    assert isinstance(delta, LowRank)
    assert delta.rank == 3
    last = facts[-1]
    with patch:
        told = logits(model, torch.as_tensor(last.prompt)[None])[0, -1].log_softmax(-1)
    # the last one was written upon the others
    assert -float(told[int(last.target)]) == pytest.approx(  # type: ignore[arg-type]
        patch.record["values"][-1]["loss_after"], abs=0.2
    )


def test_the_same_seed_gives_the_same_patch() -> None:
    made = [edit_fact(tiny.llama(), LINES[0, :6], 5, 3, statistics=LINES, seed=4) for _ in range(2)]
    a, b = (next(iter(one.deltas.values())) for one in made)
    assert torch.equal(
        a.whole(torch.device("cpu"), torch.float32), b.whole(torch.device("cpu"), torch.float32)
    )
    assert len(made[0].record["traced"]) == 2


def test_what_cannot_be_done_is_said() -> None:
    model, ids = tiny.llama(), LINES[0, :6]
    with pytest.raises(ValueError, match="statistics= is needed"):
        edit_fact(model, ids, 5, 3, layers=0)
    with pytest.raises(ValueError, match="method='memit'"):
        edit_fact(model, ids, 5, 3, method="memit", statistics=LINES)
    with pytest.raises(ValueError, match="layers 0 to 1"):
        edit_fact(model, ids, 5, 3, layers=9, statistics=LINES)
    with pytest.raises(ValueError, match="one layer"):
        edit_fact(model, ids, 5, 3, layers=[0, 1], statistics=LINES)
    with pytest.raises(ValueError, match="outside of a prompt of 6 tokens"):
        edit_fact(model, ids, 6, 3, layers=0, statistics=LINES)
    with pytest.raises(ValueError, match="without a tokenizer"):
        edit_fact(model, "Rome is in", "Rome", "France", layers=0, statistics=LINES)
    with pytest.raises(ValueError, match="empty"):
        edit_fact(model, ids, 5, [], layers=0, statistics=LINES)
    with pytest.raises(ValueError, match="looks back only"):
        edit_fact(tiny.bert(), ids, 5, 3, layers=0, statistics=LINES)
    other = collect_key_statistics(decoder(), LINES, 0)
    with pytest.raises(ValueError, match="key statistics are of"):
        edit_fact(model, ids, 5, 3, layers=0, statistics=other)
    with pytest.raises(ValueError, match="last projection"):
        edit_fact(tiny.gpt_oss(), ids, 5, 3, layers=0, statistics=LINES)
    with pytest.raises(ValueError, match="no facts"):
        edit_facts(model, [], statistics=LINES)
