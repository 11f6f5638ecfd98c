"""The same models in TransformerLens 4: its attention patterns and head scores agree with ours.

It needs an environment of its own, see transformerlens/README.md beside this file. A bridge
changes the model it is given, so each library gets its own copy of the same weights. Native
models of TransformerLens share no line of code with transformers: their rotary embedding, grouped
heads and masks are other people's.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

transformer_lens = pytest.importorskip(
    "transformer_lens", reason="TransformerLens is absent: see tests/proof/transformerlens"
)

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformer_lens import TransformerBridge  # noqa: E402
from transformer_lens.config import TransformerBridgeConfig  # noqa: E402
from transformer_lens.head_detector import detect_head  # noqa: E402
from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from headwise.instruments import see  # noqa: E402
from headwise.models import observe, view  # noqa: E402
from tests.proof.induction_gpt2 import as_gpt2  # noqa: E402
from tests.proof.weights import loader  # noqa: E402

AGREES = 1e-4
VOCABULARY = 211


def sharpened(model: Any) -> Any:
    """Random weights large enough that the maps are far from even."""
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() == 2 and "emb" not in name and "wte" not in name:
                torch.nn.init.normal_(weights, std=1.5 * weights.shape[0] ** -0.5)
    return model.eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"n_positions": 192, "n_embd": 48, "n_layer": 3, "n_head": 4}
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return sharpened(GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **special)))


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=192,
        bos_token_id=0,
        eos_token_id=0,
    )
    return sharpened(LlamaForCausalLM(config))


RANDOM: dict[str, Callable[[], Any]] = {"gpt2": gpt2, "llama": llama}


def numerals(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer for which the token 17 is written "17"; 0 begins and ends a text."""
    ids = {"<0>": 0} | {str(n): n for n in range(1, size)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<0>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<0>", pad_token="<0>")


def bridge(model: Any) -> Any:
    """A copy of a Hugging Face model in TransformerLens. Nothing is fetched: the name is taken
    for its own sake only."""
    name = {"gpt2": "gpt2", "llama": "llama-local"}[model.config.model_type]
    words = numerals(model.config.vocab_size)
    return TransformerBridge.boot_transformers(
        name, hf_model=copy.deepcopy(model), tokenizer=words, device="cpu"
    )


@torch.no_grad()
def theirs(lens: Any, ids: Tensor) -> Tensor:
    """Patterns by TransformerLens `(layers, batch, heads, n, n)`."""
    _, cache = lens.run_with_cache(ids)
    return torch.stack([cache["pattern", layer] for layer in range(lens.cfg.n_layers)])


@torch.no_grad()
def ours(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """All rows of all maps `(layers, batch, heads, n, n)`, and their entropies."""
    rows: list[Tensor] = []
    entropy: list[Tensor] = []

    def read(reading: Any) -> None:
        rows.append(reading.map.rows(torch.arange(ids.shape[1])))
        entropy.append(reading.map.entropy())

    with observe(view(model), read=read):
        model(ids)
    return torch.stack(rows), torch.stack(entropy)


def check_patterns(model: Any, lens: Any, ids: Tensor) -> None:
    patterns = theirs(lens, ids)
    rows, entropy = ours(model, ids)
    assert rows.shape == patterns.shape
    worst = (rows - patterns).abs().max().item()
    expected = -torch.xlogy(patterns.double(), patterns.double()).sum(-1)
    off = (entropy - expected).abs().max().item()
    print(f"\nlargest difference: weights {worst:.1e}, entropies {off:.1e} nats")
    assert worst < AGREES
    assert off < AGREES
    assert (rows.roll(1, 2) - patterns).abs().max() > 0.3  # other heads would not agree


def random_ids(size: int, n: int, batch: int = 2) -> Tensor:
    """Behind the token 0, random ones that do not stand twice in a row."""
    generator = torch.Generator().manual_seed(1)
    steps = torch.randint(1, size - 1, (batch, n), generator=generator).cumsum(1)
    return torch.cat([torch.zeros(batch, 1, dtype=torch.long), 1 + steps % (size - 1)], 1)


@pytest.mark.parametrize("name", RANDOM)
def test_patterns_of_random_models_agree(name):
    model = RANDOM[name]()
    check_patterns(model, bridge(model), random_ids(VOCABULARY, 120))


def test_patterns_of_the_story_teller_agree(assets):
    model = LlamaForCausalLM.from_pretrained(assets / "stories260K" / "hf").eval()
    check_patterns(model, bridge(model), random_ids(512, 200))


@torch.no_grad()
def filled(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """A native model of TransformerLens with these weights; biases that are not given are 0."""
    lens = TransformerBridge.boot_native(TransformerBridgeConfig(**config))
    for name, parameter in lens.named_parameters():
        given = weights.pop(name.replace("._original_component", ""), None)
        parameter.zero_() if given is None else parameter.copy_(given)
    assert not weights, f"no place for {sorted(weights)}"
    return lens


def adjacent(weight: Tensor, heads: int) -> Tensor:
    """Rotary pairs side by side, where transformers keeps them half a head apart."""
    width = weight.shape[1]
    return weight.view(heads, 2, -1, width).transpose(1, 2).reshape(-1, width)


def native_llama(model: Any) -> Any:
    c = model.config
    given = dict(model.state_dict())
    named = {
        "tok_embed.weight": given["model.embed_tokens.weight"],
        "head.weight": given["lm_head.weight"],
        "ln_out.weight": given["model.norm.weight"],
    }
    parts = {
        "ln1": "input_layernorm",
        "ln2": "post_attention_layernorm",
        "attn.v": "self_attn.v_proj",
        "attn.o": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.in": "mlp.up_proj",
        "mlp.out": "mlp.down_proj",
    }
    for layer in range(c.num_hidden_layers):
        at, to = f"model.layers.{layer}", f"layers.{layer}"
        for target, source in parts.items():
            named[f"{to}.{target}.weight"] = given[f"{at}.{source}.weight"]
        for part, heads in (("q", c.num_attention_heads), ("k", c.num_key_value_heads)):
            weight = given[f"{at}.self_attn.{part}_proj.weight"]
            named[f"{to}.attn.{part}.weight"] = adjacent(weight, heads)
    config = {
        "d_model": c.hidden_size,
        "d_head": c.head_dim,
        "n_layers": c.num_hidden_layers,
        "n_ctx": c.max_position_embeddings,
        "n_heads": c.num_attention_heads,
        "n_key_value_heads": c.num_key_value_heads,
        "d_vocab": c.vocab_size,
        "d_mlp": c.intermediate_size,
        "gated_mlp": True,
        "act_fn": "silu",
        "normalization_type": "RMS",
        "eps": c.rms_norm_eps,
        "positional_embedding_type": "rotary",
        "rotary_dim": c.head_dim,
        "rotary_base": 10000,
    }
    return filled(config, named)


def test_patterns_of_a_native_llama_agree():
    model = llama()
    check_patterns(model, native_llama(model), random_ids(VOCABULARY, 120))


def test_patterns_of_the_story_teller_as_a_native_model_agree(assets):
    model = LlamaForCausalLM.from_pretrained(assets / "stories260K" / "hf").eval()
    check_patterns(model, native_llama(model), random_ids(512, 200))


@pytest.mark.parametrize("name", ["clean", "trained"])
def test_patterns_of_native_induction_models_agree(assets, name):
    source = loader(assets / "induction_head_2l" / "load_induction.py")
    weights = source.load(name)
    named = {
        "tok_embed.weight": weights["embed.W_E"],
        "pos.weight": weights["pos_embed.W_pos"],
        "head.weight": weights["unembed.W_U"].T,
    }
    for layer in range(2):
        for part in "QKV":
            of = f"blocks.{layer}.attn."
            named[f"layers.{layer}.attn.{part.lower()}.weight"] = weights[f"{of}W_{part}"][0].T
            named[f"layers.{layer}.attn.{part.lower()}.bias"] = weights[f"{of}b_{part}"][0]
        named[f"layers.{layer}.attn.o.weight"] = weights[f"{of}W_O"][0].T
        named[f"layers.{layer}.attn.o.bias"] = weights[f"{of}b_O"]
    config = {"d_model": 64, "d_head": 64, "n_layers": 2, "n_ctx": 8, "n_heads": 1, "d_vocab": 26}
    plain = {"attn_only": True, "normalization_type": None, "positional_embedding_type": "standard"}
    lens = filled(config | plain, named)
    ids, _, places = source.batch(500)
    patterns = theirs(lens, ids)
    rows, _ = ours(as_gpt2(weights), ids)
    assert (rows - patterns).abs().max() < AGREES
    after_match = patterns[1, torch.arange(500), 0, -1, places].mean().item()
    assert after_match == pytest.approx({"clean": 0.915, "trained": 0.893}[name], abs=0.02)


# -- scores ------------------------------------------------------------------------------------


@pytest.fixture(params=["gpt2", "llama", "stories"])
def model(request) -> Any:
    if request.param in RANDOM:
        return RANDOM[request.param]()
    folder = request.getfixturevalue("assets") / "stories260K" / "hf"
    made = LlamaForCausalLM.from_pretrained(folder).eval()
    made.config.bos_token_id = made.config.eos_token_id = 0
    return made


def table(atlas: Any, column: str, model: Any) -> Tensor:
    layers = model.config.num_hidden_layers
    return torch.from_numpy(atlas.heads[column]).float().view(layers, -1)


def test_scores_on_a_text_agree_with_their_head_detector(model):
    """Their score is the share of all mass that lies where the pattern says, ours the mean of
    the rows' masses there: the same number. (They count attending to oneself as induction where
    a token stands twice in a row; here none does.)"""
    ids = random_ids(40, 100, batch=1)  # few words, so that they come again
    lens = bridge(model)
    text = " ".join(str(i) for i in ids[0, 1:].tolist())
    assert torch.equal(lens.to_tokens(text), ids)
    atlas = see(model, ids)
    for column, pattern in {
        "previous_mass": "previous_token_head",
        "same_token": "duplicate_token_head",
        "induction_text": "induction_head",
    }.items():
        expected = detect_head(lens, text, pattern)
        found = table(atlas, column, model)
        print(f"\n{column}: largest difference {(found - expected).abs().max():.1e}")
        assert expected.max() > 0.02
        assert (found - expected).abs().max() < AGREES, column


def test_scores_on_repeated_random_tokens_agree_with_their_formula(model):
    """TransformerLens' demos average a diagonal of the pattern on random tokens that stand twice:
    offset 1 - period for induction, -1 for the previous token, -period for the same token. Ours
    is the mean over the second time."""
    seen: list[Tensor] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"]), with_kwargs=True
    )
    atlas = see(model, random_ids(40, 100, batch=1), instruments=["repeats"])
    hook.remove()
    (repeated,) = seen
    period = repeated.shape[1] // 2
    start = repeated.shape[1] - 2 * period
    assert torch.equal(repeated[:, start : start + period], repeated[:, start + period :])
    patterns = theirs(bridge(model), repeated)
    for column, offset in {
        "induction_score": 1 - period,
        "previous_token_score": -1,
        "duplicate_token_score": -period,
    }.items():
        stripe = patterns.diagonal(offset, -2, -1)[..., -period:]
        expected = stripe.mean((1, -1))
        found = table(atlas, column, model)
        print(f"\n{column}: largest difference {(found - expected).abs().max():.1e}")
        assert (found - expected).abs().max() < AGREES, column


def test_the_induction_head_of_the_clean_model_is_found_by_both(assets):
    """Three letters that stand twice, the most that a context of eight letters holds twice."""
    source = loader(assets / "induction_head_2l" / "load_induction.py")
    weights = source.load("clean")
    model = as_gpt2(weights)
    atlas = see(model, torch.arange(8)[None], instruments=["repeats"])
    assert atlas.heads["previous_token_score"][0] > 0.99
    assert atlas.heads["induction_score"][1] > 5 * atlas.heads["induction_score"][0]
