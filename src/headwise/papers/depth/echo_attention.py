"""Inner layers echo the attention map of the first of their block.

Neighbouring layers in the middle of a language model look at nearly the same tokens. So measure
how alike the maps of all layers are, leave the first and last layers alone, and let the layers of
the block that is most alike use the map of its first layer: only their values and outputs are
their own, W_Q and W_K are deleted. What that costs is won back by distillation from the untouched
model, from whose weights the smaller one starts.

The model here has six layers and reads Python's manual. In so small a model no two layers look
alike, so three of them are made to: layers 2 to 4 learn one W_Q, W_K and norm together, and get a
copy each afterwards. Where that was done is not told to what is measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.compress import map_similarity, share_attention, similar_block
from headwise.models import Site, observe, recording, view
from headwise.models.backbones import Decoder
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture, within
from headwise.parts import Attention, Mlp, Rotary
from headwise.tasks import PythonManual
from headwise.train import evaluate, fit, seeded

DEPTH, WIDTH, BLOCK = 6, 48, 3
ALIKE = (2, 3, 4)


@paper(
    title="EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models",
    source="arXiv 2409.14595",
    year=2024,
    modality="text",
    plain="A block of layers whose attention maps are alike uses the map of its first layer.",
    equation=r"o_l = A_s\,(X_l W^V_l)\,W^O_l,\qquad A_s = \mathrm{softmax}(Q_s K_s^\top/\sqrt d)",
    parts=("share_attention", "map_similarity", "similar_block"),
    reported="TinyLlama 1.1B: inference 15 % and training 25 % faster, 4 % fewer parameters, "
    "better zero-shot results.",
    unsure="The weights of the three terms of the distillation loss; here they are 1.",
    taxonomy=("attention/prior/lower", "beyond/compression"),
    use="""
from headwise.papers.depth.echo_attention import echo, texts, trained

student = echo(trained(0), texts())  # layers 3 and 4 look through the map of layer 2
""",
)
def echo(model: nn.Module, inputs: Any, size: int = BLOCK) -> nn.Module:
    """A copy of the model whose `size` inner layers with the most similar maps share one."""
    student = copy.deepcopy(model)
    share_attention(student, similar_block(map_similarity(model, inputs), size))
    return student


def echo_least_alike(model: nn.Module, inputs: Any, size: int = BLOCK) -> nn.Module:
    """The control: the block of the same size that is least alike."""
    student = copy.deepcopy(model)
    share_attention(student, similar_block(-map_similarity(model, inputs), size, ends=0))
    return student


def same_weights(model: Any, inputs: Any, size: int = BLOCK) -> nn.Module:
    """The control: the block's layers share the first one's W_Q and W_K, and compute their own
    queries and keys with them."""
    student = copy.deepcopy(model)
    for layer, source in similar_block(map_similarity(model, inputs), size).items():
        for name in ("query", "key"):
            shared = getattr(student.stack.mixers[source].project, name)
            setattr(student.stack.mixers[layer].project, name, shared)
    return student


class Distilled(nn.Module):
    """Stage 1: cross-entropy + KL(teacher || student) + MSE of what every layer leaves.

    Calls give the student's logits; `penalty` the two terms that the teacher adds.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher,)
        self.added: Tensor | float = 0.0

    def forward(self, input_ids: Tensor) -> Tensor:
        places = [Site("residual", layer) for layer in range(1, DEPTH + 1)]
        with torch.no_grad(), recording(view(self._teacher[0]), places) as theirs:
            wanted = self._teacher[0](input_ids)
        with recording(view(self.student), places, detach=False) as ours:
            logits: Tensor = self.student(input_ids)
        apart = sum(F.mse_loss(ours[place], theirs[place]) for place in places) / len(places)
        kl = F.kl_div(
            logits.log_softmax(-1).flatten(0, 1),
            wanted.log_softmax(-1).flatten(0, 1),
            log_target=True,
            reduction="batchmean",
        )
        self.added = kl + apart
        return logits

    def penalty(self) -> Tensor | float:
        return self.added


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1, 2)


def task() -> PythonManual:
    return PythonManual(48)


def texts(batch: int = 0) -> Tensor:
    """16 texts that were not trained on."""
    return task().batch(batch, 16, "valid").inputs["input_ids"]


def fresh(seed: int) -> Decoder:
    with seeded(seed):
        return Decoder(
            task().vocabulary,
            WIDTH,
            DEPTH,
            lambda layer: Attention(WIDTH, 4, position=Rotary(), causal=True),
            lambda layer: Mlp(WIDTH, 2 * WIDTH),
        )


@cache
def trained(seed: int) -> Decoder:
    """300 steps with one W_Q, W_K and norm for the layers 2 to 4, which are copied afterwards."""
    model: Any = fresh(seed)
    norms, mixers = model.stack.wiring.norms["mix"], model.stack.mixers
    first = ALIKE[0]
    for layer in ALIKE[1:]:
        norms[layer] = norms[first]
        for name in ("query", "key"):
            setattr(mixers[layer].project, name, getattr(mixers[first].project, name))
    fit(model, task(), steps=250, size=12, rate=5e-3, decay=0.0, seed=seed)
    for layer in ALIKE[1:]:
        norms[layer] = copy.deepcopy(norms[first])
        for name in ("query", "key"):
            own = copy.deepcopy(getattr(mixers[first].project, name))
            setattr(mixers[layer].project, name, own)
    done: Decoder = model.eval()
    return done


def loss(model: nn.Module) -> float:
    return evaluate(model, task(), 4, 32)["loss"]


Echo = Callable[..., nn.Module]


@claim(control=same_weights, unit="least cosine of two layers' maps", quick=False)
def maps_are_one(make: Echo, seed: int) -> Measured:
    """Every row of the maps of the shared layers is the source's. Sharing W_Q and W_K (control)
    does not make maps equal: the layers read different tokens."""
    maps: list[Any] = []
    with torch.no_grad():
        student = make(trained(seed), texts())
        with observe(view(student), lambda seen: maps.append(seen.map)):
            student(texts(1))
        source, *sharing = (maps[layer] for layer in ALIKE)
        least = min(float(source.cosine(one).min()) for one in sharing)
    return within(least, 1.0, 1e-4)


@claim(control=same_weights, unit="bytes of a state", quick=False)
def keys_are_gone(make: Echo, seed: int) -> Measured:
    """After 50 tokens, decoding holds the bytes of 6 layers' values and 4 layers' keys, and
    2 x 2 width^2 parameters are gone; sharing W_Q and W_K (control) saves as many parameters and
    no byte of a cache."""
    model = trained(seed)
    student: Any = make(model, texts())
    states = student.empty_states()
    with torch.no_grad():
        student(torch.zeros(1, 50, dtype=torch.long), states=states)
    counts = [sum(p.numel() for p in one.parameters()) for one in (model, student)]
    wanted = 4 * 50 * WIDTH * (DEPTH + DEPTH - 2)
    gone = float(counts[0] - counts[1])
    held = float(sum(state.nbytes() for state in states))
    return within(held, wanted if gone == 4 * WIDTH**2 else -1.0, 0.0, parameters_gone=gone)


@claim(control=echo_least_alike, unit="relative rise of the loss", seeds=SEEDS, quick=False)
def what_is_alike_can_be_shared(make: Echo, seed: int) -> Measured:
    """The block with the most similar maps is found, and using one map for all of it raises the
    loss by less than 0.3 %; the least similar block of the same size (control) costs more.
    (Set at first at 2 %, which here the control keeps as well.)"""
    before = loss(trained(seed))
    return at_most(loss(make(trained(seed), texts())) / before - 1, 0.003, loss_before=before)


def from_the_teacher(model: nn.Module) -> nn.Module:
    """A student with one map for the layers 1 to 4, which is more than they are alike."""
    student = copy.deepcopy(model)
    share_attention(student, dict.fromkeys((2, 3, 4), 1))
    return student


def from_scratch(model: nn.Module) -> nn.Module:
    """The control: the same student with random weights."""
    student = fresh(7)
    share_attention(student, dict.fromkeys((2, 3, 4), 1))
    return student


@claim(
    subject=from_the_teacher,
    control=from_scratch,
    unit="share of the loss won back",
    quick=False,
)
def distillation_wins_back_half(make: Callable[[nn.Module], nn.Module], seed: int) -> Measured:
    """40 steps of distillation win back at least half of what sharing one map among four layers
    costs; a student that does not inherit the teacher's weights (control) is nowhere near."""
    teacher = trained(seed)
    student = make(teacher)
    before, cut = loss(teacher), loss(from_the_teacher(teacher))
    fit(Distilled(student, teacher), task(), steps=40, size=12, rate=1e-3, seed=seed + 50)
    after = loss(student)
    return at_least((cut - after) / (cut - before), 0.5, teacher=before, cut=cut, after=after)


@picture
def how_alike_layers_look() -> Picture:
    """The cosine of two layers' maps, where three layers were trained to be alike, and before
    anything was trained."""
    models = {"layers 2 to 4 trained alike": trained(0), "before training (control)": fresh(0)}
    return Picture(
        title="How alike the attention maps of six layers look: mean cosine",
        x="layer, 0 to 5",
        y="layer, 0 to 5",
        maps={name: map_similarity(one, texts()).tolist() for name, one in models.items()},
    )
