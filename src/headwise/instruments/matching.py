"""What a head looks for on the given text: the same token, what followed it, delimiters."""

import torch

from headwise.instruments.columns import columns
from headwise.instruments.instrument import Instrument, Numbers
from headwise.instruments.reading import Reading

__all__ = ["Matching"]


class Matching(Instrument):
    """Mass on keys chosen by their token.

    A query is no other place of its own token, and attending to oneself is no induction: these
    keys are left out. Models that look ahead are also credited with later places, yet not with
    the next token, which always follows the query's own. In cross-attention nothing is left out.
    Delimiters need a tokenizer; the first token, which `sink_mass` counts, is none of them.
    """

    name = "matching"
    columns = columns("same_token", "induction_text", "delimiter_mass")

    def read(self, reading: Reading) -> Numbers:
        numbers: Numbers = {}
        if reading.delimiters is not None:
            keys = reading.delimiters
            if reading.keys is not None:
                keys = keys & reading.keys
            # the first token is often one of them; what rests on it is the sink's, not theirs
            first = reading.first_key[:, None].to(keys.device)
            keys = keys.scatter(1, first, torch.zeros_like(first, dtype=torch.bool))
            numbers["delimiter_mass"] = reading.mass_on(keys)
        query, key = reading.query_ids, reading.key_ids
        if query is None or key is None:
            return numbers
        before = torch.nn.functional.pad(key[:, :-1], (1, 0), value=-1)
        same = reading.map.mass_matching(query, key)
        follows = reading.map.mass_matching(query, before)
        if not reading.cross:
            band = reading.band
            same = same - band.at(0)
            follows = follows - band.at(0) * (query == before)[:, None]
            if reading.ahead:
                follows = follows - band.at(-1)
        numbers["same_token"] = reading.mean(same).clamp_min(0)
        numbers["induction_text"] = reading.mean(follows).clamp_min(0)
        return numbers
