"""Where a head looks, counted from the query: itself, its neighbours, its surroundings.

Clark et al. 2019 (arXiv 1906.04341, section 3.1): many heads attend to a fixed offset.
"""

from headwise.instruments.columns import columns
from headwise.instruments.instrument import Instrument, Numbers
from headwise.instruments.reading import Reading

__all__ = ["Places"]


class Places(Instrument):
    """From the weights within 64 tokens of the diagonal. Not measured in cross-attention."""

    name = "places"
    columns = columns(
        "self_mass", "previous_mass", "next_mass", "local_8", "local_64", "positional"
    )

    def read(self, reading: Reading) -> Numbers:
        if reading.cross:
            return {}
        band = reading.band
        offsets = band.offsets
        if reading.rows is not None:
            offsets = offsets * reading.rows[:, None, :, None]
        count = reading.count if isinstance(reading.count, int) else reading.count[..., None]
        profile = offsets.sum(2) / count
        return {
            "self_mass": reading.mean(band.at(0)),
            "previous_mass": reading.mean(band.at(1)),
            "next_mass": reading.mean(band.at(-1)),
            "local_8": profile.sum(-1),
            "local_64": reading.mean(band.within),
            "positional": reading.mean(band.profile_share(profile)),
        }
