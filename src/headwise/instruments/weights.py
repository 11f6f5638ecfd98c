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

import numpy as np
import torch
from torch import Tensor

from headwise.instruments.columns import columns
from headwise.instruments.factored import Factored
from headwise.instruments.folded import query_and_key, value_and_output
from headwise.instruments.gains import find_gain
from headwise.instruments.readout import output_stack
from headwise.instruments.token_tables import embedding_table, unembedding_table
from headwise.models import UnsupportedModelError
from headwise.models.structure import AttentionView, ModelView

__all__ = ["Weights", "weight_scores"]

_ROWS = 16384  # of the vocabulary, converted to the working dtype at a time


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
        self._view = view
        self._grams: dict[tuple[int, int], Tensor] = {}
        self._matching: dict[str, Tensor | str] = {}
        self._copying: dict[str, Tensor | str] = {}
        output = output_stack(view)
        for stack in view.stacks:
            table = embedding_table(view, stack)
            told = f"ov_copying, qk_matching: {table}" if isinstance(table, str) else table
            self._matching[stack] = self._gram(told, told)
            there = unembedding_table(view)
            self._copying[stack] = (
                self._gram(told, f"ov_copying: {there}" if isinstance(there, str) else there)
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
                value, output = value_and_output(self._view, attention, self.dtype)
                written = Factored(output.double(), _of_heads(attention, value).double())
                scores["output_norm"] = written.norm().cpu()
                scores["ov_copying"] = self._copies(attention, value, output)
                scores["qk_matching"] = self._matches(attention)
        except UnsupportedModelError as error:
            self._note(f"weights: {error}")
        return scores

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
        through = _of_heads(attention, value @ gram.to(value))
        return _sign_of_eigenvalues(through.double() @ seen.double())

    def _matches(self, attention: AttentionView) -> Tensor:
        gram = self._matching[attention.stack]
        if attention.kind == "cross":
            gram = "qk_matching: cross-attention compares tokens with another sequence's states"
        if isinstance(gram, str):
            return self._nothing(attention, gram)
        query, key = query_and_key(attention, self.dtype)
        through = _of_heads(attention, key @ gram.to(key))
        return _sign_of_eigenvalues(through.double() @ query.double().mT)

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

    def _nothing(self, attention: AttentionView, reason: str) -> Tensor:
        self._note(reason)
        return torch.full((attention.heads,), torch.nan, dtype=torch.float64)

    def _note(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)


def weight_scores(
    view: ModelView, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Column -> (n_heads,) float64 for all heads in the order of `view.attentions`, and why some
    are NaN."""
    weights = Weights(view, dtype)
    read = [weights.read(attention) for attention in view.attentions]
    names = [column.name for column in Weights.columns]
    return {n: torch.cat([scores[n] for scores in read]).numpy() for n in names}, weights.reasons


def _of_heads(attention: AttentionView, weight: Tensor) -> Tensor:
    """One for each head, of what heads of a group share."""
    return weight.repeat_interleave(attention.heads // attention.kv_heads, 0)


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
