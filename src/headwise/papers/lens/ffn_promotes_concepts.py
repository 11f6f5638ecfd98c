"""A feed-forward layer speaks in words: each of its neurons promotes some tokens.

The second matrix of a feed-forward layer has one vector for each neuron, and the layer adds the sum
of these vectors, each times its neuron's activation. Read with the unembedding (final norm left
aside), a vector says which tokens it makes likelier; the top ones are often one concept. So a
layer's update falls into sub-updates with a meaning each. Holding a few of the right neurons on
makes a model speak of their concept, and which sub-update dominates tells when the prediction will
not change any more, so that the layers above can be left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headwise.instruments.readout import Readout
from headwise.models import ModelView, view
from headwise.models.backbones import Decoder
from headwise.models.projections import features_first
from headwise.models.sites import Site, recording, touching
from headwise.models.spots import down_projection
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture
from headwise.parts import Attention, Rotary
from headwise.tasks import Batch, Task
from headwise.train import fit, seeded


@paper(
    title="Transformer Feed-Forward Layers Build Predictions by Promoting Concepts in the "
    "Vocabulary Space",
    source="arXiv 2203.14680",
    year=2022,
    modality="text",
    plain="A feed-forward layer adds one vector for each of its neurons, and each vector makes a "
    "few tokens likelier, which often are one concept.",
    equation=r"\mathrm{FFN}(x) = \sum_i m_i v_i, \quad \frac{p'(w)}{p'(u)} = \frac{p(w)}{p(u)}\, "
    r"e^{m_i (e_w - e_u) \cdot v_i}",
    parts=("down_projection", "Readout"),
    reported="GPT-2's toxicity falls by almost half with 10 neurons held on; a rule on dominant "
    "sub-updates saves 20 % of the layers.",
    unsure="The language is synthetic: topics with tokens of their own. The rule for leaving early "
    "is ours in its detail: a dominant vector counts if, where it was seen, the prediction was "
    "final in 98 %.",
    taxonomy=("beyond/analysis",),
    use="""
from headwise.models import view
from headwise.papers.lens.ffn_promotes_concepts import sub_updates, untrained

updates = sub_updates(view(untrained(0)), layer=1)
print(updates.top_tokens(neuron=3, count=5))
""",
)
def sub_updates(look: ModelView, layer: int) -> SubUpdates:
    """The value vectors of one layer, and what they promote. Works on any model whose feed-forward
    layer ends in one matrix, with an unembedding."""
    part = next(one for one in look.layers if one.index == layer)
    if look.unembedding is None:
        raise ValueError(f"{type(look.model).__name__} has no unembedding to read vectors with")
    vectors = features_first(down_projection(part)).detach().mT
    return SubUpdates(layer, vectors, look.unembedding.detach())


@dataclass(frozen=True, eq=False)
class SubUpdates:
    """values `(neurons, width)`: v_i; words `(vocabulary, width)`: e_w."""

    layer: int
    values: Tensor
    words: Tensor

    @property
    def promoted(self) -> Tensor:
        """e_w . v_i `(neurons, vocabulary)`: log-odds that an activation of 1 adds."""
        return self.values @ self.words.mT

    def top_tokens(self, neuron: int, count: int = 10) -> list[int]:
        found: list[int] = self.promoted[neuron].topk(count).indices.tolist()
        return found

    def dominant(self, activations: Tensor) -> Tensor:
        """The neuron with the largest |m_i| |v_i|, of activations `(..., neurons)`."""
        return (activations.abs() * self.values.norm(dim=1)).argmax(-1)

    def scores(self, concept: Tensor) -> Tensor:
        """How much each vector promotes these tokens above the others `(neurons,)`."""
        inside = torch.zeros(len(self.words), dtype=torch.bool)
        inside[concept] = True
        return self.promoted[:, inside].mean(1) - self.promoted[:, ~inside].mean(1)


TOPICS, EACH, LAYERS, HIDDEN = 4, 8, 4, 128


class Topics(Task):
    """Each sequence speaks of a topic and goes over to another one at any token in 20; a topic has
    8 tokens of its own. After a token of the lower half of a topic comes the next one, after the
    others any of the topic. Best: about 0.5 of the tokens."""

    vocabulary = TOPICS * EACH

    def make(self, size: int, generator: torch.Generator) -> Batch:
        topic = torch.randint(TOPICS, (size,), generator=generator)
        word = torch.randint(EACH, (size,), generator=generator)
        line = []
        for _ in range(25):
            line.append(topic * EACH + word)
            other = torch.rand(size, generator=generator) < 0.05
            topic = torch.where(other, torch.randint(TOPICS, (size,), generator=generator), topic)
            free = torch.randint(EACH, (size,), generator=generator)
            word = torch.where((word < EACH // 2) & ~other, word + 1, free)
        ids = torch.stack(line, 1)
        return Batch({"input_ids": ids[:, :-1]}, ids[:, 1:])


def untrained(seed: int) -> Decoder:
    with seeded(seed):
        made = Decoder(
            Topics.vocabulary,
            48,
            LAYERS,
            mixer=lambda layer: Attention(48, 4, position=Rotary(), causal=True),
        )
    return made.eval()


@cache
def trained(seed: int) -> Decoder:
    model = untrained(seed)
    fit(model, Topics(), steps=300, size=32, rate=3e-3, seed=seed)
    return model.eval()


def own_vectors(values: Tensor) -> Tensor:
    return values


def others_vectors(values: Tensor) -> Tensor:
    """The control: each activation meets its neighbour's vector."""
    return values.roll(1, 0)


@claim(subject=own_vectors, control=others_vectors, unit="share of the output")
def sub_updates_make_up_the_layer(which: Any, seed: int) -> Measured:
    """The sum of m_i v_i, and the bias, is what the layer adds, to 1e-5 of it."""
    model = untrained(seed)
    look, ids = view(model), Topics().batch(0, 4).inputs["input_ids"]
    neurons, added = Site("neurons", 2), Site("mlp", 2)
    with recording(look, [neurons, added]) as seen, torch.no_grad():
        model(ids)
    down = down_projection(look.layers[2])
    assert isinstance(down, nn.Linear)
    total = seen[neurons] @ which(sub_updates(look, 2).values) + down.bias
    return at_most((total - seen[added]).norm() / seen[added].norm(), 1e-5)


@claim(subject=own_vectors, control=others_vectors, unit="largest difference of log-odds")
def a_sub_update_multiplies_odds(which: Any, seed: int) -> Measured:
    """Adding m v to the residual changes log p(w)/p(u) by m (e_w - e_u) . v, to 1e-4."""
    updates = sub_updates(view(untrained(seed)), 1)
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(48, generator=random)
    promoted = which(updates.values) @ updates.words.mT
    off = torch.zeros(())
    for neuron in range(0, len(promoted), 7):
        after = (updates.words @ (x + 1.7 * updates.values[neuron])).log_softmax(0)
        change = after - (updates.words @ x).log_softmax(0)
        wanted = 1.7 * promoted[neuron]
        off = torch.maximum(off, ((change - change[0]) - (wanted - wanted[0])).abs().max())
    return at_most(off, 1e-4)


def promoting(model: nn.Module, topic: int, count: int, seed: int) -> list[tuple[int, int]]:
    """The (layer, neuron) whose vectors promote a topic most."""
    words = torch.arange(topic * EACH, (topic + 1) * EACH)
    scores = torch.stack([sub_updates(view(model), n).scores(words) for n in range(LAYERS)])
    best = scores.flatten().topk(count).indices.tolist()
    return [divmod(i, scores.shape[1]) for i in best]


def at_random(model: nn.Module, topic: int, count: int, seed: int) -> list[tuple[int, int]]:
    """The control: any neurons."""
    random = torch.Generator().manual_seed(1000 * seed + topic)
    neurons = len(sub_updates(view(model), 0).values)
    found = torch.randperm(LAYERS * neurons, generator=random)[:count].tolist()
    return [divmod(i, neurons) for i in found]


def holding(model: nn.Module, chosen: list[tuple[int, int]], level: float) -> Any:
    """While this lasts, these neurons have this activation everywhere."""

    def writes(layer: int) -> Any:
        mine = [neuron for at, neuron in chosen if at == layer]

        def write(m: Tensor) -> Tensor:
            held = m.clone()
            held[..., mine] = level
            return held

        return write

    return touching(view(model), {Site("neurons", n): writes(n) for n in {at for at, _ in chosen}})


@claim(subject=promoting, control=at_random, unit="times as likely", seeds=(0, 1, 2), quick=False)
def five_neurons_make_it_speak_of_a_topic(choose: Any, seed: int) -> Measured:
    """Held at 4, the five neurons that promote a topic most make its tokens at least twice as
    likely where another topic is spoken of (mean over the topics); any five (control) do not."""
    model, ids = trained(seed), Topics().batch(0, 64, "test").inputs["input_ids"]
    ratios = []
    with torch.no_grad():
        for topic in range(TOPICS):
            words = slice(topic * EACH, (topic + 1) * EACH)
            elsewhere = ids // EACH != topic
            before = model(ids).softmax(-1)[elsewhere][:, words].sum(-1).mean()
            with holding(model, choose(model, topic, 5, seed), 4.0):
                after = model(ids).softmax(-1)[elsewhere][:, words].sum(-1).mean()
            ratios.append(after / before)
    return at_least(torch.stack(ratios).mean(), 2.0, least=min(ratios), most=max(ratios))


@torch.no_grad()
def _looks(model: nn.Module, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """By layer and token: the dominant neuron, and the prediction behind it; the final one."""
    look, ids = view(model), Topics().batch(0, 200, split).inputs["input_ids"]
    sites = [Site("neurons", n) for n in range(LAYERS)]
    with recording(look, sites) as seen:
        read = Readout(look, {"input_ids": ids})
        kept = dict(seen)
    said = torch.stack([read(read.residuals[n + 1]).argmax(-1).flatten() for n in range(LAYERS)])
    dominant = [sub_updates(look, n).dominant(kept[sites[n]]).flatten() for n in range(LAYERS)]
    return torch.stack(dominant), said, said[-1]


def by_dominant(dominant: Tensor, settled: Tensor, seed: int) -> Tensor:
    """Neurons `(neurons,)` behind which the prediction was final in 98 %, of 20 times or more."""
    size = int(dominant.max()) + 1
    seen = torch.bincount(dominant, minlength=size)
    right = torch.bincount(dominant[settled], minlength=size)
    return (seen >= 20) & (right >= 0.98 * seen)


def at_any(dominant: Tensor, settled: Tensor, seed: int) -> Tensor:
    """The control: whatever neuron dominates."""
    return torch.ones(int(dominant.max()) + 1, dtype=torch.bool)


def _leave(rule: Any, seed: int) -> tuple[float, float]:
    """(share of the layers that are left out, agreement with the final prediction)."""
    model = trained(seed)
    dominant, said, final = _looks(model, "valid")
    rules = [rule(dominant[n], said[n] == final, seed) for n in range(LAYERS - 1)]
    dominant, said, final = _looks(model, "test")
    at = torch.full_like(final, LAYERS - 1)
    for n in reversed(range(LAYERS - 1)):
        known = dominant[n] < len(rules[n])
        leaves = known & rules[n][dominant[n].clamp_max(len(rules[n]) - 1)]
        at = torch.where(leaves, n, at)
    left = said.gather(0, at[None])[0]
    return float((LAYERS - 1 - at).float().mean() / LAYERS), float((left == final).float().mean())


@claim(subject=by_dominant, control=at_any, unit="agreement", seeds=(0, 1, 2), quick=False)
def it_leaves_early_and_says_the_same(rule: Any, seed: int) -> Measured:
    """Leaving where a dominant vector says that the prediction is final agrees with all layers in
    95 %, with at least a tenth of the layers left out; leaving at once (control) does not."""
    saved, agreement = _leave(rule, seed)
    return at_least(agreement if saved >= 0.1 else 0.0, 0.95, saved=saved, agreement=agreement)


@picture
def concepts() -> Picture:
    """What the 24 vectors of a layer that promote most sharply promote."""
    promoted = sub_updates(view(trained(0)), LAYERS - 1).promoted
    sharp = torch.stack([promoted[:, t * EACH : (t + 1) * EACH].mean(1) for t in range(TOPICS)], 1)
    best = [int(i) for t in range(TOPICS) for i in sharp[:, t].topk(6).indices]
    return Picture(
        title="What value vectors promote: six for each of four topics",
        x="token, eight for each topic",
        y="value vector",
        maps={"log-odds that an activation of 1 adds": promoted[best].tolist()},
    )
