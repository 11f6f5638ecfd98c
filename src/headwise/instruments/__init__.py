"""See: measure what every head and layer of a model does, streaming over layers and texts.

Nothing heavy is imported here: numpy is enough to load an Atlas; torch loads with `see`.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from headwise.lazy import names_of

if TYPE_CHECKING:
    from headwise.instruments.ablations import ablation
    from headwise.instruments.atlas import Atlas
    from headwise.instruments.attribution import Attribution, attribute
    from headwise.instruments.catalog import INSTRUMENTS
    from headwise.instruments.columns import Column
    from headwise.instruments.compare import Comparison, compare
    from headwise.instruments.composition_scores import composition, composition_by_component
    from headwise.instruments.induction_weights import token_matching
    from headwise.instruments.joint_ablation import JointEffects, ablate_together
    from headwise.instruments.lenses import Lens, lens
    from headwise.instruments.patching import patch
    from headwise.instruments.perturbation import perturb
    from headwise.instruments.probing import Probe, probe
    from headwise.instruments.profiles import profile
    from headwise.instruments.qk_ov import ov, qk
    from headwise.instruments.see import see
    from headwise.instruments.steering import Steered, steered
    from headwise.instruments.token_ablation import TokenEffects, ablate_tokens

# name -> the module that defines it
_EXPORTS = {
    "Atlas": "headwise.instruments.atlas",
    "Attribution": "headwise.instruments.attribution",
    "Column": "headwise.instruments.columns",
    "Comparison": "headwise.instruments.compare",
    "INSTRUMENTS": "headwise.instruments.catalog",
    "JointEffects": "headwise.instruments.joint_ablation",
    "Lens": "headwise.instruments.lenses",
    "Steered": "headwise.instruments.steering",
    "TokenEffects": "headwise.instruments.token_ablation",
    "ablate_together": "headwise.instruments.joint_ablation",
    "ablate_tokens": "headwise.instruments.token_ablation",
    "ablation": "headwise.instruments.ablations",
    "attribute": "headwise.instruments.attribution",
    "compare": "headwise.instruments.compare",
    "composition": "headwise.instruments.composition_scores",
    "composition_by_component": "headwise.instruments.composition_scores",
    "lens": "headwise.instruments.lenses",
    "ov": "headwise.instruments.qk_ov",
    "patch": "headwise.instruments.patching",
    "profile": "headwise.instruments.profiles",
    "qk": "headwise.instruments.qk_ov",
    "Probe": "headwise.instruments.probing",
    "probe": "headwise.instruments.probing",
    "perturb": "headwise.instruments.perturbation",
    "see": "headwise.instruments.see",
    "steered": "headwise.instruments.steering",
    "token_matching": "headwise.instruments.induction_weights",
}

__all__ = [
    "INSTRUMENTS",
    "Atlas",
    "Attribution",
    "Column",
    "Comparison",
    "JointEffects",
    "Lens",
    "Probe",
    "Steered",
    "TokenEffects",
    "ablate_together",
    "ablate_tokens",
    "ablation",
    "attribute",
    "compare",
    "composition",
    "composition_by_component",
    "lens",
    "ov",
    "patch",
    "perturb",
    "probe",
    "profile",
    "qk",
    "see",
    "steered",
    "token_matching",
]


class _Room(ModuleType):
    """`see` and `compare` are functions here, though the files that hold them have the same name.

    Importing a submodule binds its name on the package; here the function is bound instead, so
    that `headwise.instruments.see` is the same thing whichever import came first.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name in _EXPORTS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Room


__getattr__, __dir__ = names_of(__name__, _EXPORTS)
