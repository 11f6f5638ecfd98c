"""What the middle layers of a transformer have in common.

The paper asks of a frozen language model what happens when its middle layers are left out, run in
another order, run side by side and averaged, or one of them is run again and again. Skipping and
reordering cost, but the model does not break; running the same layer in place of the others is the
worst of all. So middle layers speak one language and do different things, as painters at an
assembly line would who know the picture well enough to go on whatever reached them.

`Painters` does this to any model whose layers hand on the residual: what each layer is told beside
it (masks, positions) is kept from an ordinary run, and the first middle layer then answers for all.
The model here is a small one of ten layers, trained on text for a few seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headwise.instruments.metrics import metric_of
from headwise.models import Site, recording, view
from headwise.models.backbones import Decoder
from headwise.models.layers import first_tensor
from headwise.models.prefix import logits_of
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture
from headwise.parts import Attention, Mlp, Rotary
from headwise.tasks import StandardLibraryText
from headwise.train import fit, seeded

Layer = Callable[[Tensor], Tensor]
Program = Callable[[Sequence[Layer], Tensor], Tensor]
"""(the middle layers, what reaches them) -> what leaves them."""


@paper(
    title="Transformer Layers as Painters",
    source="arXiv 2407.09298",
    year=2024,
    modality="text",
    plain="Skip, repeat, reorder or average the middle layers of a frozen model: most of it "
    "survives, except one layer in place of all.",
    equation=r"x \leftarrow \frac{1}{T - 2N} \sum_{l=N}^{T-N} f_l(x) \quad \text{(parallel)}",
    parts=("Attention", "Mlp"),
    reported="Llama 2 7B to 70B and BERT: repeating one layer is worst, random order and looped "
    "parallel are least harmful; mathematics suffers more than semantic tasks.",
    unsure="Our layers count from 0 and the middle is given by its first and last layer.",
    taxonomy=("beyond/analysis",),
    use="""
from headwise.papers.lens.layers_painters import Painters, reverse, text, untrained

model, given = untrained(0), text(0)
with Painters(model, given, first=2, last=7).instead(reverse):
    model(**given)
""",
)
class Painters:
    """The layers `first` to `last` of a model, to be run in another way on the same inputs.

    Raises ValueError for a middle that is not inside the stack.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor], first: int, last: int):
        layers = [layer.module for layer in view(model).layers]
        if not 0 <= first <= last < len(layers):
            raise ValueError(f"layers {first} to {last} of a model with 0 to {len(layers) - 1}")
        self.middle = layers[first : last + 1]
        self._told: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            others = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            self._told[module] = args[1:], others

        handles = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in self.middle]
        try:
            model(**inputs)
        finally:
            for handle in handles:
                handle.remove()

    def layers(self) -> list[Layer]:
        """The middle layers as functions of the residual alone."""

        def layer(module: nn.Module) -> Layer:
            run = type(module).forward
            args, kwargs = self._told[module]

            def paint(x: Tensor) -> Tensor:
                out = first_tensor(run(module, x, *args, **kwargs))
                assert out is not None
                return out

            return paint

        return [layer(module) for module in self.middle]

    @contextmanager
    def instead(self, program: Program) -> Iterator[None]:
        """While this lasts, the program is run in place of the middle layers."""
        layers = self.layers()

        def all_of_them(*args: Any, **kwargs: Any) -> Tensor:
            return program(layers, args[0] if args else kwargs["hidden_states"])

        def nothing(*args: Any, **kwargs: Any) -> Tensor:
            return args[0] if args else kwargs["hidden_states"]

        try:
            for number, module in enumerate(self.middle):
                module.forward = nothing if number else all_of_them
            yield
        finally:
            for module in self.middle:
                vars(module).pop("forward", None)


def in_order(order: Sequence[int]) -> Program:
    """The layers in this order, some perhaps more than once."""

    def run(layers: Sequence[Layer], x: Tensor) -> Tensor:
        for number in order:
            x = layers[number](x)
        return x

    return run


def unchanged(layers: Sequence[Layer], x: Tensor) -> Tensor:
    return in_order(range(len(layers)))(layers, x)


def skip(layers: Sequence[Layer], x: Tensor) -> Tensor:
    return x


def repeat_centre(layers: Sequence[Layer], x: Tensor) -> Tensor:
    return in_order([len(layers) // 2] * len(layers))(layers, x)


def reverse(layers: Sequence[Layer], x: Tensor) -> Tensor:
    return in_order(range(len(layers))[::-1])(layers, x)


def parallel(layers: Sequence[Layer], x: Tensor) -> Tensor:
    return torch.stack([layer(x) for layer in layers]).mean(0)


def looped_parallel(layers: Sequence[Layer], x: Tensor, loops: int = 3) -> Tensor:
    for _ in range(loops):
        x = parallel(layers, x)
    return x


def shuffled(seed: int) -> Program:
    """The layers in a random order."""

    def run(layers: Sequence[Layer], x: Tensor) -> Tensor:
        order = torch.randperm(len(layers), generator=torch.Generator().manual_seed(seed))
        return in_order(order.tolist())(layers, x)

    return run


# -- experiments ----------------------------------------------------------------------------------

DEPTH, FIRST, LAST = 10, 2, 7
SEEDS = (0, 1)


@cache
def data() -> StandardLibraryText:
    return StandardLibraryText(length=64, documents=200)


def untrained(seed: int) -> Decoder:
    with seeded(seed):
        model = Decoder(
            256,
            48,
            DEPTH,
            lambda layer: Attention(48, 4, position=Rotary(), causal=True),
            feed=lambda layer: Mlp(48, 96),
        )
    return model.eval()


@cache
def trained(seed: int) -> Decoder:
    model = untrained(seed)
    fit(model, data(), steps=200, size=16, rate=3e-3, seed=seed)
    return model.eval()


def text(seed: int) -> dict[str, Tensor]:
    return dict(data().batch(seed, 32, "test").inputs)


@cache
@torch.no_grad()
def loss(program: Program, seed: int) -> float:
    """Nats per byte of held-out text."""
    model, given = trained(seed), text(seed)
    with Painters(model, given, FIRST, LAST).instead(program):
        return float(metric_of("loss").score(logits_of(model(**given)), given).mean())


def loss_in_random_order(seed: int) -> float:
    return sum(loss(_orders[n], seed) for n in range(5)) / 5


_orders = [shuffled(n) for n in range(5)]


@claim(subject=unchanged, control=reverse, unit="largest difference of logits", seeds=SEEDS)
@torch.no_grad()
def the_usual_order_is_the_model(program: Program, seed: int) -> Measured:
    """Layers run by the harness in their usual order give the model's logits to 1e-5, and the model
    is itself again afterwards; in reverse they do not."""
    model, given = untrained(seed), text(seed)
    before = model(**given)
    with Painters(model, given, FIRST, LAST).instead(program):
        during = model(**given)
    after = model(**given)
    return at_most(torch.maximum((during - before).abs(), (after - before).abs()).max(), 1e-5)


@claim(subject=parallel, control=unchanged, unit="largest difference", seeds=SEEDS)
@torch.no_grad()
def parallel_is_the_mean_of_each_alone(program: Program, seed: int) -> Measured:
    """What leaves the parallel middle is the mean of what each layer, alone in its place, leaves:
    to 1e-5."""
    model, given = untrained(seed), text(seed)
    look = view(model)
    painters, site = Painters(model, given, FIRST, LAST), Site("residual", LAST + 1)
    alone = []
    for number in range(LAST - FIRST + 1):
        with painters.instead(in_order([number])), recording(look, [site]) as kept:
            model(**given)
        alone.append(kept[site])
    with painters.instead(program), recording(look, [site]) as kept:
        model(**given)
    return at_most((kept[site] - torch.stack(alone).mean(0)).abs().max(), 1e-5)


@claim(subject=repeat_centre, control=unchanged, unit="nats per byte", seeds=SEEDS, quick=False)
def one_painter_for_all_is_worse_than_any_order(program: Program, seed: int) -> Measured:
    """The centre layer in place of all six costs at least 0.01 nats more than the six in random
    order (mean of five), of the 0.03 to 0.05 that all six are worth to so small a model."""
    return at_least(loss(program, seed) - loss_in_random_order(seed), 0.01, **_all(seed))


@claim(subject=looped_parallel, control=skip, unit="nats per byte", seeds=SEEDS, quick=False)
def looping_mends_the_parallel(program: Program, seed: int) -> Measured:
    """Three rounds of the averaged layers lose at least 0.005 nats less than one round; leaving the
    middle out does not."""
    return at_least(loss(parallel, seed) - loss(program, seed), 0.005, **_all(seed))


def _all(seed: int) -> dict[str, float]:
    programs = (unchanged, skip, repeat_centre, reverse, parallel, looped_parallel)
    found = {program.__name__: loss(program, seed) for program in programs}
    return {**found, "random_order": loss_in_random_order(seed)}


@picture
def loss_by_layers_altered() -> Picture:
    """Loss over the number of middle layers that are altered, by how."""
    model, given = trained(0), text(0)
    programs = (skip, repeat_centre, reverse, parallel, looped_parallel)
    counts = [2, 4, 6]
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for program in programs:
        found = []
        for count in counts:
            first = (DEPTH - count) // 2
            with torch.no_grad(), Painters(model, given, first, first + count - 1).instead(program):
                found.append(float(metric_of("loss").score(model(**given), given).mean()))
        lines[program.__name__.replace("_", " ")] = (counts, found)
    return Picture(title="Loss with altered middles", x="layers", y="nats per byte", lines=lines)
