"""The rules of attention-aware relevance propagation, as gradients that were bent on purpose.

Relevance goes backwards from a score to the inputs, layer by layer, and is shared out at each step
(Achtibat et al. 2024, "AttnLRP", arXiv 2402.05602, section 3.3). Every rule of theirs is a factor
on a gradient, so that relevance is input x gradient everywhere and one backward pass finds it:

    linear maps             x_i w_ij / z_j, the gradient itself (epsilon rule; epsilon, gamma asked)
    products of two         half to each: the gradient, halved (uniform rule, eq. 7)
    softmax                 its own gradient (deep Taylor, eq. 13); what it loses is its bias
    functions of one number f(x) / x in place of f'(x) (identity rule, eq. 9)
    norms                   their statistics are constants (identity rule, section 3.3.3)
    divisors                constants, too

No layer is written again for that. While the rules are in force they stand between a model and the
functions of PyTorch that it calls, whatever its modules are named. What is computed stays the
same, and what has no rule here is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from headwise.instruments.relevance_functions import RULES, Options

__all__ = ["Rules"]


class Rules(TorchFunctionMode):
    """While this lasts, gradients of what is computed are those of the rules.

        with Rules():
            model(**inputs)[...].backward()   # the backward pass may also come later

    `added`: tensors (their ids) which, where they are added to something, are taken to be another:
    a table of positions that shall receive relevance of its own.

    Raises UnsupportedModelError for a function without a rule that relevance would pass.
    """

    def __init__(
        self,
        epsilon: float = 0.0,
        gamma: float = 0.0,
        constant_maps: bool = False,
        added: dict[int, Callable[[], Tensor]] | None = None,
    ) -> None:
        super().__init__()
        if epsilon < 0 or gamma < 0:
            raise ValueError(f"epsilon={epsilon}, gamma={gamma}: expected 0 or more")
        self.options = Options(epsilon, gamma, constant_maps)
        self.added = added or {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if self.added and name in ("add", "__add__", "__radd__", "__iadd__", "add_"):
            args = tuple(self.added[id(a)]() if id(a) in self.added else a for a in args)
            if name in ("add_", "__iadd__"):
                func = torch.add
        rule = RULES.get(name)
        if rule is None:
            return func(*args, **kwargs)
        return rule(self.options, func, args, kwargs)
