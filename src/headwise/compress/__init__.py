"""Remove work for good: fewer heads, layers, tokens, keys and bits, with the price measured.

    headwise.compress.prune_heads(model, [(3, 1), (5, 0)])
    model.generate(**inputs, past_key_values=headwise.compress.HeadCache(model, budget=0.25))

Loaded lazily: torch is not imported before it is needed.
"""

from typing import TYPE_CHECKING

from headwise.lazy import names_of

if TYPE_CHECKING:
    from headwise.compress.bits.allocation import allocate
    from headwise.compress.bits.kept import KeptInBits
    from headwise.compress.bits.packed import PackBits, PackedBitLinear, pack_bits
    from headwise.compress.bits.quantised_linear import QuantisedLinear
    from headwise.compress.bits.sensitivities import Sensitivity, sensitivity
    from headwise.compress.bits.ternary import BitLinear, BitLinears, to_bit_linear
    from headwise.compress.bits.thresholded import Thresholded
    from headwise.compress.bits.thresholds import ThresholdActivations, threshold_activations
    from headwise.compress.bits.weights import Quantise, quantise
    from headwise.compress.cache.budgets import Adaptive, Budget, ByKind, PerHead, Pyramid, Uniform
    from headwise.compress.cache.clustered_cache import ClusteredCache
    from headwise.compress.cache.head_cache import HeadCache
    from headwise.compress.cache.head_clusters import HeadClusters, find_clusters, map_correlations
    from headwise.compress.cache.layer_bits import LayerBits, cache_sensitivity
    from headwise.compress.cache.layer_divergence import cache_divergence
    from headwise.compress.cache.policies.accumulated_mass import AccumulatedMass
    from headwise.compress.cache.policies.chance import Random
    from headwise.compress.cache.policies.key_norm import KeyNorm
    from headwise.compress.cache.policies.learned import Learned
    from headwise.compress.cache.policies.observation_window import ObservationWindow
    from headwise.compress.cache.policies.recency import SinksAndWindow
    from headwise.compress.cache.policies.reconstruction_error import ReconstructionError
    from headwise.compress.cache.policies.retaining import RetainingHeads, train_retaining_heads
    from headwise.compress.cache.policy import Policy, Seen
    from headwise.compress.cache.quantised import Coding, Quantised
    from headwise.compress.cache.shared_layers import SharedLayers, Sharing, find_sharing
    from headwise.compress.cache.store import Plain, Store
    from headwise.compress.saving import load, save
    from headwise.compress.search.curve import Curve
    from headwise.compress.search.harness import benchmark
    from headwise.compress.search.quality import measure_quality
    from headwise.compress.search.retrieval import retrieval
    from headwise.compress.search.searching import shrink
    from headwise.compress.search.targets import UnreachableError
    from headwise.compress.step import Step, steps_of, take
    from headwise.compress.structure.biases import AddBias
    from headwise.compress.structure.channels import PruneChannels, channel_scores, prune_channels
    from headwise.compress.structure.costs import Cost, cost
    from headwise.compress.structure.distillation import Distilled, distil
    from headwise.compress.structure.early_exit import Confidence, EarlyExit
    from headwise.compress.structure.fusing import Fused, fuse_layer
    from headwise.compress.structure.gates import Gates, head_gates
    from headwise.compress.structure.heads import PruneHeads, prune_heads
    from headwise.compress.structure.layer_routers import (
        open_share,
        route_attention,
        router_parameters,
    )
    from headwise.compress.structure.layers import DropLayers, drop_layers
    from headwise.compress.structure.low_rank import Factorise, LowRank, factorise
    from headwise.compress.structure.merging import merge_layers
    from headwise.compress.structure.mixtures import Densified, MixtureToDense, mixture_to_dense
    from headwise.compress.structure.recovery import Recovery, compensate
    from headwise.compress.structure.recurrent_heads import (
        most_recent,
        recency_ratio,
        replace_heads,
    )
    from headwise.compress.structure.reordering import ReorderLayers, reorder_layers
    from headwise.compress.structure.shared_maps import (
        map_similarity,
        share_attention,
        similar_block,
    )
    from headwise.compress.structure.sharing import ShareLayers, share_layers
    from headwise.compress.structure.similarity import LayerSimilarity, layer_similarity
    from headwise.compress.tokens.reducing import ReduceTokens, reduce_tokens
    from headwise.compress.tokens.reduction import Reduction

_EXPORTS = {
    "AccumulatedMass": "headwise.compress.cache.policies.accumulated_mass",
    "Adaptive": "headwise.compress.cache.budgets",
    "AddBias": "headwise.compress.structure.biases",
    "BitLinear": "headwise.compress.bits.ternary",
    "BitLinears": "headwise.compress.bits.ternary",
    "Budget": "headwise.compress.cache.budgets",
    "ByKind": "headwise.compress.cache.budgets",
    "ClusteredCache": "headwise.compress.cache.clustered_cache",
    "Coding": "headwise.compress.cache.quantised",
    "Confidence": "headwise.compress.structure.early_exit",
    "Cost": "headwise.compress.structure.costs",
    "Curve": "headwise.compress.search.curve",
    "Densified": "headwise.compress.structure.mixtures",
    "Distilled": "headwise.compress.structure.distillation",
    "DropLayers": "headwise.compress.structure.layers",
    "EarlyExit": "headwise.compress.structure.early_exit",
    "Factorise": "headwise.compress.structure.low_rank",
    "Fused": "headwise.compress.structure.fusing",
    "Gates": "headwise.compress.structure.gates",
    "HeadCache": "headwise.compress.cache.head_cache",
    "HeadClusters": "headwise.compress.cache.head_clusters",
    "KeptInBits": "headwise.compress.bits.kept",
    "KeyNorm": "headwise.compress.cache.policies.key_norm",
    "LayerBits": "headwise.compress.cache.layer_bits",
    "LayerSimilarity": "headwise.compress.structure.similarity",
    "Learned": "headwise.compress.cache.policies.learned",
    "LowRank": "headwise.compress.structure.low_rank",
    "MixtureToDense": "headwise.compress.structure.mixtures",
    "ObservationWindow": "headwise.compress.cache.policies.observation_window",
    "PackBits": "headwise.compress.bits.packed",
    "PackedBitLinear": "headwise.compress.bits.packed",
    "PerHead": "headwise.compress.cache.budgets",
    "Plain": "headwise.compress.cache.store",
    "Policy": "headwise.compress.cache.policy",
    "PruneChannels": "headwise.compress.structure.channels",
    "PruneHeads": "headwise.compress.structure.heads",
    "Pyramid": "headwise.compress.cache.budgets",
    "Quantise": "headwise.compress.bits.weights",
    "Quantised": "headwise.compress.cache.quantised",
    "QuantisedLinear": "headwise.compress.bits.quantised_linear",
    "Random": "headwise.compress.cache.policies.chance",
    "ReconstructionError": "headwise.compress.cache.policies.reconstruction_error",
    "Recovery": "headwise.compress.structure.recovery",
    "ReduceTokens": "headwise.compress.tokens.reducing",
    "Reduction": "headwise.compress.tokens.reduction",
    "ReorderLayers": "headwise.compress.structure.reordering",
    "RetainingHeads": "headwise.compress.cache.policies.retaining",
    "Seen": "headwise.compress.cache.policy",
    "Sensitivity": "headwise.compress.bits.sensitivities",
    "ShareLayers": "headwise.compress.structure.sharing",
    "SharedLayers": "headwise.compress.cache.shared_layers",
    "Sharing": "headwise.compress.cache.shared_layers",
    "SinksAndWindow": "headwise.compress.cache.policies.recency",
    "Step": "headwise.compress.step",
    "Store": "headwise.compress.cache.store",
    "ThresholdActivations": "headwise.compress.bits.thresholds",
    "Thresholded": "headwise.compress.bits.thresholded",
    "Uniform": "headwise.compress.cache.budgets",
    "UnreachableError": "headwise.compress.search.targets",
    "allocate": "headwise.compress.bits.allocation",
    "benchmark": "headwise.compress.search.harness",
    "cache_divergence": "headwise.compress.cache.layer_divergence",
    "cache_sensitivity": "headwise.compress.cache.layer_bits",
    "channel_scores": "headwise.compress.structure.channels",
    "compensate": "headwise.compress.structure.recovery",
    "cost": "headwise.compress.structure.costs",
    "distil": "headwise.compress.structure.distillation",
    "drop_layers": "headwise.compress.structure.layers",
    "factorise": "headwise.compress.structure.low_rank",
    "find_clusters": "headwise.compress.cache.head_clusters",
    "find_sharing": "headwise.compress.cache.shared_layers",
    "fuse_layer": "headwise.compress.structure.fusing",
    "head_gates": "headwise.compress.structure.gates",
    "layer_similarity": "headwise.compress.structure.similarity",
    "load": "headwise.compress.saving",
    "map_correlations": "headwise.compress.cache.head_clusters",
    "map_similarity": "headwise.compress.structure.shared_maps",
    "measure_quality": "headwise.compress.search.quality",
    "merge_layers": "headwise.compress.structure.merging",
    "mixture_to_dense": "headwise.compress.structure.mixtures",
    "most_recent": "headwise.compress.structure.recurrent_heads",
    "open_share": "headwise.compress.structure.layer_routers",
    "pack_bits": "headwise.compress.bits.packed",
    "prune_channels": "headwise.compress.structure.channels",
    "prune_heads": "headwise.compress.structure.heads",
    "quantise": "headwise.compress.bits.weights",
    "recency_ratio": "headwise.compress.structure.recurrent_heads",
    "reduce_tokens": "headwise.compress.tokens.reducing",
    "reorder_layers": "headwise.compress.structure.reordering",
    "replace_heads": "headwise.compress.structure.recurrent_heads",
    "retrieval": "headwise.compress.search.retrieval",
    "route_attention": "headwise.compress.structure.layer_routers",
    "router_parameters": "headwise.compress.structure.layer_routers",
    "save": "headwise.compress.saving",
    "sensitivity": "headwise.compress.bits.sensitivities",
    "share_attention": "headwise.compress.structure.shared_maps",
    "share_layers": "headwise.compress.structure.sharing",
    "shrink": "headwise.compress.search.searching",
    "similar_block": "headwise.compress.structure.shared_maps",
    "steps_of": "headwise.compress.step",
    "take": "headwise.compress.step",
    "threshold_activations": "headwise.compress.bits.thresholds",
    "to_bit_linear": "headwise.compress.bits.ternary",
    "train_retaining_heads": "headwise.compress.cache.policies.retaining",
}

__all__ = [
    "AccumulatedMass",
    "Adaptive",
    "AddBias",
    "BitLinear",
    "BitLinears",
    "Budget",
    "ByKind",
    "ClusteredCache",
    "Coding",
    "Confidence",
    "Cost",
    "Curve",
    "Densified",
    "Distilled",
    "DropLayers",
    "EarlyExit",
    "Factorise",
    "Fused",
    "Gates",
    "HeadCache",
    "HeadClusters",
    "KeptInBits",
    "KeyNorm",
    "LayerBits",
    "LayerSimilarity",
    "Learned",
    "LowRank",
    "MixtureToDense",
    "ObservationWindow",
    "PackBits",
    "PackedBitLinear",
    "PerHead",
    "Plain",
    "Policy",
    "PruneChannels",
    "PruneHeads",
    "Pyramid",
    "Quantise",
    "Quantised",
    "QuantisedLinear",
    "Random",
    "ReconstructionError",
    "Recovery",
    "ReduceTokens",
    "Reduction",
    "ReorderLayers",
    "RetainingHeads",
    "Seen",
    "Sensitivity",
    "ShareLayers",
    "SharedLayers",
    "Sharing",
    "SinksAndWindow",
    "Step",
    "Store",
    "ThresholdActivations",
    "Thresholded",
    "Uniform",
    "UnreachableError",
    "allocate",
    "benchmark",
    "cache_divergence",
    "cache_sensitivity",
    "channel_scores",
    "compensate",
    "cost",
    "distil",
    "drop_layers",
    "factorise",
    "find_clusters",
    "find_sharing",
    "fuse_layer",
    "head_gates",
    "layer_similarity",
    "load",
    "map_correlations",
    "map_similarity",
    "measure_quality",
    "merge_layers",
    "mixture_to_dense",
    "most_recent",
    "open_share",
    "pack_bits",
    "prune_channels",
    "prune_heads",
    "quantise",
    "recency_ratio",
    "reduce_tokens",
    "reorder_layers",
    "replace_heads",
    "retrieval",
    "route_attention",
    "router_parameters",
    "save",
    "sensitivity",
    "share_attention",
    "share_layers",
    "shrink",
    "similar_block",
    "steps_of",
    "take",
    "threshold_activations",
    "to_bit_linear",
    "train_retaining_heads",
]


__getattr__, __dir__ = names_of(__name__, _EXPORTS)
