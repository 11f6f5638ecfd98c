"""One HTML page that shows an Atlas: offline, with no request to anywhere."""

from headwise.report.page import write

__all__ = ["write"]
