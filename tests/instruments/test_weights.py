"""Scores from the weights against eigenvalues of the vocabulary by vocabulary matrices."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headwise.instruments import weights as module
from headwise.instruments.weights import Weights, weight_scores


@dataclass(eq=False)
class Attention:
    """What the scores need of an AttentionView, filled with random numbers."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 3
    value_dim: int = 3
    width: int = 10
    norm: nn.Module | None = None
    stack: str = "decoder"
    kind: str = "self"
    seed: int = 0
    module: Any = field(default_factory=nn.Identity)
    projections: Any = "none"

    def __post_init__(self) -> None:
        make = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make, dtype=torch.float64)

        self.q = random(self.heads, self.head_dim, self.width)
        self.k = random(self.kv_heads, self.head_dim, self.width)
        self.v = random(self.kv_heads, self.value_dim, self.width)
        self.o = random(self.heads, self.width, self.value_dim)

    def query_weight(self) -> Tensor:
        return self.q

    def key_weight(self) -> Tensor:
        return self.k

    def value_weight(self) -> Tensor:
        return self.v

    def output_weight(self) -> Tensor:
        return self.o


def a_view(*attentions: Any, vocab: int = 23, tied: bool = False, **parts: Any) -> Any:
    width = attentions[0].width
    make = torch.Generator().manual_seed(99)
    embedding = torch.randn(vocab, width, generator=make, dtype=torch.float64)
    other = torch.randn(vocab, width, generator=make, dtype=torch.float64)
    known: dict[str, Any] = {
        "model": nn.Identity(),
        "attentions": attentions,
        "layers": (),
        "width": width,
        "causal": True,
        "stacks": ("decoder",),
        "owners": {},
        "final_norm": None,
        "embedding": embedding,
        "unembedding": embedding if tied else other,
    }
    return SimpleNamespace(**(known | parts))


def ratio(matrix: Tensor) -> float:
    """sum(lambda) / sum(|lambda|) of the whole matrix, the slow and obvious way."""
    values = np.linalg.eigvals(matrix.detach().double().numpy())
    return float((values.sum() / np.abs(values).sum()).real)


def circuits(
    e: Tensor,
    u: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    before: Tensor,
    after: Tensor,
    final: Tensor,
) -> tuple[float, float, float]:
    """Copying, matching and norm of one head; `before`, `after`, `final` are the norms' matrices.

    q, k, v: (d, width); o: (width, d).
    """  # fmt: skip
    write = after @ o @ v @ before
    copying = ratio(u @ final @ write @ e.T)
    matching = ratio(e @ before.T @ q.T @ k @ before @ e.T)
    return copying, matching, float(torch.linalg.matrix_norm(write))


def norm_matrix(gain: Tensor, centred: bool) -> Tensor:
    size = len(gain)
    centre = torch.eye(size).double() - (1.0 / size if centred else 0.0)
    return torch.diag(gain.detach().double()) @ centre


def assert_scores(found: dict[str, Any], row: int, expected: tuple[float, float, float]) -> None:
    names = ("ov_copying", "qk_matching", "output_norm")
    got = [float(found[name][row]) for name in names]
    assert got == pytest.approx(expected, abs=2e-5, rel=2e-5)


@pytest.mark.parametrize("shape", [
    {}, {"kv_heads": 1}, {"kv_heads": 4}, {"value_dim": 5}, {"head_dim": 1, "value_dim": 1},
    {"head_dim": 10, "value_dim": 12},
])  # fmt: skip
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_against_the_whole_matrices(shape: dict[str, int], norms: bool, tied: bool) -> None:
    before, final = nn.LayerNorm(10).double(), nn.RMSNorm(10).double()
    torch.manual_seed(1)
    for p in (*before.parameters(), *final.parameters()):
        nn.init.normal_(p)
    a = Attention(**shape, norm=before if norms else None)  # type: ignore[arg-type]
    view = a_view(a, tied=tied, final_norm=final if norms else None)
    found, reasons = weight_scores(view, torch.float64)
    assert reasons == []
    eye = torch.eye(10).double()
    fold = norm_matrix(before.weight, True) if norms else eye
    last = norm_matrix(final.weight, False) if norms else eye
    for h in range(a.heads):
        g = h // (a.heads // a.kv_heads)
        expected = circuits(view.embedding, view.unembedding, a.q[h], a.k[g], a.v[g], a.o[h],
                            fold, eye, last)  # fmt: skip
        assert_scores(found, h, expected)


def test_single_precision_is_enough() -> None:
    view = a_view(Attention(heads=8, kv_heads=4, width=64, head_dim=8, value_dim=8), vocab=500)
    exact, _ = weight_scores(view, torch.float64)
    single, _ = weight_scores(view)
    for name, values in exact.items():
        np.testing.assert_allclose(single[name], values, atol=1e-4, rtol=1e-4)


def test_a_copying_head_copies() -> None:
    a = Attention(heads=3, kv_heads=3)
    a.o = a.v.mT.clone()  # W_O W_V = W_V^T W_V: what comes in goes out
    a.o[1] *= -1  # and here with the sign turned
    a.o[2] = a.o[2] @ torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 0]]).double()  # a rotation
    a.k = a.q.clone()
    a.k[1] *= -3
    found, _ = weight_scores(a_view(a, tied=True), torch.float64)
    assert found["ov_copying"][:2] == pytest.approx([1, -1])
    assert abs(found["ov_copying"][2]) < 0.5
    assert found["qk_matching"] == pytest.approx([1, -1, 1])


def test_a_head_of_zeros_has_no_score() -> None:
    a = Attention()
    a.o[1] = 0
    found, _ = weight_scores(a_view(a))
    assert np.isnan(found["ov_copying"]).tolist() == [False, True, False, False]
    assert found["output_norm"][1] == 0
    assert not np.isnan(found["qk_matching"]).any()


def test_gram_matrices_are_formed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    attentions = [Attention(seed=seed) for seed in range(3)]
    tied, untied = (Weights(a_view(*attentions, tied=tied)) for tied in (True, False))
    assert len(tied._grams) == 1
    assert len(untied._grams) == 2
    whole, _ = weight_scores(a_view(*attentions))
    monkeypatch.setattr(module, "_ROWS", 5)
    pieces, _ = weight_scores(a_view(*attentions))
    for name in whole:
        np.testing.assert_allclose(pieces[name], whole[name], rtol=1e-4, atol=1e-5)
        assert len(whole[name]) == 12


@pytest.mark.parametrize(
    ("parts", "missing", "words"),
    [
        ({"embedding": None}, {"ov_copying", "qk_matching"}, "no embedding of tokens"),
        ({"unembedding": None}, {"ov_copying"}, "Identity has no unembedding"),
        ({"causal": False}, {"ov_copying"}, "transforms the residual before it unembeds"),
        ({"final_norm": nn.ReLU()}, {"ov_copying"}, "ReLU is no norm"),
        (
            {"unembedding": torch.zeros(7, 10)},
            {"ov_copying"},
            "embedding (23, 10) and unembedding (7, 10) are not of the same tokens",
        ),
    ],
)
def test_what_cannot_be_said_is_nan_with_a_reason(
    parts: dict[str, Any], missing: set[str], words: str
) -> None:
    found, reasons = weight_scores(a_view(Attention(), **parts))
    assert {name for name, values in found.items() if np.isnan(values).all()} == missing
    assert {name for name, values in found.items() if np.isnan(values).any()} == missing
    assert any(words in reason for reason in reasons), reasons
    assert all(any(name in reason for reason in reasons) for name in missing)


def test_an_unknown_norm_before_leaves_nothing() -> None:
    found, reasons = weight_scores(a_view(Attention(norm=nn.ReLU()), Attention(seed=1)))
    assert all(np.isnan(values[:4]).all() for values in found.values())
    assert not any(np.isnan(values[4:]).any() for values in found.values())
    assert reasons == ["weights: ReLU is no norm or scaling whose gain could be folded into the "
                       "weights"]  # fmt: skip


def test_trained_weights_against_the_whole_matrices(assets: Path) -> None:
    """A Llama of 260K parameters with 512 tokens: small enough for 512 x 512 eigenvalues."""
    transformers = pytest.importorskip("transformers")
    from headwise.models import view

    model = transformers.AutoModelForCausalLM.from_pretrained(assets / "stories260K" / "hf")
    found, reasons = weight_scores(view(model))
    assert reasons == []
    base = model.model
    e, u = (t.weight.detach().double() for t in (base.embed_tokens, model.lm_head))
    eye, final = torch.eye(e.shape[1]).double(), torch.diag(base.norm.weight.detach().double())
    for row in (0, 13, 39):
        layer, h = base.layers[row // 8], row % 8
        att = layer.self_attn
        q = by_head(att.q_proj.weight, 8)[h]
        k, v = (by_head(p.weight, 4)[h // 2] for p in (att.k_proj, att.v_proj))
        o = att.o_proj.weight.detach().double()[:, h * 8 : h * 8 + 8]
        before = torch.diag(layer.input_layernorm.weight.detach().double())
        assert_scores(found, row, circuits(e, u, q, k, v, o, before, eye, final))


# real architectures, built small and random


def tiny(config: str, model: str, **settings: Any) -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    from headwise.models import view

    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():  # norms start at one, which would hide a gain left out
        for name, parameter in built.named_parameters():
            if parameter.dim() == 1 or "embed" in name or "lm_head" in name:
                parameter.normal_()
    return built, view(built)


LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "pad_token_id": 0,
}  # fmt: skip


def by_head(weight: Tensor, heads: int) -> Tensor:
    return weight.detach().double().unflatten(0, (heads, -1))


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "Gemma3Text", "Olmo2"])
def test_llama_like_models(family: str) -> None:
    name = "Gemma3ForCausalLM" if family == "Gemma3Text" else f"{family}ForCausalLM"
    model, view = tiny(f"{family}Config", name, **LLAMA_LIKE)
    found, reasons = weight_scores(view, torch.float64)
    assert reasons == []
    base: Any = model.model
    e = base.embed_tokens.weight.detach().double()
    u = model.lm_head.weight.detach().double()  # type: ignore[union-attr,operator]
    shift = 1.0 if family.startswith("Gemma") else 0.0
    eye = torch.eye(24).double()

    def gain(norm: Any) -> Tensor:
        return norm.weight.detach().double() + shift

    row = 0
    for layer in base.layers:
        att = layer.self_attn
        q, k, v = (
            by_head(getattr(att, f"{n}_proj").weight, h)
            for n, h in zip("qkv", (4, 2, 2), strict=True)
        )
        o = att.o_proj.weight.detach().double().unflatten(1, (4, 6)).permute(1, 0, 2)
        if hasattr(att, "q_norm"):
            gq, gk = gain(att.q_norm), gain(att.k_norm)
            q = q * (gq.view(4, 6, 1) if len(gq) == 24 else gq[:, None])
            k = k * (gk.view(2, 6, 1) if len(gk) == 12 else gk[:, None])
        before = torch.diag(gain(layer.input_layernorm)) if family != "Olmo2" else eye
        behind = family.startswith(("Gemma", "Olmo"))
        after = torch.diag(gain(layer.post_attention_layernorm)) if behind else eye
        for h in range(4):
            expected = circuits(e, u, q[h], k[h // 2], v[h // 2], o[h], before, after,
                                torch.diag(gain(base.norm)))  # fmt: skip
            assert_scores(found, row, expected)
            row += 1
    assert row == len(found["ov_copying"]) == 8


def test_gpt2() -> None:
    model, view = tiny("GPT2Config", "GPT2LMHeadModel", vocab_size=29, n_positions=16, n_embd=20,
                       n_layer=2, n_head=5)  # fmt: skip
    found, reasons = weight_scores(view, torch.float64)
    assert reasons == []
    base: Any = model.transformer
    e = base.wte.weight.detach().double()
    assert base.wte.weight is model.lm_head.weight  # type: ignore[union-attr]
    final = norm_matrix(base.ln_f.weight, True)
    for index, block in enumerate(base.h):
        q, k, v = (by_head(part.T, 5) for part in block.attn.c_attn.weight.split(20, dim=1))
        o = block.attn.c_proj.weight.detach().double().unflatten(0, (5, 4)).mT
        before = norm_matrix(block.ln_1.weight, True)
        for h in range(5):
            expected = circuits(e, e, q[h], k[h], v[h], o[h], before, torch.eye(20).double(),
                                final)  # fmt: skip
            assert_scores(found, index * 5 + h, expected)


def test_t5_in_both_stacks() -> None:
    model, view = tiny(
        "T5Config",
        "T5ForConditionalGeneration",
        vocab_size=27,
        d_model=16,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=4,
    )
    found, reasons = weight_scores(view, torch.float64)
    where = [(a.stack, a.kind) for a in view.attentions for _ in range(a.heads)]
    copying = {place for place, value in zip(where, found["ov_copying"], strict=True)
               if not np.isnan(value)}  # fmt: skip
    matching = {place for place, value in zip(where, found["qk_matching"], strict=True)
                if not np.isnan(value)}  # fmt: skip
    assert copying == {("decoder", "self")}
    assert matching == {("decoder", "self"), ("encoder", "self")}
    assert (found["output_norm"] > 0).all()
    assert any("cross-attention" in reason for reason in reasons)
    assert any("stack encoder" in reason for reason in reasons)
    block: Any = model.encoder.block[0].layer[0]  # type: ignore[union-attr,index]
    q, k = (by_head(getattr(block.SelfAttention, n).weight, 4) for n in "qk")
    e = model.shared.weight.detach().double()  # type: ignore[union-attr,operator]
    before = torch.diag(block.layer_norm.weight.detach().double())
    first = where.index(("encoder", "self"))
    expected = ratio(e @ before @ q[0].T @ k[0] @ before @ e.T)
    assert found["qk_matching"][first] == pytest.approx(expected, abs=1e-5)


def test_cross_attention_does_not_take_the_decoders_norm() -> None:
    _, view = tiny(
        "T5Config",
        "T5ForConditionalGeneration",
        vocab_size=27,
        d_model=16,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=4,
    )
    found, _ = weight_scores(view, torch.float64)
    row = 0
    for a in view.attentions:
        if a.kind == "cross":
            product = a.output_weight().double() @ a.value_weight().double()
            expected = torch.linalg.matrix_norm(product).tolist()
            assert found["output_norm"][row : row + a.heads].tolist() == pytest.approx(expected)
            return
        row += a.heads
    raise AssertionError("no cross-attention was found")


def test_bert_has_no_copying_score() -> None:
    _, view = tiny(
        "BertConfig",
        "BertForMaskedLM",
        vocab_size=27,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=8,
    )
    found, reasons = weight_scores(view)
    assert np.isnan(found["ov_copying"]).all()
    assert not np.isnan(found["qk_matching"]).any()
    assert any("BertForMaskedLM transforms the residual" in reason for reason in reasons)


def test_vision_has_only_norms() -> None:
    _, view = tiny(
        "ViTConfig",
        "ViTModel",
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
    )
    found, reasons = weight_scores(view)
    assert np.isnan(found["ov_copying"]).all()
    assert np.isnan(found["qk_matching"]).all()
    assert (found["output_norm"] > 0).all()
    assert any("no embedding of tokens" in reason for reason in reasons)


def test_whisper_encoder_hears_no_tokens() -> None:
    _, view = tiny(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        vocab_size=27,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=10,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    found, _ = weight_scores(view)
    for name in ("ov_copying", "qk_matching"):
        measured = [(a.stack, a.kind) for a, v in zip(
            [a for a in view.attentions for _ in range(a.heads)], found[name], strict=True
        ) if not np.isnan(v)]  # fmt: skip
        assert set(measured) == {("decoder", "self")}, name
