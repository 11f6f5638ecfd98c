"""Remove work for good: fewer heads, layers, tokens, keys and bits, with the price measured.

    headwise.compress.prune_heads(model, [(3, 1), (5, 0)])
    model.generate(**inputs, past_key_values=headwise.compress.HeadCache(model, budget=0.25))

Names are found in the files of this room when they are first used: torch is not imported before.
"""

from headwise.compress.exports import EXPORTS
from headwise.lazy import names_of

__all__ = sorted(EXPORTS)

__getattr__, __dir__ = names_of(__name__, EXPORTS)
