"""Small random models whose maps are far from even, and these maps by their own eager code."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from headwise.instruments.batch import Batch
from headwise.instruments.inputs import read_inputs
from headwise.instruments.instrument import Instrument
from headwise.instruments.partial import Result
from headwise.instruments.run import Run
from headwise.instruments.stimuli import Stimuli
from headwise.instruments.tokens import Tokens
from headwise.models import view

VOCABULARY = 60
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def _sharp(model: Any) -> Any:
    """Weights large enough that rows prefer some keys by far."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.5 if "emb" in name or "wte" in name else 0.3)
    return model.eval()


def llama(**more: Any) -> LlamaForCausalLM:
    config = LlamaConfig(**{**SIZE, "num_key_value_heads": 2, "bos_token_id": 0, **more})
    return _sharp(LlamaForCausalLM(config))


def mistral(window: int = 9) -> MistralForCausalLM:
    return _sharp(
        MistralForCausalLM(MistralConfig(**SIZE, num_key_value_heads=2, sliding_window=window))
    )


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512)
    return _sharp(GPT2LMHeadModel(config))


def add_sink(model: Any, position: int, strength: float = 4.0) -> None:
    """Make every head of a GPT-2's first layer look at one position: the last feature stands
    for it, all keys say that feature, and all queries ask for it."""
    attention, width = model.transformer.h[0].attn.c_attn, model.config.n_embd
    with torch.no_grad():
        model.transformer.wte.weight[:, -1] = 0
        model.transformer.wpe.weight[:, -1] = 0
        model.transformer.wpe.weight[position] = 0
        model.transformer.wpe.weight[position, -1] = 30
        attention.weight[-1, width : 2 * width] = 1
        attention.bias[:width] += strength


def gpt_oss() -> GptOssForCausalLM:
    config = GptOssConfig(
        **{**SIZE, "intermediate_size": 16},
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention", "full_attention"],
    )
    return _sharp(GptOssForCausalLM(config))


def bert() -> BertForMaskedLM:
    return _sharp(BertForMaskedLM(BertConfig(**SIZE)))


def bart() -> BartForConditionalGeneration:
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=128,
    )
    return _sharp(BartForConditionalGeneration(config))


def vit() -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
    )
    return _sharp(ViTForImageClassification(config))


def ids(n: int, seed: int = 0, batch: int = 1) -> Tensor:
    """Tokens with repetitions, frequent and rare ones."""
    random = torch.Generator().manual_seed(seed)
    even = torch.rand((batch, n), generator=random)
    return 3 + (even**3 * (VOCABULARY - 3)).long()


def maps(model: Any, inputs: dict[str, Tensor], which: str = "attentions") -> list[np.ndarray]:
    """Every layer's attention weights `(batch, heads, n_q, n_k)` in float64, by eager code."""
    return [np.asarray(layer, dtype=np.float64) for layer in outputs(model, inputs)[which]]


def outputs(model: Any, inputs: dict[str, Tensor]) -> Any:
    """What the model returns with eager attention, attentions and hidden states among it."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return model(**inputs, output_attentions=True, output_hidden_states=True)
    finally:
        model.set_attn_implementation(before)


def measure(
    model: Any, instruments: list[Instrument], inputs: Any, seed: int = 0, **more: Any
) -> tuple[list[Result], Batch]:
    """Results of some instruments on one batch of inputs."""
    look = view(model)
    words = Tokens(more.pop("tokenizer", None), model.config)
    sources = read_inputs(model, inputs, words, **more)
    samples = [sample for source in sources for sample in source.samples]
    (batch,) = Stimuli(look, words, seed).text(samples, len(samples))
    return run(model, instruments, batch, seed), batch


def run(model: Any, instruments: list[Instrument], batch: Batch, seed: int = 0) -> list[Result]:
    look = view(model)
    for instrument in instruments:
        instrument.start(look, seed)
    return Run(look, instruments).measure(batch, lambda where: None)


class Words:
    """A tokenizer of one letter a token, with punctuation and a special token."""

    all_special_ids = (0,)
    letters = "\x00.\n,abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123"

    def encode(self, text: str) -> list[int]:
        return [self.letters.index(letter) for letter in text]

    def decode(self, found: list[int]) -> str:
        return "".join(self.letters[i] for i in found)
