"""Fewer tokens on the way through an encoder."""
