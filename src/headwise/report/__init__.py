"""One HTML page that shows an Atlas, or what changed between two: offline, without requests."""

from headwise.report.page import compare, write

__all__ = ["compare", "write"]
