"""Transformers whose matrices are signs from the first training step on.

Rounding a trained model to one bit a weight destroys it. BitNet trains with the signs in place:
each linear layer keeps float weights only to collect gradients, multiplies with their signs about
the mean, and restores the size with the mean magnitude beta. Tokens are normalised just before
(the variance that signs would lose), rounded to 8 bits, and multiplied as integers; gradients pass
the two roundings as if they were not there. Embeddings, the output layer and the products inside
attention keep their precision.

The room's `BitLinear` does it, `pack_bits` makes eight weights a byte of it. Here a small model
learns to recall values of keys.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from headwise.compress.bits.packed import PackedBitLinear, pack_bits
from headwise.compress.bits.ternary import BitLinear, to_bit_linear
from headwise.models.backbones import Decoder
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture
from headwise.parts import Attention, Mixer, TokenShift
from headwise.parts.feed.mlp import Mlp
from headwise.tasks import MultiQueryRecall
from headwise.train import evaluate, fit, seeded


@paper(
    title="BitNet: Scaling 1-bit Transformers for Large Language Models",
    source="arXiv 2310.11453",
    year=2023,
    modality="text",
    plain="Matrices of signs, trained as such: one bit a weight, products of integers.",
    equation=r"y = \mathrm{sign}(W - \bar{W})\, Q(\mathrm{LN}(x)) \cdot "
    r"\frac{\beta \gamma}{Q_b}, \quad \beta = \tfrac{1}{nm} \|W\|_1, \gamma = \|x\|_\infty",
    parts=("BitLinear", "PackedBitLinear"),
    reported="Up to 30B parameters the loss follows the scaling law of float models, at a fraction "
    "of the energy, above 8-bit post-training quantisation.",
    unsure="The shift of activations before nonlinearities to [0, Qb] (eq. 6) and shared beta of "
    "model-parallel groups (eq. 15) are left out; gamma is of each token in training too (the "
    "paper: of the tensor in training, of the token in inference).",
    taxonomy=("beyond/compression",),
    use="""
from headwise.papers.compress.bitnet import bitnet, recaller

model = bitnet(recaller(0))  # train it, then headwise.compress.pack_bits(model)
""",
)
def bitnet(model: nn.Module) -> nn.Module:
    """The model with a BitLinear of signs in the place of every matrix of its layers."""
    to_bit_linear(model, levels=2)
    return model


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1, 2)
TASK = MultiQueryRecall(pairs=4, length=32, vocabulary=32, power=1.0)
Train = Callable[[int], nn.Module]


def recaller(seed: int) -> Decoder:
    """Joins neighbours, then attends twice; each layer with an Mlp."""

    def mixer(layer: int) -> Mixer:
        return Attention(64, 4, causal=True) if layer else TokenShift(64, causal=True)

    with seeded(seed):
        return Decoder(32, 64, 3, mixer, feed=lambda layer: Mlp(64, 128), tied=False)


@cache
def trained(seed: int, signs: bool) -> nn.Module:
    model: nn.Module = bitnet(recaller(seed)) if signs else recaller(seed)
    fit(model, TASK, steps=160, size=32, rate=5e-3, seed=seed)
    return model.eval()


def trained_with_signs(seed: int) -> nn.Module:
    return trained(seed, True)


def signs_after_training(seed: int) -> nn.Module:
    """The control: a float model, trained alike, whose weights become signs afterwards."""
    return bitnet(copy.deepcopy(trained(seed, False))).eval()


class WithoutPassage(BitLinear):
    """The control: the rounding keeps gradients from the latent weights."""

    def effective_weight(self) -> Tensor:
        codes, scale = self.codes()
        return codes * scale


def trained_without_passage(seed: int) -> nn.Module:
    model = bitnet(recaller(seed))
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.__class__ = WithoutPassage
    fit(model, TASK, steps=160, size=32, rate=5e-3, seed=seed)
    return model.eval()


def accuracy(model: nn.Module) -> float:
    return evaluate(model, TASK, batches=4, size=32)["accuracy"]


@claim(
    subject=trained_with_signs,
    control=signs_after_training,
    unit="lost share of right answers",
    seeds=SEEDS,
    quick=False,
)
def signs_are_trained_not_made(train: Train, seed: int) -> Measured:
    """Trained with signs, the model answers at most 5 points worse than the float model, in the
    same number of steps; signs that are taken afterwards lose far more."""
    full = accuracy(trained(seed, False))
    return at_most(full - accuracy(train(seed)), 0.05, float_model=full)


@claim(
    subject=trained_with_signs,
    control=trained_without_passage,
    unit="share of right answers",
    seeds=SEEDS,
    quick=False,
)
def gradients_must_pass_the_signs(train: Train, seed: int) -> Measured:
    """With gradients straight through the signs 95 % of answers are right; where they stop at the
    signs, all but the matrices is trained, and it is not enough."""
    return at_least(accuracy(train(seed)), 0.95)


def of_signs(wide: int, out: int) -> nn.Module:
    return BitLinear(wide, out, levels=2)


class Rounded(nn.Linear):
    """The control: a float matrix on normalised tokens, packed as if it were of signs."""

    def __init__(self, wide: int, out: int) -> None:
        super().__init__(wide, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.layer_norm(x, x.shape[-1:]))


@claim(subject=of_signs, control=Rounded, unit="largest relative difference", seeds=SEEDS)
def integers_of_packed_bits_compute_it(
    layer: Callable[[int, int], nn.Module], seed: int
) -> Measured:
    """Eight weights a byte, 8-bit tokens and integer products give what the layer gives in
    training, to 1e-5; a float layer is not its signs."""
    module = layer(96, 40)
    x = torch.randn(64, 96)
    source = BitLinear(96, 40, levels=2)
    source.load_state_dict(module.state_dict())
    with torch.no_grad():
        packed = PackedBitLinear(96, 40, levels=2)
        packed.fill(source)
        want, got = module(x), packed(x)
    return at_most((want - got).abs().max() / want.abs().max(), 1e-5)


def one_bit(seed: int) -> nn.Module:
    return bitnet(recaller(seed))


def three_values(seed: int) -> nn.Module:
    """The control: weights of -1, 0, 1 (b1.58), which take two bits."""
    model = recaller(seed)
    to_bit_linear(model, levels=3)
    return model


@claim(subject=one_bit, control=three_values, unit="share of the float matrices' bytes")
def a_bit_a_weight(make: Callable[[int], nn.Module], seed: int) -> Measured:
    """Packed matrices with their scales hold at most 1/30 of the bytes of floats (1/32 but for the
    scales); three values hold 1/16."""
    model = make(seed)
    floats = sum(m.weight.nbytes for m in model.modules() if isinstance(m, BitLinear))
    pack_bits(model)
    packed = [m for m in model.modules() if isinstance(m, PackedBitLinear)]
    return at_most(sum(m.codes.nbytes + m.scale.nbytes for m in packed) / floats, 1 / 30)


@picture
def loss_by_training() -> Picture:
    """The loss as training goes on, of floats and of signs."""
    lines = {}
    for name, signs in (("floats (control)", False), ("signs (BitNet)", True)):
        model: nn.Module = bitnet(recaller(0)) if signs else recaller(0)
        losses: list[float] = []

        def note(step: int, loss: float, losses: list[float] = losses) -> None:
            losses.append(loss)

        fit(model, TASK, steps=120, size=32, rate=5e-3, seed=0, each=note)
        lines[name] = (list(range(len(losses))), losses)
    return Picture(
        title="Learning to recall, with weights that are floats and with signs",
        x="training steps",
        y="loss of a batch, nats",
        lines=lines,
    )
