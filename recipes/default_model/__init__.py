"""The embedded default model: corpus, training, export and evaluation."""
