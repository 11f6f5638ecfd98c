"""Fewer tokens: pruned, merged, fused on the way through a model."""
