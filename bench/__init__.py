"""Benchmarks: `python -m bench.NAME`, run alone."""
