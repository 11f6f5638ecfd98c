"""Fine-tuning of a few heads and channels, as dense blocks.

Sparse fine-tuning forgets less than low-rank adapters, but scattered weights are slow to train.
S2FT chooses whole heads and whole channels of the feed-forward layers, and trains what they write:
their columns of W_O and of W_down. Heads may be put in another order, and channels too, if all
matrices on both sides follow (queries, keys, values and W_O; up, gate and W_down): nothing that is
computed changes. So the chosen ones are put first, and what is trained is one dense block of each
matrix, [trained | frozen], of whose input only the chosen part is kept for the backward pass. The
change that comes out is a block of columns: an adapter that can be taken off and put on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.compress.structure.matrices import put_in_place
from headwise.compress.structure.split_columns import Split
from headwise.models import LayerView, view
from headwise.models.backbones import Decoder
from headwise.models.projections import child, features_first
from headwise.models.spots import down_projection
from headwise.papers import Measured, at_least, at_most, claim, paper
from headwise.parts import Attention, Mixer, TokenShift
from headwise.parts.feed.mlp import Mlp
from headwise.tasks import Batch, MultiQueryRecall, Task
from headwise.tasks.task import IGNORED
from headwise.train import evaluate, fit, seeded


@paper(
    title="S$^{2}$FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity",
    source="arXiv 2412.06289",
    year=2024,
    modality="text",
    plain="A few heads and channels are put first, and only the dense blocks that they write are "
    "trained.",
    equation=r"W = P^\top [\, W_{\mathrm{train}} \;|\; W_{\mathrm{frozen}} \,], \quad "
    r"\Delta W = [\, \Delta \;|\; 0 \,] P",
    parts=("Split",),
    reported="4.6 and 1.3 % above LoRA on commonsense and arithmetic, a third of the memory of "
    "full fine-tuning and 1.5 to 2.7 times its speed.",
    unsure="How a budget is split between W_O and W_down; the same share of both here. Chosen at "
    "random, which the paper finds as good as scores.",
    taxonomy=("beyond/compression",),
    use="""
from headwise.papers.compress.s2ft import recaller, s2ft

model = recaller(0)
splits = s2ft(model, share=0.25)  # the parameters that are left to be trained
""",
)
def s2ft(model: nn.Module, share: float, seed: int = 0) -> list[Split]:
    """Put a random `share` of each layer's heads and channels first, split W_O and W_down, and
    freeze all else; in place. Grouped heads and Conv1D are not supported."""
    random = torch.Generator().manual_seed(seed)
    splits = []
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in view(model).layers:
        for attention in layer.attentions:
            heads = max(1, round(share * attention.heads))
            permute_heads(layer, torch.randperm(attention.heads, generator=random).tolist())
            found = attention.projections
            assert not isinstance(found, str)
            assert found.output is not None
            splits.append(Split(found.output, heads * found.value.head_dim))
            put_in_place(model, found.output, splits[-1])
        if layer.mlp_ends:
            down = down_projection(layer)
            channels = features_first(down).shape[1]
            permute_channels(layer, torch.randperm(channels, generator=random).tolist())
            splits.append(Split(down, max(1, round(share * channels))))
            put_in_place(model, down, splits[-1])
    return splits


@torch.no_grad()
def permute_heads(layer: LayerView, order: Sequence[int]) -> None:
    """Heads of a layer's attention in another order, queries to W_O."""
    (attention,) = layer.attentions
    if attention.kv_heads != attention.heads:
        raise ValueError(f"{attention.name}: {attention.heads} heads share {attention.kv_heads}")
    for table in (
        attention.query_weight(),
        attention.key_weight(),
        attention.value_weight(),
        attention.output_weight(),
        attention.query_bias(),
        attention.key_bias(),
        attention.value_bias(),
    ):
        if table is not None:
            table.copy_(table[list(order)].clone())


@torch.no_grad()
def permute_channels(layer: LayerView, order: Sequence[int], both: bool = True) -> None:
    """Channels of a layer's feed-forward part in another order; `both`: up and down."""
    assert layer.mlp is not None
    ups = (child(layer.mlp, name) for name in ("up", "gate", "up_proj", "gate_proj", "fc1"))
    for module in [m for m in ups if m is not None] if both else []:
        for table in (module.weight, module.bias):
            if isinstance(table, Tensor):
                table.copy_(table[list(order)].clone())
    weight = features_first(down_projection(layer))
    weight.copy_(weight[:, list(order)].clone())


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1, 2)
OLD = MultiQueryRecall(pairs=4, length=32, vocabulary=32, power=1.0)


def recaller(seed: int) -> Decoder:
    """Joins neighbours, then two attentions with an Mlp each."""

    def mixer(layer: int) -> Mixer:
        return Attention(64, 8, causal=True) if layer else TokenShift(64, causal=True)

    with seeded(seed):
        return Decoder(32, 64, 3, mixer, feed=lambda layer: Mlp(64, 128), tied=False)


class Moved(MultiQueryRecall):
    """The new task: the answer is the value's successor."""

    def batch(self, step: int, size: int, split: str = "train") -> Batch:
        found = super().batch(step, size, split)
        asked = found.targets >= 0
        first = self.vocabulary // 2  # values are the upper half of the tokens
        moved = (found.targets + 1 - first) % (self.vocabulary - first) + first
        return replace(found, targets=torch.where(asked, moved, found.targets))


NEW = Moved(pairs=4, length=32, vocabulary=32, power=1.0)
SHARE = 0.25
Tune = Callable[[nn.Module, Task, int], list[Split]]


@cache
def trained(seed: int) -> nn.Module:
    model = recaller(seed)
    fit(model, OLD, steps=150, size=32, rate=5e-3, seed=seed)
    return model.eval()


def blocks(model: nn.Module, task: Task, seed: int) -> list[Split]:
    """Chosen blocks are trained."""
    splits = s2ft(model, SHARE, seed)
    fit(model, task, 120, 32, 2e-2, decay=0.0, seed=seed, parameters=[s.trained for s in splits])
    return splits


def everything(model: nn.Module, task: Task, seed: int) -> list[Split]:
    """The control: all is trained, the blocks among it."""
    splits = s2ft(model, SHARE, seed)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    fit(model, task, 120, 32, 5e-3, decay=0.0, seed=seed)
    return splits


def both_sides(layer: LayerView, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    permute_heads(layer, torch.randperm(layer.attentions[0].heads, generator=random).tolist())
    permute_channels(layer, torch.randperm(128, generator=random).tolist())


def one_side(layer: LayerView, seed: int) -> None:
    """The control: channels of W_down move, those of up stay."""
    random = torch.Generator().manual_seed(seed)
    permute_channels(layer, torch.randperm(128, generator=random).tolist(), both=False)


@claim(subject=both_sides, control=one_side, unit="largest difference of logits", seeds=SEEDS)
def order_does_not_matter(permute: Callable[[LayerView, int], None], seed: int) -> Measured:
    """Heads and channels in another order, on both sides, leave the model's answers as they were,
    to 1e-4 of logits of about 2."""
    model = recaller(seed)
    tokens = OLD.batch(seed, 8).inputs
    want = model(**tokens)
    for layer in view(model).layers:
        if layer.attentions:
            permute(layer, seed)
    return at_most((model(**tokens) - want).abs().max(), 1e-4, size=want.abs().max())


STEPS = 20
Weights = dict[str, Tensor]
"""Of W_O and W_down of each layer, by name."""


def by_blocks(model: nn.Module, seed: int) -> Weights:
    """The chosen blocks, trained alone by plain gradient steps."""
    splits = s2ft(model, SHARE, seed)
    for step in range(STEPS):
        descend_once(model, [split.trained for split in splits], step)
    names = {id(m): name for name, m in model.named_modules()}
    return {names[id(split)]: split.weight.detach() for split in splits}


def by_whole_matrices(model: nn.Module, seed: int, mask: bool = False) -> Weights:
    """The control: all columns of W_O and W_down. With `mask`, the reference: gradients of the
    columns that were not chosen are set to zero."""
    limits = {}
    for split in s2ft(model, SHARE, seed):
        out, wide = split.weight.shape
        linear = nn.Linear(wide, out)
        with torch.no_grad():
            linear.weight.copy_(split.weight)
            linear.bias.copy_(torch.zeros(out) if split.bias is None else split.bias)
        put_in_place(model, split, linear)
        limits[linear] = split.trained.shape[1] if mask else wide
    for step in range(STEPS):
        descend_once(model, [linear.weight for linear in limits], step, list(limits.values()))
    names = {id(m): name for name, m in model.named_modules()}
    return {names[id(linear)]: linear.weight.detach() for linear in limits}


def descend_once(
    model: nn.Module, weights: Sequence[Tensor], step: int, limits: list[int] | None = None
) -> None:
    batch = NEW.batch(step, 16)
    with torch.enable_grad():
        logits = model(**batch.inputs).flatten(0, 1)
        loss = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED)
        gradients = torch.autograd.grad(loss, weights)
    with torch.no_grad():
        for n, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            if limits is not None:
                gradient[:, limits[n] :] = 0
            weight.sub_(0.3 * gradient)


@claim(subject=by_blocks, control=by_whole_matrices, unit="largest difference", seeds=SEEDS)
def it_is_masked_training(tune: Callable[..., Weights], seed: int) -> Measured:
    """After 20 steps every weight is, to 1e-4, what plain training makes of it with the gradients
    of the other columns set to zero; so the other columns are as they were."""
    got = tune(copy.deepcopy(trained(seed)), seed)
    want = by_whole_matrices(copy.deepcopy(trained(seed)), seed, mask=True)
    return at_most(max(float((got[n] - want[n]).abs().max()) for n in want), 1e-4)


def split_layer(linear: nn.Linear) -> nn.Module:
    return Split(linear, 32)


def whole_layer(linear: nn.Linear) -> nn.Module:
    """The control: gradients of other columns are thrown away after they were made."""
    return linear


@claim(subject=split_layer, control=whole_layer, unit="share of the layer's input")
def only_the_chosen_inputs_are_kept(make: Callable[[nn.Linear], nn.Module], seed: int) -> Measured:
    """A layer with a quarter of its columns trained keeps a quarter of its input for the backward
    pass."""
    layer, x = make(nn.Linear(128, 64)), torch.randn(10, 50, 128)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf or not tensor.requires_grad:  # parameters are there anyhow
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        held = layer(x)
    assert held.requires_grad
    return at_most(sum(kept.values()) / x.nbytes, 0.26)


@claim(subject=blocks, control=everything, unit="share of right answers", seeds=SEEDS, quick=False)
def adapters_are_switched(tune: Tune, seed: int) -> Measured:
    """A quarter of heads and channels, a tenth of the weights, learns new answers; with the adapter
    off the old ones are back: at least 95 % are right in the worse of the two. Where everything
    was trained, taking off the blocks brings nothing back."""
    model = copy.deepcopy(trained(seed))
    splits = tune(model, NEW, seed)
    adapters = [split.adapter() for split in splits]
    new = evaluate(model, NEW, 4)["accuracy"]
    for split in splits:
        split.put(None)
    old = evaluate(model, OLD, 4)["accuracy"]
    for split, adapter in zip(splits, adapters, strict=True):
        split.put(adapter)
    again = evaluate(model, NEW, 4)["accuracy"]
    return at_least(min(new, old, again), 0.95, new=new, old=old)
