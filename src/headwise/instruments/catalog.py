"""All instruments. A new one is a class in a file of its own, and a line here."""

from headwise.instruments.instrument import Instrument
from headwise.instruments.matching import Matching
from headwise.instruments.places import Places
from headwise.instruments.repeats import Repeats
from headwise.instruments.residual import Residual
from headwise.instruments.retrieval import Retrieval
from headwise.instruments.shape import Shape
from headwise.instruments.similarity import Similarity
from headwise.instruments.sinks import Sinks
from headwise.instruments.tiles import Tiles
from headwise.instruments.values import Values
from headwise.instruments.weights import Weights

__all__ = ["ALL", "INSTRUMENTS", "chosen"]

ALL: tuple[type[Instrument] | type[Weights], ...] = (
    Sinks,
    Shape,
    Places,
    Matching,
    Repeats,
    Retrieval,
    Values,
    Weights,
    Similarity,
    Residual,
    Tiles,
)

INSTRUMENTS: dict[str, type[Instrument] | type[Weights]] = {i.name: i for i in ALL}


def chosen(names: object) -> list[type[Instrument] | type[Weights]]:
    """The instruments of these names, in the order of the list; None: all.

    Raises ValueError for a name that no instrument has.
    """
    if names is None:
        return list(ALL)
    wanted = [names] if isinstance(names, str) else list(names)  # type: ignore[call-overload]
    unknown = [name for name in wanted if name not in INSTRUMENTS]
    if unknown:
        raise ValueError(
            f"no instrument {', '.join(map(repr, unknown))}; there are {', '.join(INSTRUMENTS)}"
        )
    return [i for i in ALL if i.name in wanted]
