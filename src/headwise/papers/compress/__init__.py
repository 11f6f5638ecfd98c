"""Less of a model: fewer heads, layers, keys and bits, at a measured price."""
