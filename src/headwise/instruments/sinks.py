"""Attention sinks: mass on the first token, on sinks found anywhere, and on learned ones.

Xiao et al. 2023 (arXiv 2309.17453) found that much attention goes to the first tokens whatever
they say; Gu et al. 2024 (arXiv 2410.10781) call a key a sink if it receives more than 0.3 on
average. Heads that put most of their mass there do little on that input: Guo et al. 2024
(arXiv 2410.13835) call them dormant. Some models learn the sink as a logit that is no key
(gpt-oss): then rows sum to less than one, and what is missing is the sink's.
"""

from headwise.instruments.columns import columns
from headwise.instruments.instrument import Instrument, Numbers
from headwise.instruments.kinds import THRESHOLDS
from headwise.instruments.reading import Reading

__all__ = ["Sinks"]


class Sinks(Instrument):
    """All from the mass that keys receive: no pass over the map beyond the summary."""

    name = "sinks"
    columns = columns(
        "sink_mass",
        "found_sink_mass",
        "learned_sink_mass",
        "dormant_share",
        "received_concentration",
    )

    def read(self, reading: Reading) -> Numbers:
        received, found = reading.received, reading.sinks
        first = reading.first_key[:, None, None].expand(-1, received.shape[1], 1)
        learned = reading.learned_sink
        beside = 0.0 if learned is None else learned
        either = found.scatter(-1, first, True)
        whole = received.sum(-1, keepdim=True)
        share = received / whole.clamp_min(1e-30)
        return {
            "sink_mass": received.gather(-1, first)[..., 0] / reading.count,
            "found_sink_mass": reading.mass_on(found) + beside,
            "learned_sink_mass": reading.nothing() if learned is None else learned,
            "dormant_share": (reading.mass_on(either) + beside > THRESHOLDS.dormant).float(),
            "received_concentration": share.square().sum(-1),
        }
