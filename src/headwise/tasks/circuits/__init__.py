"""Models whose circuit is known, because their weights were written down and not trained.

    from headwise.tasks import circuits

    known = circuits.induction()
    known.heads                       # {(0, 1), (1, 2)}: what an instrument has to find
    known.control().heads             # others, for the same task

`circuits.ALL`: name -> function of everything there is.
"""

from collections.abc import Callable

from headwise.tasks.circuits.addition import addition
from headwise.tasks.circuits.class_token import class_token
from headwise.tasks.circuits.fact_lookup import fact_lookup
from headwise.tasks.circuits.indirect_object import indirect_object
from headwise.tasks.circuits.induction import induction
from headwise.tasks.circuits.known import Contrast, KnownCircuit, KnownEdge
from headwise.tasks.circuits.modular_fourier import modular_fourier

ALL: dict[str, Callable[[], KnownCircuit]] = {
    "induction": induction,
    "indirect_object": indirect_object,
    "modular_fourier": modular_fourier,
    "addition": addition,
    "class_token": class_token,
    "fact_lookup": fact_lookup,
}

__all__ = [
    "ALL",
    "Contrast",
    "KnownCircuit",
    "KnownEdge",
    "addition",
    "class_token",
    "fact_lookup",
    "indirect_object",
    "induction",
    "modular_fourier",
]
