"""The shape of a head's rows: how many keys they weigh, how sharply, how far away."""

from headwise.instruments.columns import columns
from headwise.instruments.instrument import Instrument, Numbers
from headwise.instruments.reading import Reading

__all__ = ["Shape"]


class Shape(Instrument):
    """Means over rows of what one pass over the map gives (`AttentionMap.summary`).

    `effective_keys` is the mean of exp(entropy), not the exp of the mean. Distances are not
    measured in cross-attention, where places in two sequences are no distance.
    """

    name = "shape"
    columns = columns(
        "entropy",
        "entropy_share",
        "effective_keys",
        "max_weight",
        "mean_distance",
        "distance_std",
    )

    def read(self, reading: Reading) -> Numbers:
        summary = reading.summary
        largest = reading.total(reading.visible.keys.clamp_min(1).log())
        numbers = {
            "entropy": reading.mean(summary.entropy),
            "entropy_share": reading.total(summary.entropy) / largest,
            "effective_keys": reading.mean(summary.entropy.exp()),
            "max_weight": reading.mean(summary.max),
        }
        if not reading.cross:
            numbers["mean_distance"] = reading.mean(summary.mean_distance)
            spread = summary.distance_variance.clamp_min(0).sqrt()
            numbers["distance_std"] = reading.mean(spread)
        return numbers
