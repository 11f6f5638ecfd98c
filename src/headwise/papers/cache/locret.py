"""Small modules that learn which cached tokens will be asked for, when the token is read.

Eviction during a chunked prefill has to decide before the question comes. Attention paid so far is
a poor guide to that, and depends on what follows, so that scores of a token drift. Locret freezes
the language model and gives every layer a retaining head: a small network that reads a token's
query, key and value and predicts, for each key-value head, the largest score that any query of the
answer will give to this token. Scores are causal and computed once; after every chunk the cache
keeps the best, and the newest tokens ("stabilizers") whatever they score.

The task here is to find a digit in filler: while the text is read nothing asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from headwise.compress import (
    AccumulatedMass,
    HeadCache,
    Learned,
    ObservationWindow,
    Policy,
    RetainingHeads,
    Seen,
    SinksAndWindow,
    train_retaining_heads,
)
from headwise.compress.cache.policies.retaining import importance
from headwise.models import observe, view
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture
from headwise.tasks import Passkey
from headwise.train import fit, seeded


@paper(
    title="Locret: Enhancing Eviction in Long-Context LLM Inference with Trained Retaining Heads",
    source="arXiv 2410.01805",
    year=2024,
    modality="text",
    plain="A module in each layer of a frozen model learns to say, when a token is read, how much "
    "the answer will look at it.",
    equation=r"\tilde{s}_{k} = \sigma([q_k, k_k, v_k] W_1) W_2, \quad "
    r"s_{k} = \max_{p} q_p^{\top} k_k",
    parts=("HeadCache", "Learned", "RetainingHeads"),
    reported="Caches of Phi-3-mini-128K and Llama-3.1-8B are compressed 20 and 8 times, after less "
    "than one GPU hour of training.",
    unsure="The authors' modules read queries and keys before they are rotated; a cache has them "
    "after. Widths and steps are ours (1,024 and 3,000 there).",
    needs=("transformers",),
    taxonomy=("beyond/cache",),
    use="""
from transformers import AutoModelForCausalLM

from headwise.compress import RetainingHeads
from headwise.models.default import default_model_path
from headwise.papers.cache.locret import locret_cache

model = AutoModelForCausalLM.from_pretrained(default_model_path())
heads = [RetainingHeads(4, 2, 32, 32) for _ in range(4)]  # train_retaining_heads trains them
cache = locret_cache(model, heads, budget=256, stabilizers=64)
""",
)
def locret_cache(
    model: nn.Module,
    heads: Sequence[RetainingHeads],
    budget: int = 6000,
    stabilizers: int = 2500,
) -> HeadCache:
    """A cache of at most `budget` entries for each key-value head, the newest `stabilizers` of
    them whatever they score. Fill it in chunks: `model(chunk, past_key_values=cache)`."""
    return cache_with(model, Learned(heads), budget, stabilizers)


def cache_with(model: nn.Module, policy: Policy, budget: int, newest: int) -> HeadCache:
    """The same cache with another policy."""
    return HeadCache(model, budget, policy, sinks=0, window=newest, step=1, slack=1)


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1)
LENGTH, BUDGET, NEWEST, CHUNK = 128, 16, 4, 32


def task() -> Passkey:
    return Passkey(length=LENGTH, digits=1)


@cache
def trained(seed: int) -> Any:
    """One layer, 4 heads of 16 with 2 key-value heads."""
    with seeded(seed):
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=task().vocabulary,
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    fit(model, task(), steps=250, size=16, rate=3e-3, target=0.02, seed=seed)
    return model.eval()


def examples(first: int, steps: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Texts with their question at the end, and the place of the question."""
    found = []
    for step in range(first, first + steps):
        inputs = task().batch(step, 16).inputs
        asked = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        asked[:, -1] = True
        found.append((inputs, asked))
    return found


def retaining_heads(model: nn.Module, steps: int = 200) -> list[RetainingHeads]:
    """Modules trained on texts that the model was not trained on."""
    return train_retaining_heads(model, examples(10_000, steps), width=64, rate=1e-2)[0]


@cache
def _learned(seed: int) -> Learned:
    return Learned(retaining_heads(trained(seed)))


def learned(seed: int) -> Policy:
    """Scores of trained retaining heads."""
    return _learned(seed)


def untrained(seed: int) -> Policy:
    """The control: retaining heads as they were drawn."""
    heads = [RetainingHeads(2, 2, 16, 16, width=64)]
    with seeded(seed), torch.no_grad():
        for weight in heads[0].parameters():
            weight.normal_(0, weight.shape[1] ** -0.5)
    return Learned(heads)


def by_attention(seed: int) -> Policy:
    """The control: what the newest queries look at (SnapKV)."""
    return ObservationWindow(8, 5)


@torch.no_grad()
def accuracy(model: Any, policy: Policy, seed: int, count: int = 64) -> float:
    """Share of right digits after a prefill in chunks, without the question."""
    batch = task().batch(seed, count, "test")
    ids = batch.inputs["input_ids"]
    with cache_with(model, policy, BUDGET, NEWEST) as made:
        for start in range(0, LENGTH, CHUNK):
            model(ids[:, start : min(start + CHUNK, LENGTH)], past_key_values=made)
        logits = model(ids[:, LENGTH:], past_key_values=made).logits[:, -1]
    return float((logits.argmax(-1) == batch.targets[:, -1]).float().mean())


@claim(subject=learned, control=untrained, unit="accuracy beyond others'", seeds=SEEDS, quick=False)
def what_will_be_asked_is_kept(policy: Callable[[int], Policy], seed: int) -> Measured:
    """With an eighth of the cache, trained retaining heads answer at least 0.2 more questions than
    the better of the newest tokens (StreamingLLM) and accumulated attention (H2O)."""
    model = trained(seed)
    recent = accuracy(model, SinksAndWindow(), seed)
    heavy = accuracy(model, AccumulatedMass(), seed)
    found = accuracy(model, policy(seed), seed)
    return at_least(found - max(recent, heavy), 0.2, found=found, recent=recent, heavy=heavy)


class Watched(Policy):
    """A policy, and what it said of the first tokens each time it was asked, and of how many."""

    def __init__(self, inner: Policy) -> None:
        self.inner, self.needs_queries = inner, inner.needs_queries
        self.said: list[Tensor] = []
        self.most = 0

    def observe(self, seen: Seen) -> Tensor | None:
        return self.inner.observe(seen)

    def score(self, seen: Seen) -> Tensor:
        found = self.inner.score(seen)
        self.said.append(found[:, :CHUNK].clone())
        self.most = max(self.most, found.shape[1])
        return found


@claim(subject=learned, control=by_attention, unit="share of the deviation of scores", quick=False)
def scores_are_causal(policy: Callable[[int], Policy], seed: int) -> Measured:
    """What is said of the first tokens does not change with the tokens that come later, but for
    rounding."""
    model, watched = trained(seed), Watched(policy(seed))
    ids = task().batch(seed, 4, "test").inputs["input_ids"]
    with torch.no_grad():
        for end in (CHUNK + 8, LENGTH):
            with cache_with(model, watched, CHUNK + 2, 2) as made:
                model(ids[:, :end], past_key_values=made)
    first, later = (said[:, : CHUNK - 8] for said in watched.said)
    return at_most((first - later).abs().max() / first.std(), 1e-4)


def in_chunks(model: Any, ids: Tensor, made: HeadCache) -> None:
    """The text comes in chunks."""
    for start in range(0, ids.shape[1], CHUNK):
        model(ids[:, start : start + CHUNK], past_key_values=made)


def at_once(model: Any, ids: Tensor, made: HeadCache) -> None:
    """The control: the text comes in one piece, and is cut down afterwards."""
    model(ids, past_key_values=made)


@claim(subject=in_chunks, control=at_once, unit="entries of a head", quick=False)
def the_peak_is_budget_and_chunk(prefill: Callable[..., None], seed: int) -> Measured:
    """A head never has more entries than the budget and a chunk, however long the text is."""
    model, watched = trained(seed), Watched(learned(seed))
    ids = torch.cat([task().batch(n, 2).inputs["input_ids"] for n in range(4)], 1)
    with torch.no_grad(), cache_with(model, watched, BUDGET, NEWEST) as made:
        prefill(model, ids, made)
    return at_most(watched.most, BUDGET + CHUNK, tokens=ids.shape[1])


@picture
def what_is_said() -> Picture:
    """Scores of retaining heads around the digit that is asked for in the end, and what the
    question's queries give then."""
    model, batch = trained(0), task().batch(3, 1, "test")
    asked = torch.zeros_like(batch.inputs["input_ids"], dtype=torch.bool)
    asked[:, -1] = True
    lines: dict[str, Any] = {}
    kinds: dict[str, Any]
    with torch.enable_grad():
        kinds = {"trained (Locret)": learned(0), "untrained (control)": untrained(0)}

    def read(r: Any) -> None:
        wanted, heads = importance(r, asked)[0][0, 0], torch.arange(2)
        middle = int(wanted.argmax())
        at = list(range(max(0, middle - 12), min(len(wanted), middle + 13)))
        lines["asked for in the end"] = (at, wanted[at].tolist())
        for name, kind in kinds.items():
            seen = r.query.unflatten(1, (2, 2)).flatten(0, 1), r.key[0], r.value[0], heads
            lines[name] = (at, kind.modules[0](*seen)[0][at].tolist())

    with observe(view(model), read):
        model(**batch.inputs)
    return Picture(
        title="What one head says of tokens as they are read, and what the question asks for",
        x="position of the token",
        y="largest score, q . k / sqrt(d)",
        lines=lines,
    )
