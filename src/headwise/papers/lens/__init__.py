"""Lenses: what is inside of a model, layer by layer, read by probes or in its vocabulary."""
