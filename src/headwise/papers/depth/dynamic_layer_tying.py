"""While a model trains, an agent decides which layers share their weights.

All layers start as one. Every few steps a small network with Q-values walks over the layers and
picks for layer i an index j <= i: j < i, use the weights of layer j; j = i, train on your own,
beginning with the weights that are there. Its state is the vector of these choices, its reward
how low the loss on a batch is afterwards; it explores at random less and less. What is trained are
the distinct roots alone.

The room's `share_layers` does the tying: places stay apart, parameters are one. What is here is the
agent. It is tried on characters of Python's manual, with six layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.compress.structure.sharing import ShareLayers, resolved, tied_to
from headwise.models import view
from headwise.models.backbones import Decoder
from headwise.papers import Measured, at_least, at_most, claim, paper
from headwise.parts import Attention, Rotary
from headwise.parts.feed.mlp import Mlp
from headwise.tasks import PythonManual
from headwise.train import evaluate, seeded


@dataclass
class Tied:
    """losses: of every step; layers: distinct ones at every decision; roots: at the end."""

    model: nn.Module
    losses: list[float] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    roots: tuple[int, ...] = ()


class Agent(nn.Module):
    """Q-values `(depth,)` of the choices of one layer, by the choices so far and the layer."""

    def __init__(self, depth: int, hidden: int = 32) -> None:
        super().__init__()
        self.depth = depth
        self.net = nn.Sequential(nn.Linear(2 * depth, hidden), nn.ReLU(), nn.Linear(hidden, depth))

    def forward(self, roots: list[int], layer: int) -> Tensor:
        place = F.one_hot(torch.tensor(layer), self.depth).float()
        values: Tensor = self.net(torch.cat([torch.tensor(roots).float() / self.depth, place]))
        return values

    def choose(self, roots: list[int], layer: int, explore: float, random: torch.Generator) -> int:
        """One of 0 to layer."""
        if float(torch.rand((), generator=random)) < explore:
            return int(torch.randint(layer + 1, (), generator=random))
        with torch.no_grad():
            return int(self(roots, layer)[: layer + 1].argmax())


@paper(
    title="Dynamic Layer Tying for Parameter-Efficient Transformers",
    source="arXiv 2401.12819",
    year=2024,
    modality="text",
    plain="A Q-learning agent decides in training which layers use the weights of earlier ones.",
    equation=r"t_i \in \{1, \ldots, i\}, \quad W_i = W_{t_i}, \quad Q(s, a) \leftarrow r + \gamma "
    r"\max_{a'} Q(s', a')",
    parts=("ShareLayers",),
    reported="Perplexity slightly below an untied model's, with up to an order of magnitude fewer "
    "trained parameters.",
    unsure="Size of the Q-network, its rate and how exploration falls are not the paper's; the "
    "reward is minus the training loss.",
    taxonomy=("beyond/compression",),
    use="""
from headwise.papers.depth.dynamic_layer_tying import fresh, task, train_tied

tied = train_tied(fresh(0), task(), steps=30)
print(tied.roots)  # for each layer, whose weights it uses
""",
)
def train_tied(
    model: nn.Module,
    task: Any,
    steps: int = 200,
    every: int = 10,
    rate: float = 3e-3,
    seed: int = 0,
) -> Tied:
    """Train a model in place, tying and untying its layers every `every` steps."""
    depth = len(view(model).layers)
    with seeded(seed):
        agent = Agent(depth)
    learner = torch.optim.Adam(agent.parameters(), lr=1e-3)
    random = torch.Generator().manual_seed(seed)
    tied, roots = Tied(model), [0] * depth
    ShareLayers(tuple(roots)).apply(model)
    adam = _adam(model, rate)
    model.train()
    for step in range(steps):
        if step % every == 0 and step:
            explore = max(0.05, 1 - 2 * step / steps)
            before, walked = list(roots), []
            for layer in range(1, depth):
                state = list(roots)
                roots[layer] = agent.choose(state, layer, explore, random)
                walked.append((state, layer, roots[layer]))
            roots = list(resolved(roots))
            if roots != before:
                ShareLayers(tuple(roots)).apply(model)
                adam = _adam(model, rate)
            reward = -_loss(model, task, step)
            _learn(agent, learner, walked, roots, float(reward.detach()))
            tied.layers.append(len(set(roots)))
        tied.losses.append(_descend(model, task, adam, step, steps, rate))
    tied.roots = tied_to(model)
    model.eval()
    return tied


def _learn(
    agent: Agent,
    learner: torch.optim.Optimizer,
    walked: list[tuple[list[int], int, int]],
    after: list[int],
    reward: float,
    discount: float = 0.9,
) -> None:
    """Q(s, a) towards r + discount * max Q(s', a'), the reward at the end of the walk."""
    for number, (state, layer, action) in enumerate(walked):
        last = number == len(walked) - 1
        with torch.no_grad():
            if last:
                goal = torch.tensor(reward)
            else:
                following, next_layer, _ = walked[number + 1]
                goal = discount * agent(following, next_layer)[: next_layer + 1].max()
        loss = (agent(state, layer)[action] - goal).square()
        learner.zero_grad()
        loss.backward()
        learner.step()


def _descend(
    model: nn.Module, task: Any, adam: torch.optim.Optimizer, step: int, steps: int, rate: float
) -> float:
    """One step of training; the loss before it."""
    for group in adam.param_groups:
        group["lr"] = rate * min(1.0, (step + 1) / 20, 2 * (steps - step) / steps)
    loss = _loss(model, task, step)
    adam.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
    adam.step()
    return float(loss.detach())


def _loss(model: nn.Module, task: Any, step: int) -> Tensor:
    batch = task.batch(step, 12)
    loss: Tensor = task.loss(model(**batch.inputs), batch)
    return loss


def _adam(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Parameters that several layers use are there once."""
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)


def train_untied(model: nn.Module, task: Any, steps: int = 200, **more: Any) -> Tied:
    """The control: layers of their own, trained as long."""
    tied = Tied(model)
    adam, rate = _adam(model, 3e-3), 3e-3
    for step in range(steps):
        tied.losses.append(_descend(model, task, adam, step, steps, rate))
    tied.roots = tied_to(model)
    model.eval()
    return tied


def tie(model: nn.Module, roots: tuple[int, ...]) -> None:
    """Layers to the parameters of their roots."""
    ShareLayers(roots).apply(model)


def tie_by_copies(model: nn.Module, roots: tuple[int, ...]) -> None:
    """The control: equal weights that are not the same."""
    ShareLayers(roots).apply(model)
    ShareLayers(tuple(range(len(roots)))).apply(model)


def learn_from_noise(
    agent: Agent, learner: torch.optim.Optimizer, walked: Any, after: list[int], reward: float
) -> None:
    """The control: rewards that have nothing to do with the choice."""
    _learn(agent, learner, walked, after, 0.5)


def tie_anew(model: nn.Module, roots: tuple[int, ...]) -> None:
    """The control: a layer that is untied begins with weights of its own."""
    ShareLayers(roots).apply(model)
    with torch.no_grad(), seeded(0):
        for layer in range(1, len(roots)):
            if roots[layer] == layer:
                stack: Any = model.stack
                for parameter in stack.feeds[layer].parameters():
                    parameter.normal_(0, 0.1)


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1, 2)
WIDTH, DEPTH = 32, 6


def task() -> PythonManual:
    return PythonManual(48)


def fresh(seed: int, depth: int = DEPTH) -> Decoder:
    with seeded(seed):
        return Decoder(
            task().vocabulary,
            WIDTH,
            depth,
            lambda layer: Attention(WIDTH, 4, position=Rotary(), causal=True),
            lambda layer: Mlp(WIDTH, 2 * WIDTH),
        )


@cache
def _trained(train: Callable[..., Tied], seed: int) -> Tied:
    return train(fresh(seed), task(), seed=seed)


@claim(control=tie_by_copies, subject=tie, unit="largest relative difference", seeds=SEEDS)
def gradients_of_tied_layers_add_up(tying: Callable[..., None], seed: int) -> Measured:
    """The gradient of a weight that several layers use is the sum of those of an untied copy, to
    1e-4."""
    model, roots = fresh(seed), resolved((0, 0, 1, 3, 3, 4))
    tying(model, roots)
    apart = copy.deepcopy(model)
    tie_by_copies(apart, roots)
    for one in (model, apart):
        _loss(one, task(), seed).backward()
    mine = [_grad(model, n) for n in (0, 3)]
    worst = 0.0
    for grad, root in zip(mine, (0, 3), strict=True):
        same = [n for n, r in enumerate(roots) if r == root]
        want = torch.stack([_grad(apart, n) for n in same]).sum(0)
        worst = max(worst, float((grad - want).abs().max() / want.abs().max()))
    return at_most(worst, 1e-4)


def _grad(model: Decoder, layer: int) -> Tensor:
    mixer: Any = model.stack.mixers[layer]
    found: Tensor = mixer.project.query.weight.grad
    return found


@claim(control=tie_anew, subject=tie, unit="largest difference of logits", seeds=SEEDS)
def untying_changes_nothing_at_first(tying: Callable[..., None], seed: int) -> Measured:
    """A layer that becomes its own root goes on from the weights that it had."""
    model, given = fresh(seed), task().batch(seed, 2).inputs
    tie(model, (0,) * DEPTH)
    with torch.no_grad():
        before = model(**given)
        tying(model, (0, 0, 2, 2, 4, 4))
        return at_most(float((model(**given) - before).abs().max()), 0.0)


@claim(control=learn_from_noise, subject=_learn, unit="difference of Q-values", seeds=SEEDS)
def the_agent_learns_which_choice_pays(learn: Callable[..., None], seed: int) -> Measured:
    """Where one of the choices for a layer is rewarded by 1 and the others by 0, its Q-value ends
    up 0.5 or more above theirs."""
    with seeded(seed):
        agent = Agent(4)
    learner = torch.optim.Adam(agent.parameters(), lr=1e-2)
    state = [0, 0, 0, 0]
    for step in range(400):
        action = step % 4
        learn(agent, learner, [(state, 3, action)], [0, 0, 0, action], float(action == 2))
    with torch.no_grad():
        values = agent(state, 3)
    return at_least(float(values[2] - values[[0, 1, 3]].max()), 0.5)


@claim(control=train_untied, unit="distinct layers", seeds=SEEDS, quick=False)
def few_layers_do_as_well(train: Callable[..., Tied], seed: int) -> Measured:
    """Of six layers at most four distinct ones are left, with a loss on new text at most 8 % above
    six layers of their own (3 and 5 % were asked of longer training); else six are counted. One
    layer learns this short text as well: that the agent chooses better is not shown here."""
    tied = evaluate(_trained(train, seed).model, task(), 4, 32)["loss"]
    untied = evaluate(_trained(train_untied, seed).model, task(), 4, 32)["loss"]
    layers = len(set(_trained(train, seed).roots)) if tied <= 1.08 * untied else DEPTH
    return at_most(float(layers), 4.0, tied=tied, untied=untied)
