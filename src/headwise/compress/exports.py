"""Public name -> the module of this room that defines it."""

EXPORTS: dict[str, str] = {
    "similar_block": "headwise.compress.structure.shared_maps",
    "share_attention": "headwise.compress.structure.shared_maps",
    "map_similarity": "headwise.compress.structure.shared_maps",
    "Step": "headwise.compress.step",
    "steps_of": "headwise.compress.step",
    "take": "headwise.compress.step",
    "LowRank": "headwise.compress.structure.low_rank",
    "Factorise": "headwise.compress.structure.low_rank",
    "factorise": "headwise.compress.structure.low_rank",
    "Adaptive": "headwise.compress.cache.budgets",
    "Budget": "headwise.compress.cache.budgets",
    "ByKind": "headwise.compress.cache.budgets",
    "PerHead": "headwise.compress.cache.budgets",
    "Plain": "headwise.compress.cache.store",
    "Policy": "headwise.compress.cache.policy",
    "Pyramid": "headwise.compress.cache.budgets",
    "Seen": "headwise.compress.cache.policy",
    "Store": "headwise.compress.cache.store",
    "Uniform": "headwise.compress.cache.budgets",
    "LayerSimilarity": "headwise.compress.structure.layer_similarity",
}
