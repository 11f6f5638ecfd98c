"""Fewer bits for weights and activations, put where they are missed least."""
