"""headwise makes transformer attention legible, exchangeable and cheap, head by head.

Nothing heavy is imported here: torch and transformers load when a name is first used.
"""

from typing import TYPE_CHECKING

from headwise.lazy import names_of

if TYPE_CHECKING:
    from headwise.compress import load, save, shrink
    from headwise.edits import swap
    from headwise.instruments import Atlas, see
    from headwise.maps import AttentionMap, attend
    from headwise.models import observe, view

__version__ = "0.1.0"

# name -> the room that defines it
_EXPORTS = {
    "shrink": "headwise.compress",
    "Atlas": "headwise.instruments",
    "see": "headwise.instruments",
    "AttentionMap": "headwise.maps",
    "attend": "headwise.maps",
    "observe": "headwise.models",
    "view": "headwise.models",
    "swap": "headwise.edits",
    "load": "headwise.compress",
    "save": "headwise.compress",
}

__all__ = [
    "Atlas",
    "AttentionMap",
    "__version__",
    "attend",
    "load",
    "observe",
    "save",
    "see",
    "shrink",
    "swap",
    "view",
]


__getattr__, __dir__ = names_of(__name__, _EXPORTS, ("__version__",))
