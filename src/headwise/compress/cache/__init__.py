"""A key-value cache in which every head keeps its own number of tokens, in memory really."""
