"""What each number of an Atlas means: one list of columns, with units and sources.

Instruments name their columns by the entries here, so a column has one description wherever it is
shown. Shares lie between 0 and 1. Means are over the query rows of all inputs; rows and keys that
are padding count for nothing. NaN means: not measured on this model.
"""

from dataclasses import dataclass

__all__ = ["COLUMNS", "HEAD_COLUMNS", "LAYER_COLUMNS", "Column", "columns"]


@dataclass(frozen=True)
class Column:
    """One column of an Atlas.

    name: the key in `Atlas.heads` or `Atlas.layers`.
    unit: "share", "nats", "keys", "tokens", "ratio", "cosine", "norm", "score", "index", "name".
    description: one sentence on what is measured.
    source: paper and equation, or the definition in a formula.
    """

    name: str
    unit: str
    description: str
    source: str = ""


_ELHAGE = "Elhage et al. 2021, A Mathematical Framework for Transformer Circuits"
_OLSSON = "Olsson et al. 2022, arXiv 2209.11895"
_CLARK = "Clark et al. 2019, arXiv 1906.04341"
_GU = "Gu et al. 2024, arXiv 2410.10781"
_GUO = "Guo et al. 2024, arXiv 2410.13835"

_IDENTITY = (
    Column("layer", "index", "Layer of the head, counted from 0 in its stack."),
    Column("head", "index", "Query head in its layer, counted from 0."),
    Column("stack", "name", "Stack of layers the head belongs to: decoder, encoder, vision ..."),
    Column("attention", "name", "self, or cross where the keys come from another sequence."),
    Column("kind", "name", "What the head mostly does; its reason gives numbers and thresholds."),
)

_SINKS = (
    Column(
        "sink_mass",
        "share",
        "Mass on the first token that is not padding.",
        f"Xiao et al. 2023, arXiv 2309.17453; {_GU}, section 3",
    ),
    Column(
        "found_sink_mass",
        "share",
        "Mass on sinks found anywhere: keys whose mean weight over the rows that see them is high, "
        "and the learned sink if there is one.",
        f"{_GU}, section 3 (mean weight above 0.3, over at least 64 rows, or a quarter of them)",
    ),
    Column(
        "learned_sink_mass",
        "share",
        "Mass on a learned sink, a logit that is no key; NaN in models without one.",
        "1 - sum_j p_ij; OpenAI 2025, arXiv 2508.10925 (gpt-oss)",
    ),
    Column(
        "dormant_share",
        "share",
        "Share of inputs on which more than half of the head's mass goes to sinks: the first "
        "token, sinks found anywhere, a learned one.",
        f"{_GUO} (active and dormant heads)",
    ),
    Column(
        "value_drain",
        "ratio",
        "Mean norm of the values at the sinks found over that of the other values; far below 1: "
        "drained. NaN for a head without such sinks.",
        f"{_GUO} (value-state drain)",
    ),
    Column(
        "received_concentration",
        "share",
        "How few keys receive the mass: 1 if one key gets all, 1/n if all n get the same.",
        "sum_j c_j^2 with c_j = received_j / sum of received (Herfindahl index)",
    ),
)

_SHAPE = (
    Column("entropy", "nats", "Entropy of a row of the map.", f"{_CLARK}, section 3.3"),
    Column(
        "entropy_share",
        "share",
        "Entropy as a share of the largest possible: 1 if all visible keys weigh the same.",
        "sum_i H_i / sum_i ln(number of keys that row i may see)",
    ),
    Column(
        "effective_keys",
        "keys",
        "Effective number of keys a row attends to.",
        "mean_i exp(H_i); Hill 1973, order 1",
    ),
    Column(
        "max_weight",
        "share",
        "Largest weight of a row.",
        "Voita et al. 2019, arXiv 1905.09418, section 3 (confidence)",
    ),
    Column(
        "mean_distance",
        "tokens",
        "Distance i - j back to the keys, weighted by the map; negative: ahead.",
        "Vig and Belinkov 2019, arXiv 1906.04284, section 4",
    ),
    Column(
        "distance_std",
        "tokens",
        "Standard deviation of the distance inside a row.",
        "mean_i sqrt(sum_j p_ij (i - j - mean_i)^2)",
    ),
)

_PLACES = (
    Column("self_mass", "share", "Mass on the token itself.", f"{_CLARK}, section 3.1"),
    Column("previous_mass", "share", "Mass on the token just before.", f"{_CLARK}, section 3.1"),
    Column("next_mass", "share", "Mass on the token just after.", f"{_CLARK}, section 3.1"),
    Column("local_8", "share", "Mass on keys nearer than 8 tokens.", "|i - j| < 8"),
    Column("local_64", "share", "Mass on keys nearer than 64 tokens.", "|i - j| < 64"),
    Column(
        "delimiter_mass",
        "share",
        "Mass on punctuation, line ends and special tokens.",
        f"{_CLARK}, section 3.2",
    ),
    Column(
        "positional",
        "share",
        "Mass explained by offset alone on the given input: what each row shares with the head's "
        "mean offset profile, over offsets nearer than 8.",
        "mean_i sum_d min(p_i,i-d , a_d) with a_d = mean_i p_i,i-d and |d| < 8",
    ),
    Column(
        "positional_random",
        "share",
        "The same on random tokens, where the content of one row says nothing about another.",
        "as positional, on the repeated random sequence",
    ),
)

_CONTENT = (
    Column(
        "same_token",
        "share",
        "Mass on earlier places of the same token, on the given text (on all other places, where "
        "the model looks ahead).",
        "Wang et al. 2022, arXiv 2211.00593 (duplicate token heads)",
    ),
    Column(
        "induction_text",
        "share",
        "Mass on tokens that follow an earlier place of the same token, itself left out, on the "
        "given text.",
        f"{_OLSSON} (prefix matching)",
    ),
    Column(
        "induction_score",
        "share",
        "Mass on the token after the earlier place of the same token, second half of a repeated "
        "random sequence.",
        f"{_OLSSON}, prefix matching score",
    ),
    Column(
        "previous_token_score",
        "share",
        "Mass on the token just before, on random tokens.",
        f"{_OLSSON}, previous token heads",
    ),
    Column(
        "duplicate_token_score",
        "share",
        "Mass on the earlier place of the same token, second half of a repeated random sequence.",
        "Wang et al. 2022, arXiv 2211.00593 (duplicate token heads)",
    ),
    Column(
        "retrieval_score",
        "share",
        "Share of needle tokens that the head copies: where a token of a needle, a span of the "
        "given text, is to be repeated next, the largest weight lies on its place in the needle.",
        "Wu et al. 2024, arXiv 2404.15574, equation 1",
    ),
)

_EFFECT = (
    Column(
        "residual_share",
        "ratio",
        "Norm of what the head writes over the norm of the residual stream at the layer's input.",
        "mean_i |W_O o_i| / |x_i|; Kobayashi et al. 2020, arXiv 2004.10102, equation 4",
    ),
    Column(
        "ov_copying",
        "score",
        "Copying score from the weights: 1 if attending to a token raises that token's own logit, "
        "-1 if it lowers it.",
        f"{_ELHAGE}, eigenvalues of W_U W_O W_V W_E: sum(lambda) / sum(|lambda|)",
    ),
    Column(
        "qk_matching",
        "score",
        "Matching score from the weights, positions left out: 1 if tokens look for themselves, "
        "-1 if they avoid themselves.",
        f"{_ELHAGE}, eigenvalues of W_E^T W_Q^T W_K W_E: sum(lambda) / sum(|lambda|)",
    ),
    Column(
        "output_norm",
        "norm",
        "Frobenius norm of the output-value circuit, gains of the norms around it folded in.",
        f"|W_O W_V|_F; {_ELHAGE}",
    ),
    Column(
        "similarity",
        "cosine",
        "Cosine of the head's map with that of the most similar other head: mean over 32 rows of "
        "each input, one from each of 32 equal parts, the same rows for all heads.",
        "mean_i <p_a,i , p_b,i> / (|p_a,i| |p_b,i|)",
    ),
    Column(
        "similarity_rest",
        "cosine",
        "The same with the first key left out: heads with a large sink are all alike in it.",
        "mean_i of the cosine over keys other than the first",
    ),
    Column(
        "similar_to", "index", "Row of this table that holds the most similar other head; -1: none."
    ),
)

_MICHEL = "Michel et al. 2019, arXiv 1905.10650"

_CAUSE = (
    Column(
        "effect",
        "score",
        "What taking the head out does: metric without it minus metric with it, mean over "
        "examples. Which metric, and what stood in its place, is in the provenance.",
        f"{_MICHEL}, section 3",
    ),
    Column("effect_se", "score", "Standard error of the effect over examples."),
    Column(
        "effect_gradient",
        "score",
        "The effect estimated to first order: (replacement - output) . gradient of the metric.",
        f"{_MICHEL}, equation 2; Syed et al. 2023, arXiv 2310.10348 (attribution patching)",
    ),
    Column(
        "effect_integrated",
        "score",
        "The effect estimated with the mean gradient on the way to the replacement, the heads of "
        "an attention moving together.",
        "Sundararajan et al. 2017, arXiv 1703.01365; Hao et al. 2021, arXiv 2004.11207",
    ),
)

_LAYER_CAUSE = tuple(
    Column(f"{part}_effect{se}", "score", f"{what}{whole}, as in effect of heads.")
    for part, whole in (
        ("layer", "the whole layer (it adds nothing)"),
        ("attention", "the layer's self-attention"),
        ("cross_attention", "the layer's cross-attention"),
        ("mlp", "the layer's feed-forward part"),
    )
    for se, what in (("", "What taking out "), ("_se", "Standard error of the effect of "))
)

_LAYERS = (
    Column("layer", "index", "Layer, counted from 0 in its stack."),
    Column("stack", "name", "Stack of layers: decoder, encoder, vision ..."),
    Column("residual_norm", "norm", "Norm of the residual stream after the layer, mean of tokens."),
    Column(
        "residual_peak",
        "norm",
        "Largest magnitude of any number in the residual stream after the layer.",
        "Sun et al. 2024, arXiv 2402.17762 (massive activations)",
    ),
    Column(
        "residual_peak_ratio",
        "ratio",
        "That peak over the median magnitude, taken over at most 256 tokens.",
        "Sun et al. 2024, arXiv 2402.17762",
    ),
    Column(
        "attention_share",
        "share",
        "Share of the attention in the layer's update of the residual stream.",
        "|attention| / (|attention| + |mlp|), norms of what each adds",
    ),
    Column(
        "update_share",
        "ratio",
        "Norm of the layer's whole update over the norm of what came in.",
        "|x_out - x_in| / |x_in|",
    ),
    Column(
        "next_similarity",
        "cosine",
        "How much the layer's maps are like the next layer's: mean over its heads of the best "
        "cosine with a head there.",
        "mean_a max_b cosine(P_a, P_b)",
    ),
)

HEAD_COLUMNS: tuple[Column, ...] = (
    _IDENTITY + _SINKS + _SHAPE + _PLACES + _CONTENT + _EFFECT + _CAUSE
)
LAYER_COLUMNS: tuple[Column, ...] = _LAYERS + _LAYER_CAUSE

# name -> Column for both tables; identity columns read the same in either
COLUMNS: dict[str, Column] = {c.name: c for c in LAYER_COLUMNS + HEAD_COLUMNS}


def columns(*names: str) -> tuple[Column, ...]:
    """The columns of these names, in this order, as an instrument declares them.

    Raises KeyError for a name that is not in the list.
    """
    missing = [name for name in names if name not in COLUMNS]
    if missing:
        raise KeyError(f"no column named {', '.join(missing)}; known: {', '.join(sorted(COLUMNS))}")
    return tuple(COLUMNS[name] for name in names)
