"""A file is there whole, or as it was before: see `headwise.models.atomic`."""

from headwise.models.atomic import write_atomically

__all__ = ["write_atomically"]
