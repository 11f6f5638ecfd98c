"""Which entries of a cache are kept: scores from keys, from attention, from learning, by chance."""
