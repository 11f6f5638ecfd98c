"""A trained model learns, by tiny routers alone, which attentions a text can do without.

Models of dynamic depth are usually trained whole. Router-Tuning leaves a trained model as it is and
puts one linear router before each attention; it reads the mean of the tokens and closes the
attention for the whole sequence (MindSkip), feed-forward layers always run. Only the routers are
trained, on the model's own loss plus a price on open attentions beyond a target, with
straight-through gradients through the hard decision. A closed attention costs nothing: it does not
run, and caches no keys and values.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headwise.compress import open_share, route_attention, router_parameters
from headwise.compress.structure.layer_routers import routers_of
from headwise.models.backbones import Decoder
from headwise.papers import Measured, Picture, at_most, claim, paper, picture, within
from headwise.parts import Attention, Mlp, Rotary
from headwise.tasks import PythonManual
from headwise.tasks.task import Task
from headwise.train import evaluate, fit, seeded

DEPTH, WIDTH = 8, 48


class Priced(nn.Module):
    """The model, which asks `price` for each share of attentions that is open beyond `target`."""

    def __init__(self, model: nn.Module, target: float, price: float) -> None:
        super().__init__()
        self.model, self.target, self.price = model, target, price

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids)
        return logits

    def penalty(self) -> Tensor:
        return self.price * (open_share(self.model) - self.target).relu()


@paper(
    title="Router-Tuning: A Simple and Effective Approach for Enabling Dynamic-Depth in "
    "Transformers",
    source="arXiv 2410.13184",
    year=2024,
    modality="text",
    plain="Routers alone are trained to leave out attentions that a text does not need; the model "
    "stays as it is.",
    equation=r"y = x + \mathbb{1}[\sigma(w^\top \bar x + b) > \tau]\,\mathrm{Attn}(\mathrm{LN}\,x)",
    parts=("route_attention", "router_parameters", "open_share"),
    reported="21 % faster with 0.2 % lower results.",
    unsure="The form of the price, and what exactly the router reads: here the mean of the "
    "normalised tokens, and a price on the mean sigmoid beyond the target.",
    taxonomy=("architecture/adaptive", "beyond/compression"),
    use="""
from headwise.papers.depth.router_tuning import router_tuned, task, trained

model = router_tuned(trained(0), task(), steps=5)
""",
)
def router_tuned(
    model: nn.Module,
    data: Task,
    target: float = 0.5,
    price: float = 3.0,
    steps: int = 60,
    seed: int = 0,
) -> nn.Module:
    """A copy of the model with routers, which alone were trained."""
    made = copy.deepcopy(model)
    route_attention(made)
    own = router_parameters(made)
    made.requires_grad_(False)
    for parameter in own:
        parameter.requires_grad_(True)
    fit(
        Priced(made, target, price),
        data,
        steps=steps,
        size=12,
        rate=0.02,
        decay=0.0,
        seed=seed,
        parameters=own,
    )
    return made.eval()


def all_tuned(model: nn.Module, data: Task, steps: int = 5, seed: int = 0) -> nn.Module:
    """The control: the model is trained along."""
    made = copy.deepcopy(model)
    route_attention(made)
    fit(Priced(made, 0.5, 3.0), data, steps=steps, size=12, seed=seed)
    return made.eval()


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1)


def task() -> PythonManual:
    return PythonManual(48)


def texts() -> Tensor:
    return task().batch(0, 32, "valid").inputs["input_ids"]


@cache
def trained(seed: int) -> Decoder:
    """Eight layers after 200 steps on Python's manual."""
    with seeded(seed):
        model = Decoder(
            task().vocabulary,
            WIDTH,
            DEPTH,
            lambda layer: Attention(WIDTH, 4, position=Rotary(), causal=True),
            lambda layer: Mlp(WIDTH, 2 * WIDTH),
        )
    fit(model, task(), steps=200, size=12, rate=5e-3, decay=0.0, seed=seed)
    return model.eval()


@cache
def tuned(seed: int) -> nn.Module:
    return router_tuned(trained(seed), task(), seed=seed)


def loss(model: nn.Module) -> float:
    return evaluate(model, task(), 2, 32)["loss"]


def fixed(model: nn.Module, kept: Sequence[int]) -> nn.Module:
    """Routers that open for the layers `kept`, whatever comes."""
    made = copy.deepcopy(model)
    route_attention(made)
    with torch.no_grad():
        for layer, router in enumerate(routers_of(made)):
            router.linear.bias.fill_(2.0 if layer in kept else -2.0)
    return made


def by_chance(seed: int, count: int, number: int) -> list[nn.Module]:
    """Models of which `count` attentions drawn at random run."""
    draw = random.Random(100 * seed + number)
    return [fixed(trained(seed), draw.sample(range(DEPTH), count)) for _ in range(5)]


@cache
def open_layers(seed: int) -> float:
    """Mean number of attentions that run, of the tuned model on texts it did not see."""
    with torch.no_grad():
        tuned(seed)(texts())
        return float(open_share(tuned(seed), hard=True)) * DEPTH


def by_routers(seed: int, count: int) -> list[nn.Module]:
    return [tuned(seed)]


def other_draws(seed: int, count: int) -> list[nn.Module]:
    """The control: random choices of as many attentions."""
    return by_chance(seed, count, 1)


@claim(subject=by_routers, control=other_draws, unit="share of the rise", seeds=SEEDS, quick=False)
def routers_find_what_can_go(models: Callable[..., list[nn.Module]], seed: int) -> Measured:
    """60 steps for the routers alone leave at most 60 % of the attentions open, and the loss rises
    by at most 40 % of what it rises, on average over ten draws, with as many attentions left at
    random; five of these draws (control) are no better than all."""
    before, share = loss(trained(seed)), open_layers(seed)
    count = round(share)
    wanted = [loss(model) for model in models(seed, count)]
    drawn = [loss(model) for number in (0, 1) for model in by_chance(seed, count, number)]
    rises = [sum(losses) / len(losses) - before for losses in (wanted, drawn)]
    ratio = rises[0] / rises[1] if share <= 0.6 * DEPTH else float("nan")
    return at_most(ratio, 0.4, open=share / DEPTH, loss=before, rise=rises[0], at_random=rises[1])


def five_steps(model: nn.Module, data: Task) -> nn.Module:
    return router_tuned(model, data, steps=5)


@claim(subject=five_steps, control=all_tuned, unit="tensors that changed", quick=False)
def the_model_stays_as_it_is(tune: Callable[..., nn.Module], seed: int) -> Measured:
    """After tuning every tensor of the model is what it was, to the bit; tuned whole (control),
    none is."""
    before = list(trained(seed).parameters())
    made = tune(trained(seed), task())
    routers = {id(p) for p in router_parameters(made)}
    after = [p for p in made.parameters() if id(p) not in routers]
    changed = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return at_most(float(changed), 0.0, tensors=float(len(before)))


def opened(seed: int) -> nn.Module:
    return fixed(trained(seed), range(DEPTH))


def softly_opened(seed: int) -> nn.Module:
    """The control: outputs are multiplied by the sigmoid instead of by its decision."""
    made = fixed(trained(seed), range(DEPTH))
    for module in made.modules():
        if hasattr(module, "router"):
            weigh = lambda m, args, out: out * m.router.soft[:, None, None]  # noqa: E731
            module.register_forward_hook(weigh)
    return made


@claim(subject=opened, control=softly_opened, unit="largest difference of logits", quick=False)
def open_routers_change_nothing(make: Callable[[int], nn.Module], seed: int) -> Measured:
    """Where all routers are open the logits are those of the model, to the bit."""
    with torch.no_grad():
        difference = (make(seed)(texts()) - trained(seed)(texts())).abs().max()
    return at_most(difference, 0.0)


def skipping(seed: int) -> Any:
    return tuned(seed)


def multiplied(seed: int) -> Any:
    """The control: closed attentions run, and what they give is multiplied by zero."""
    made: Any = copy.deepcopy(tuned(seed))
    for router in routers_of(made):
        router.threshold = -1.0
    return made


@claim(subject=skipping, control=multiplied, unit="cached share of all bytes", quick=False)
def what_is_closed_is_not_cached(make: Callable[[int], Any], seed: int) -> Measured:
    """The share of bytes that decoding caches is the share of attentions that are open."""
    model, held = make(seed), []
    for one in (model, trained(seed)):
        states = one.empty_states()
        with torch.no_grad():
            one(texts(), states=states)
        held.append(sum(state.nbytes() for state in states))
    return within(held[0] / held[1], open_layers(seed) / DEPTH, 1e-6)


@picture
def loss_by_open_attentions() -> Picture:
    """The loss with attentions chosen by routers, and with as many or others drawn at random."""
    counts = list(range(DEPTH + 1))
    drawn = [[loss(model) for model in by_chance(0, count, 0)] for count in counts]
    return Picture(
        title="Eight attentions, of which some run: chosen by routers, and drawn",
        x="attentions that run, mean over texts",
        y="loss on other text, nats",
        lines={
            "drawn, mean of 5 (control)": (counts, [sum(one) / len(one) for one in drawn]),
            "drawn, best of 5": (counts, [min(one) for one in drawn]),
            "routers": ([open_layers(0)], [loss(tuned(0))]),
        },
    )
