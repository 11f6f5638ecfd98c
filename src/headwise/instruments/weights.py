"""What the weights alone say of a head: does it copy, does it match, how much can it write.

After Elhage et al. 2021, A Mathematical Framework for Transformer Circuits, sections "OV and QK
circuits" and "copying": a head's OV circuit W_U W_O W_V W_E maps an attended token to the logits
it raises, its QK circuit W_E^T W_Q^T W_K W_E gives how much a token looks for another. Both are
vocabulary by vocabulary, but have the rank of a head, and the eigenvalues of A B other than zero
are those of B A: so everything is computed from head_dim by head_dim products through the Gram
matrices E^T U and E^T E (width by width), each of which is formed once for a model.

Folded in, where a model has them: gains and centring of the norm that feeds the attention, of the
norms of queries and keys, of a norm or scale behind the attention, and of the final norm. Left
out, because they are not linear or not there for a token alone: division by a norm's size,
biases, positions (learned, rotary: the score is the one at distance 0; relative biases), MLPs and
other heads.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from headwise.instruments.columns import columns
from headwise.instruments.gains import Gain, find_gain
from headwise.models import UnsupportedModelError
from headwise.models.structure import AttentionView, LayerView, ModelView

__all__ = ["Weights", "weight_scores"]

_ROWS = 16384  # of the vocabulary, converted to the working dtype at a time
_KEY_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_norm", "key_norm"))


class Weights:
    """`ov_copying`, `qk_matching` and `output_norm` of every head of a model.

    Making one forms the Gram matrices (2 vocab width^2 operations each, vocab x width is read in
    pieces); reading an attention costs about 2 kv_heads head_dim width^2 for each score.
    dtype: of the products with a width; head_dim by head_dim matrices are always float64.
    """

    name = "weights"
    stimulus = "weights"
    columns = columns("ov_copying", "qk_matching", "output_norm")

    def __init__(self, view: ModelView, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.reasons: list[str] = []
        """Why scores are NaN, one sentence a cause; filled while attentions are read."""
        self._layers = {id(a): layer for layer in view.layers for a in layer.attentions}
        self._grams: dict[tuple[int, int], Tensor] = {}
        self._matching: dict[str, Tensor | str] = {}
        self._copying: dict[str, Tensor | str] = {}
        output = next((s for s in ("decoder", "text") if s in view.stacks), view.stacks[-1])
        for stack in view.stacks:
            table = _embedding(view, stack, stack == output)
            self._matching[stack] = self._gram(table, table)
            self._copying[stack] = (
                self._gram(table, _unembedding(view))
                if stack == output
                else f"ov_copying: what stack {stack} writes reaches no unembedding by itself"
            )
        self._final = find_gain(view.final_norm, view.width)

    def read(self, attention: AttentionView) -> dict[str, Tensor]:
        """Column -> (heads,) float64 on the CPU; NaN where `reasons` says why."""
        nothing = torch.full((attention.heads,), torch.nan, dtype=torch.float64)
        scores = dict.fromkeys((column.name for column in self.columns), nothing)
        try:
            with torch.no_grad():
                before, value, output = self._write_circuit(attention)
                scores["output_norm"] = _product_norm(output, value)
                scores["ov_copying"] = self._copies(attention, value, output)
                scores["qk_matching"] = self._matches(attention, before)
        except _NotMeasuredError as reason:
            self._note(str(reason))
        except UnsupportedModelError as error:
            self._note(f"weights: {error}")
        return scores

    # the OV circuit

    def _write_circuit(self, attention: AttentionView) -> tuple[Gain, Tensor, Tensor]:
        """What feeds the attention; W_V (heads, d, in_width) and W_O (heads, width, d), folded."""
        output = self._working(attention.output_weight())
        after = _module_behind(self._layers.get(id(attention)), attention)
        output = self._known(find_gain(after, output.shape[-2])).after_output(output)
        value = self._working(attention.value_weight())
        # keys and values of cross-attention come from the encoder, past this norm
        norm = None if attention.kind == "cross" else attention.norm
        before = self._known(find_gain(norm, value.shape[-1]))
        groups = attention.heads // attention.kv_heads
        return before, before.into_input(value).repeat_interleave(groups, 0), output

    def _copies(self, attention: AttentionView, value: Tensor, output: Tensor) -> Tensor:
        gram = self._copying[attention.stack]
        if attention.kind == "cross":
            gram = "ov_copying: cross-attention reads another sequence's states, not tokens"
        if isinstance(gram, str):
            return self._nothing(attention, gram)
        if isinstance(self._final, str):
            return self._nothing(attention, f"ov_copying: {self._final}")
        seen = self._final.after_output(output)
        # heads of a group share W_V: multiply by the Gram matrix once for each
        groups = attention.heads // attention.kv_heads
        through = (value[::groups] @ gram.to(value)).repeat_interleave(groups, 0)
        return _sign_of_eigenvalues(through.double() @ seen.double())

    # the QK circuit

    def _matches(self, attention: AttentionView, before: Gain) -> Tensor:
        gram = self._matching[attention.stack]
        if attention.kind == "cross":
            gram = "qk_matching: cross-attention compares tokens with another sequence's states"
        if isinstance(gram, str):
            return self._nothing(attention, gram)
        query, key = self._query_and_key(attention)
        query, key = before.into_input(query), before.into_input(key)
        groups = attention.heads // attention.kv_heads
        through = (key @ gram.to(key)).repeat_interleave(groups, 0)
        return _sign_of_eigenvalues(through.double() @ query.double().mT)

    def _query_and_key(self, attention: AttentionView) -> tuple[Tensor, Tensor]:
        query = self._working(attention.query_weight())
        key = self._working(attention.key_weight())
        for names in _KEY_NORMS:
            norms = [getattr(attention.module, name, None) for name in names]
            if all(isinstance(norm, nn.Module) for norm in norms):
                return self._normed(norms[0], query), self._normed(norms[1], key)
        return query, key

    def _normed(self, norm: nn.Module | None, weight: Tensor) -> Tensor:
        """W (heads, d, width) with a norm over each head, or over all heads together."""
        per_head = find_gain(norm, weight.shape[1])
        if isinstance(per_head, Gain):
            return per_head.after_output(weight)
        flat = weight.flatten(0, 1)
        return self._known(find_gain(norm, len(flat))).after_output(flat).view_as(weight)

    # tables of the vocabulary

    def _gram(self, left: Tensor | str, right: Tensor | str) -> Tensor | str:
        """left^T right (width, width) of two (vocab, width) tables, formed once for each pair."""
        if isinstance(left, str) or isinstance(right, str):
            return left if isinstance(left, str) else str(right)
        if left.shape != right.shape:
            return (
                f"ov_copying: embedding {tuple(left.shape)} and unembedding {tuple(right.shape)} "
                "are not of the same tokens"
            )
        pair = (left.data_ptr(), right.data_ptr())
        if pair not in self._grams:
            gram = torch.zeros(left.shape[1], left.shape[1], dtype=self.dtype, device=left.device)
            with torch.no_grad():
                for start in range(0, len(left), _ROWS):
                    rows = slice(start, start + _ROWS)
                    there = right[rows].to(left.device, self.dtype)
                    gram += left[rows].to(self.dtype).mT @ there
            self._grams[pair] = gram
        return self._grams[pair]

    def _working(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.dtype)

    def _known(self, gain: Gain | str) -> Gain:
        if isinstance(gain, str):
            raise _NotMeasuredError(f"weights: {gain}")
        return gain

    def _nothing(self, attention: AttentionView, reason: str) -> Tensor:
        self._note(reason)
        return torch.full((attention.heads,), torch.nan, dtype=torch.float64)

    def _note(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)


class _NotMeasuredError(Exception):
    """Carries the reason out of a computation that cannot go on."""


def weight_scores(
    view: ModelView, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Column -> (n_heads,) float64 for all heads in the order of `view.attentions`, and why some
    are NaN."""
    weights = Weights(view, dtype)
    read = [weights.read(attention) for attention in view.attentions]
    names = [column.name for column in Weights.columns]
    return {n: torch.cat([scores[n] for scores in read]).numpy() for n in names}, weights.reasons


def _embedding(view: ModelView, stack: str, speaks: bool) -> Tensor | str:
    """The (vocab, width) table of tokens that feeds a stack, or the reason why there is none."""
    for table in _tables(view, stack, speaks):
        if isinstance(table, Tensor) and table.dim() == 2 and table.shape[1] == view.width:
            return table
    return f"ov_copying, qk_matching: no embedding of tokens at the width of stack {stack}"


def _unembedding(view: ModelView) -> Tensor | str:
    """The (vocab, width) table that gives logits, or the reason why none does so linearly."""
    if view.unembedding is None:
        return f"ov_copying: {type(view.model).__name__} has no unembedding of its width"
    if not view.causal:
        return (
            f"ov_copying: the head of {type(view.model).__name__} transforms the residual "
            "before it unembeds it, which no product of weights describes"
        )
    return view.unembedding


def _tables(view: ModelView, stack: str, speaks: bool) -> Iterator[Tensor | None]:
    getter = getattr(view.owners.get(stack), "get_input_embeddings", None)
    if getter is not None and not speaks:
        try:
            module = getter()
        except NotImplementedError:  # a stack that is fed something else than tokens
            module = None
        yield module.weight if isinstance(module, nn.Embedding) else None
    if speaks:
        yield view.embedding


def _module_behind(layer: LayerView | None, attention: AttentionView) -> nn.Module | None:
    """A norm or scale between the attention and the residual, None if it is added as it is."""
    if layer is None or len(layer.attention_ends) != 1 or isinstance(attention.projections, str):
        return None
    (end,) = layer.attention_ends
    return None if end in (attention.module, attention.projections.output) else end


def _sign_of_eigenvalues(matrices: Tensor) -> Tensor:
    """sum(lambda) / sum(|lambda|) of (heads, d, d), which is real: 1 if all are positive."""
    matrices = matrices.cpu()
    try:
        sizes = torch.linalg.eigvals(matrices).abs().sum(-1)
    except RuntimeError:  # LinAlgError is one: one without an answer takes all down
        sizes = torch.stack([_size_of_eigenvalues(matrix) for matrix in matrices])
    total = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.where(sizes > 0, total / sizes, torch.nan)  # NaN > 0 is False


def _size_of_eigenvalues(matrix: Tensor) -> Tensor:
    """sum(|lambda|) of (d, d); NaN where the iteration does not end, as it may on what rounding
    leaves of a product that is zero: its eigenvalues would mean nothing."""
    try:
        return torch.linalg.eigvals(matrix).abs().sum()
    except RuntimeError:
        return matrix.new_full((), torch.nan)


def _product_norm(output: Tensor, value: Tensor) -> Tensor:
    """|W_O W_V|_F of (heads, width, d) and (heads, d, in_width), without their product."""
    left = output.double().mT @ output.double()
    right = value.double() @ value.double().mT
    return (left * right).sum((-2, -1)).clamp_min(0).sqrt().cpu()
