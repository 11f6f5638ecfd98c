"""What flows through a model on one input, in words.

An attention head's output at a position is a sum over the earlier ones, sum_j A_ij m_j, where the
memory value m_j = W_O (W_V norm(x_j)) is made on the fly from what stood there: a memory that the
text fills. The paper projects these values, like the residual stream, the heads' outputs and the
neurons, onto the vocabulary through the model's own final norm and unembedding, and draws a forward
pass as a graph whose nodes say tokens and whose edges say how much of the prediction passes there.
With the final norm's size held fixed the logit of a token is exactly the sum of what embedding,
memory values, feed-forward layers and biases add to it, so the graph's numbers add up.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headwise.instruments.head_vocabulary import said, token_logits
from headwise.instruments.memory_flow import Flow, flow
from headwise.instruments.qk_ov import ov
from headwise.instruments.tokens import Tokens
from headwise.models import ModelView, Site, recording, view
from headwise.models.backbones import Decoder
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture
from headwise.parts import Attention, Rotary
from headwise.tasks import WanderingRepeat
from headwise.train import fit, seeded


@paper(
    title="Interpreting Transformer's Attention Dynamic Memory and Visualizing the Semantic "
    "Information Flow of GPT",
    source="arXiv 2305.13417",
    year=2023,
    modality="text",
    plain="Read what attention heads retrieve from each position in the vocabulary, and draw a "
    "forward pass as a graph of what adds to the prediction.",
    equation=r"\mathrm{head}_i = \sum_j A_{ij}\, m_j, \quad m_j = W_O W_V\, \mathrm{LN}(x_j), "
    r"\quad \mathrm{logits}(m_j) = W_U\, \mathrm{LN}_f(m_j)",
    parts=(),
    reported="In GPT-2, layer norms act as semantic filters, and neurons exist that regularise.",
    unsure="Projections here hold the final norm's size fixed, so that they add up; those of the "
    "paper normalise each vector by itself, which gives the same order of tokens.",
    taxonomy=("beyond/analysis",),
    use="""
import torch
from headwise.models.backbones import Decoder
from headwise.papers.lens.attention_memory_logit_flow import flow_graph
from headwise.parts import Attention

model = Decoder(32, 64, 2, mixer=lambda layer: Attention(64, 4, causal=True))
graph = flow_graph(model, torch.arange(8)[None])
""",
)
def flow_graph(
    model: nn.Module | ModelView,
    input_ids: Tensor,
    at: int = -1,
    tokenizer: Any | None = None,
    memories: int = 3,
    top: int = 5,
) -> dict[str, Any]:
    """{"nodes": [...], "edges": [...]}, fit for JSON, of the prediction at one position of
    input_ids `(1, n)`: parts and heads point to the prediction, a head's largest memory values to
    the head. A node's `tokens` are what its vector promotes; an edge's `weight` is in logits of the
    prediction. Raises as `headwise.instruments.memory_flow.flow`."""
    found = flow(model, input_ids, at)
    words = Tokens(tokenizer, getattr(found.view.model, "config", None))

    def node(name: str, kind: str, vector: Tensor) -> dict[str, Any]:
        told = said(token_logits(found.view, vector), words, top)
        return {"id": name, "kind": kind, "tokens": list(told.texts)}

    end = {"id": "prediction", "kind": "prediction", "tokens": words.texts([found.target])}
    nodes, edges = [end], []
    for name, part in found.parts.items():
        nodes.append(node(name, "part", part))
        edges.append(_edge(name, "prediction", found.contribution(part)))
    for layer, memory in found.memory.items():
        for h, values in enumerate(memory):
            head = f"L{layer}H{h}"
            nodes.append(node(head, "head", values.sum(0)))
            edges.append(_edge(head, "prediction", found.contribution(values.sum(0))))
            for place in values.norm(dim=-1).topk(min(memories, len(values))).indices.tolist():
                name = f"{head}@{place}"
                nodes.append(node(name, "memory", values[place]))
                edges.append(_edge(name, head, found.contribution(values[place])))
    return {"nodes": nodes, "edges": edges}


def _edge(source: str, target: str, weight: Tensor) -> dict[str, Any]:
    return {"source": source, "target": target, "weight": float(weight)}


# -- claims, on a two-layer model that repeats


@cache
def trained(seed: int) -> Decoder:
    """Two layers of four heads, trained to repeat what came before at a
    distance that is drawn."""
    with seeded(seed):
        model = Decoder(
            32,
            64,
            2,
            mixer=lambda layer: Attention(64, 4, position=Rotary(base=100.0), causal=True),
            feed=lambda layer: None,
        )
    fit(model, WanderingRepeat(), steps=450, size=64, rate=5e-3, seed=seed, target=0.02)
    return model.eval()


def problems(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lines `(count, n)`, the last answers `(count,)` and their places `(count,)`."""
    batch = WanderingRepeat().batch(0, count, "test")
    return batch.inputs["input_ids"], batch.targets[:, -1], batch.facts["answer"]


def memory_values(found: Flow, model: Decoder, ids: Tensor) -> Tensor:
    """A_ij m_j of layer 0 for the last position `(heads, n, width)`."""
    return found.memory[0]


def raw_values(found: Flow, model: Decoder, ids: Tensor) -> Tensor:
    """The control: without the layer norm in m_j, scaled so that the whole is as large."""
    site = Site("residual", 0)
    with torch.no_grad(), recording(view(model), [site]) as kept:
        model(ids)
    x = kept[site][0].double()
    weights = found.memory[0].norm(dim=-1) / torch.stack(
        [ov(model, 0, h).apply(x).norm(dim=-1) for h in range(4)]
    )
    return torch.stack([w[:, None] * ov(model, 0, h).apply(x) for h, w in enumerate(weights)])


@claim(subject=memory_values, control=raw_values, unit="largest relative difference", quick=False)
def heads_are_sums_of_memory_values(values: Any, seed: int) -> Measured:
    """Over heads and positions, weights times memory values sum to what the attention added."""
    model, ids = trained(seed), problems(1)[0]
    site = Site("attention", 0)
    with torch.no_grad(), recording(view(model), [site]) as kept:
        model(ids)
    added = kept[site][0, -1].double()
    made = values(flow(model, ids), model, ids).sum((0, 1))
    return at_most((made - added).abs().max() / added.abs().max(), 1e-5)


def size_held(found: Flow, vector: Tensor) -> Tensor:
    """Divided by what the final norm divided the whole by."""
    return found.contribution(vector)


def each_by_itself(found: Flow, vector: Tensor) -> Tensor:
    """The control: every part normalised by its own size."""
    size = (vector - vector.mean()).pow(2).mean().sqrt().clamp_min(1e-6)
    return found.contribution(vector) * found.size / size


@claim(subject=size_held, control=each_by_itself, unit="logits", seeds=(0, 1), quick=False)
def contributions_sum_to_the_logit(weigh: Any, seed: int) -> Measured:
    """Embedding, heads, feed-forward layers and biases sum to the logit of the answer."""
    errors = []
    for ids in problems(8)[0]:
        found = flow(trained(seed), ids[None])
        parts = [*found.parts.values(), *(v for m in found.memory.values() for v in m.sum(1))]
        total = sum(float(weigh(found, part)) for part in parts) + found.constant
        errors.append(abs(total - found.logit))
    return at_most(max(errors), 1e-3)


def last_layer(found: Flow) -> tuple[int, int]:
    """The head of the last layer that adds most to the prediction."""
    return 1, int(found.contribution(found.memory[1].sum(1)).argmax())


def first_layer(found: Flow) -> tuple[int, int]:
    """The control: that of the first layer, which looks at the token before."""
    return 0, int(found.contribution(found.memory[0].sum(1)).argmax())


@claim(
    subject=last_layer,
    control=first_layer,
    unit="share of problems",
    seeds=(0, 1, 2),
    quick=False,
)
def the_memory_that_counts_says_the_answer(choose: Any, seed: int) -> Measured:
    """In at least 0.8 of 64 problems the largest memory value of the head that adds most to the
    prediction comes from the token to be copied and, projected to the vocabulary, says that token
    at rank one. The head that adds most in the first layer says something else."""
    lines, answers, places = problems(64)
    told = []
    for ids, answer, where in zip(lines, answers.tolist(), places.tolist(), strict=True):
        found = flow(trained(seed), ids[None])
        place, logits = found.strongest(*choose(found))
        told.append(place == where and int(logits.argmax()) == answer)
    return at_least(sum(told) / len(told), 0.8)


@picture
def a_prediction() -> Picture:
    """What each head's memory of each position adds to the logit of the prediction."""
    found = flow(trained(0), problems(1)[0])
    return Picture(
        title="What memory values add to the prediction, in logits",
        x="position",
        y="head",
        maps={
            f"layer {layer}": found.contribution(memory).tolist()
            for layer, memory in found.memory.items()
        },
    )
