"""ROME: one fact as one rank-one change of one matrix.

A feed-forward layer's last matrix W is read as an associative memory of keys k (neurons at the
subject's last token) and values v (what the layer adds there). Among all matrices that answer a
new key k* with v*, the one that disturbs the other keys least, measured by C = E[k k^T], is

    W + Lambda (C^-1 k*)^T,   Lambda = (v* - W k*) / ((C^-1 k*) . k*)

Source: Meng, Bau, Andonian, Belinkov 2022, "Locating and Editing Factual Associations in GPT",
arXiv 2202.05262, section 3.1, eq. 2.
"""

from __future__ import annotations

from torch import Tensor


def rank_one_update(key: Tensor, missing: Tensor, solved: Tensor) -> tuple[Tensor, Tensor]:
    """(out `(width, 1)`, into `(1, hidden)`), whose product is added to W `(width, hidden)`.

    key: k* `(hidden,)`. missing: v* - W k* `(width,)`. solved: C^-1 k* `(hidden,)`, or k* itself
    for an update that does not know which keys are usual. Computed in float64.

    Raises ValueError where C^-1 k* is not at an acute angle to k*, as it always is for a C that is
    symmetric and positive: a key of nothing but zeros, or a broken C.
    """
    k, u = key.double(), solved.to(key.device).double()
    along = k @ u
    if not float(along) > 0:
        raise ValueError(
            f"(C^-1 k*) . k* is {float(along):.3g}, expected more than 0: the key is empty, or C "
            "is not positive"
        )
    scale = u.norm()  # both factors of moderate size: they are kept in float32
    out, into = missing.double() * scale / along, u / scale
    return out[:, None], into[None]
