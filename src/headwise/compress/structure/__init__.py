"""Real tensors get smaller: heads, channels, layers, ranks, experts."""
