"""How each function that a model calls shares out relevance: one rule for each, as a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headwise.instruments.relevance_linear import shared_linear
from headwise.models import UnsupportedModelError

__all__ = ["RULES", "Options", "carries", "identity", "scaled"]

TINY = 1e-12
"""Added to numbers that are divided by: an activation of exactly 0 gets no relevance."""


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor | float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scaled(x: Tensor, factor: Tensor | float) -> Tensor:
    """x, whose gradient is multiplied by `factor` on its way back."""
    found: Tensor = _Scaled.apply(x, factor)
    return found


def carries(x: Any) -> bool:
    """Whether relevance can come back to this: parameters are frozen meanwhile."""
    return isinstance(x, Tensor) and x.requires_grad


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, y = ctx.saved_tensors
        return grad * (y / (x + torch.where(x < 0, -TINY, TINY))), None


def identity(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), elementwise, whose gradient is f(x) / x: all relevance goes to x."""
    with torch.no_grad():
        y = function(x.detach().clone())
    found: Tensor = _Identity.apply(x, y)
    return found


@dataclass(frozen=True)
class Options:
    """`epsilon`, `gamma`: of linear maps. `constant_maps`: attention weights are constants, as in
    Ali et al. 2022 (arXiv 2202.07304): no relevance goes through the softmax."""

    epsilon: float = 0.0
    gamma: float = 0.0
    constant_maps: bool = False


Rule = Callable[[Options, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def _product(o: Options, func: Any, args: Any, kwargs: Any) -> Any:
    parts = [a for a in _flat(args) if isinstance(a, Tensor)]
    alive = sum(carries(a) for a in parts)
    if alive > 1 and func.__name__ == "mul_":
        _refuse(func.__name__, "a product of two in place")
    out = func(*args, **kwargs)
    if alive > 1:
        return scaled(out, 1 / alive)
    if alive and o.epsilon and func.__name__ in ("matmul", "__matmul__", "bmm", "einsum"):
        return _stabilised(o, out)
    return out


def _sum_of_products(o: Options, func: Any, args: Any, kwargs: Any) -> Any:
    """baddbmm and addmm: a bias, and a product of two."""
    base, a, b = args[:3]
    if carries(a) and carries(b):
        beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
        return beta * base + scaled(alpha * torch.matmul(a, b), 0.5)
    if func.__name__ == "addmm" and carries(a) and not kwargs and (o.gamma or o.epsilon):
        return _linear(o, F.linear, (a, b.T, base), {})
    return func(*args, **kwargs)


def _linear(o: Options, func: Any, args: Any, kwargs: Any) -> Any:
    x, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    if not carries(x) or not (o.gamma or o.epsilon):
        return func(*args, **kwargs)
    if o.gamma:
        return shared_linear(x, weight, bias, o.gamma, o.epsilon)
    return _stabilised(o, func(*args, **kwargs))


def _stabilised(o: Options, z: Tensor) -> Tensor:
    """The epsilon rule: R_j / (z_j + epsilon sign(z_j)) comes back in place of R_j / z_j."""
    d = z.detach()
    return scaled(z, d / (d + torch.where(d < 0, -o.epsilon, o.epsilon)))


def _quotient(o: Options, func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) > 1 and carries(args[1]):
        if func.__name__ in ("div_", "__itruediv__"):
            func = torch.div
        args = (args[0], args[1].detach(), *args[2:])
    return func(*args, **kwargs)


def _constant(o: Options, func: Any, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    return out.detach() if carries(out) else out


def _power(o: Options, func: Any, args: Any, kwargs: Any) -> Any:
    exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
    if isinstance(exponent, int | float) and exponent < 0:  # a norm's statistics
        return _constant(o, func, args, kwargs)
    if exponent == 1 or carries(exponent):
        return _unknown(o, func, args, kwargs) if carries(exponent) else func(*args, **kwargs)
    return _activation(o, func, args, kwargs)


def _activation(o: Options, func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0] if args else kwargs.get("input")
    if not carries(x):
        return func(*args, **kwargs)
    more = {key: value for key, value in kwargs.items() if key not in ("input", "inplace")}
    return identity(lambda t: func(t, *args[1:], **more), x)


def _glu(o: Options, func: Any, args: Any, kwargs: Any) -> Any:
    if not carries(args[0]):
        return func(*args, **kwargs)
    a, b = args[0].chunk(2, kwargs.get("dim", args[1] if len(args) > 1 else -1))
    return scaled(a * identity(torch.sigmoid, b), 0.5)


def _softmax(o: Options, func: Any, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    return out.detach() if o.constant_maps and carries(out) else out


def _layer_norm(o: Options, func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0] if args else kwargs["input"]
    if not carries(x):
        return func(*args, **kwargs)
    bound = dict(zip(("input", "shape", "weight", "bias", "eps"), args, strict=False)) | kwargs
    shape = bound.get("shape", bound.get("normalized_shape"))
    over = tuple(range(-len(shape), 0))
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    centred = wide - wide.mean(over, keepdim=True)
    size = (centred.detach().pow(2).mean(over, keepdim=True) + bound.get("eps", 1e-5)).sqrt()
    return _affine((centred / size).to(x.dtype), bound)


def _rms_norm(o: Options, func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0] if args else kwargs["input"]
    if not carries(x):
        return func(*args, **kwargs)
    bound = dict(zip(("input", "shape", "weight", "eps"), args, strict=False)) | kwargs
    shape, eps = bound.get("shape", bound.get("normalized_shape")), bound.get("eps")
    over = tuple(range(-len(shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    size = (wide.detach().pow(2).mean(over, keepdim=True) + eps).sqrt()
    return _affine((wide / size).to(x.dtype), bound)


def _affine(y: Tensor, bound: dict[str, Any]) -> Tensor:
    weight, bias = bound.get("weight"), bound.get("bias")
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _attention(o: Options, func: Any, args: Any, kwargs: Any) -> Any:
    q, k, v = args[:3] if len(args) >= 3 else (kwargs.pop(n) for n in ("query", "key", "value"))
    more = args[3:]
    if o.constant_maps:
        q, k = q.detach(), k.detach()
    of_map = carries(q) + carries(k)
    both = 2 if of_map and carries(v) else 1  # the map times the values is a product of two
    q, k = (scaled(t, 1 / (both * of_map)) if carries(t) else t for t in (q, k))
    v = scaled(v, 1 / both) if carries(v) else v
    return func(q, k, v, *more, **kwargs)


def _normalize(o: Options, func: Any, args: Any, kwargs: Any) -> Any:
    if not carries(args[0]):
        return func(*args, **kwargs)
    with torch.no_grad():
        unit = func(args[0].detach(), *args[1:], **kwargs)
        size = torch.where(unit == 0, torch.ones_like(unit), args[0].detach() / unit)
    return args[0] / size


def _unknown(o: Options, func: Any, args: Any, kwargs: Any) -> Any:
    if any(carries(a) for a in [*_flat(args), *_flat(kwargs.values())]):
        _refuse(func.__name__, "it")
    return func(*args, **kwargs)


def _refuse(name: str, what: str) -> None:
    raise UnsupportedModelError(
        f"the model calls torch's {name} on its way from the input to the score, and there is no "
        f"rule for how {what} shares out relevance; integrated gradients need none"
    )


def _flat(args: Any) -> list[Any]:
    """Arguments, and those inside of lists."""
    found: list[Any] = []
    for a in args:
        found += list(a) if isinstance(a, tuple | list) else [a]
    return found


RULES: dict[str, Rule] = {}
for _rule, _names in (
    (_product, "mul __mul__ __rmul__ __imul__ mul_ multiply matmul __matmul__ __rmatmul__ bmm mm"),
    (_product, "einsum"),
    (_sum_of_products, "addmm baddbmm"),
    (_linear, "linear"),
    (_quotient, "div div_ __truediv__ __itruediv__ true_divide divide __rtruediv__ __rdiv__"),
    (_constant, "rsqrt reciprocal"),
    (_power, "pow __pow__"),
    (_activation, "relu relu6 gelu silu mish tanh sigmoid elu celu selu leaky_relu softplus"),
    (_activation, "softsign logsigmoid hardtanh hardswish hardsigmoid sqrt square"),
    (_glu, "glu"),
    (_softmax, "softmax"),
    (_layer_norm, "layer_norm"),
    (_rms_norm, "rms_norm"),
    (_attention, "scaled_dot_product_attention"),
    (_normalize, "normalize"),
    (_unknown, "exp exp_ exp2 log log2 log10 log1p logsumexp log_softmax erf sin cos prod cumprod"),
    (_unknown, "multi_head_attention_forward group_norm instance_norm bilinear cosine_similarity"),
    (_unknown, "cdist softmin gumbel_softmax relu_ tanh_ sigmoid_ pow_ matrix_power"),
):
    RULES.update(dict.fromkeys(_names.split(), _rule))
