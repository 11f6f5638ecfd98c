"""Relevance through a Llama by hand: every rule written out as its paper has it, in float64, one
number after another. Nothing here knows of gradients.

z are activations, r relevances; each function takes the relevance of what a step gave and returns
that of what it was given.
"""

from typing import Any

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, r: Tensor) -> Tensor:
    """r_i = sum over j of x_i w_ji / z_j r_j, for each row of x `(n, in)`; weight `(out, in)`."""
    found = torch.zeros_like(x)
    for row in range(len(x)):
        contributions = x[row][None, :] * weight
        z = contributions.sum(1, keepdim=True)
        found[row] = (contributions / z * r[row][:, None]).sum(0)
    return found


def gamma_linear(x: Tensor, weight: Tensor, bias: Tensor, r: Tensor, gamma: float) -> Tensor:
    """The same, where contributions of the sign of their sum (bias among them) count more."""
    found = torch.zeros_like(x)
    for row in range(len(x)):
        for j in range(len(weight)):
            parts = [float(a) for a in (*(x[row] * weight[j]), bias[j])]
            up = sum(parts) >= 0
            shares = [p + gamma * (max(p, 0.0) if up else min(p, 0.0)) for p in parts]
            for i in range(x.shape[1]):
                found[row, i] += shares[i] / sum(shares) * r[row, j]
    return found


def sum_of_two(a: Tensor, b: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return a / (a + b) * r, b / (a + b) * r


def head(q: Tensor, k: Tensor, v: Tensor, scale: float, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One causal head: r `(n, d)` of its output to its queries, keys and values."""
    n = len(q)
    r_q, r_k, r_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for i in range(n):
        scores = scale * q[i] @ k[: i + 1].T
        p = scores.softmax(0)
        out = p @ v[: i + 1]
        r_p = torch.zeros_like(p)
        for j in range(i + 1):
            share = p[j] * v[j] / out * r[i] / 2  # the uniform rule
            r_v[j] += share
            r_p[j] = share.sum()
        r_s = scores * (r_p - p * r_p.sum())  # Taylor expansion of the softmax, its bias lost
        for j in range(i + 1):
            share = scale * q[i] * k[j] / scores[j] * r_s[j] / 2
            r_q[i] += share
            r_k[j] += share
    return r_q, r_k, r_v


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[:, half:], x[:, :half]], 1) * sin


def unrotated(
    x: Tensor, cos: Tensor, sin: Tensor, r: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """Relevance of a rotated x to x, and to the angles `(n,)`: `share` of it goes to x."""
    half = x.shape[-1] // 2
    y = rotated(x, cos, sin)
    found, angles = torch.zeros_like(x), torch.zeros(len(x), dtype=x.dtype)
    for i in range(len(x)):
        for d in range(x.shape[1]):
            other = (d + half) % (2 * half)
            sign = -1.0 if d < half else 1.0
            direct, crossed = x[i, d] * cos[i, d], sign * x[i, other] * sin[i, d]
            found[i, d] += share * direct / y[i, d] * r[i, d]
            found[i, other] += share * crossed / y[i, d] * r[i, d]
            angles[i] += (1 - share) * r[i, d]
    return found, angles


def llama(model: Any, ids: Tensor, target: int, positions: bool) -> tuple[Tensor, Tensor]:
    """Relevance `(n,)` of the tokens of one text and of their places, for the last logit of
    `target`. Without `positions` the angles are constants."""
    with torch.no_grad():
        return _llama(model, ids, target, 0.5 if positions else 1.0)


def _norm(module: Any, x: Tensor) -> Tensor:
    size = (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
    return x / size * module.weight


def _llama(model: Any, ids: Tensor, target: int, share: float) -> tuple[Tensor, Tensor]:
    body = model.model
    x = body.embed_tokens(ids)
    cos, sin = (t[0].double() for t in body.rotary_emb(x[None], torch.arange(len(ids))[None]))
    kept = []
    for layer in body.layers:
        at, mlp = layer.self_attn, layer.mlp
        heads, groups, size = (
            len(at.q_proj.weight) // at.head_dim,
            at.num_key_value_groups,
            at.head_dim,
        )
        normed = _norm(layer.input_layernorm, x)
        q, k, v = (m(normed).unflatten(1, (-1, size)) for m in (at.q_proj, at.k_proj, at.v_proj))
        outs = []
        for h in range(heads):
            qh, kh = rotated(q[:, h], cos, sin), rotated(k[:, h // groups], cos, sin)
            scores = at.scaling * qh @ kh.T
            hidden = torch.ones_like(scores).triu(1).bool()
            outs.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v[:, h // groups])
        out = torch.cat(outs, 1)
        added = at.o_proj(out)
        middle = x + added
        normed_2 = _norm(layer.post_attention_layernorm, middle)
        gate, up = mlp.gate_proj(normed_2), mlp.up_proj(normed_2)
        hidden_2 = gate * gate.sigmoid() * up
        more = mlp.down_proj(hidden_2)
        kept.append((layer, x, normed, q, k, v, out, added, middle, normed_2, hidden_2, more))
        x = middle + more
    normed = _norm(body.norm, x)
    r = torch.zeros_like(x)
    r[-1] = normed[-1] * model.lm_head.weight[target]  # the logit is their sum
    places = torch.zeros(len(ids), dtype=x.dtype)
    for layer, x, normed, q, k, v, out, added, middle, normed_2, hidden_2, more in reversed(kept):
        at, mlp = layer.self_attn, layer.mlp
        r_middle, r_more = sum_of_two(middle, more, r)
        r_hidden = linear(hidden_2, mlp.down_proj.weight, r_more) / 2  # half to gate, half to up
        r_middle = r_middle + linear(normed_2, mlp.gate_proj.weight, r_hidden)
        r_middle = r_middle + linear(normed_2, mlp.up_proj.weight, r_hidden)
        r, r_added = sum_of_two(x, added, r_middle)
        r_out = linear(out, at.o_proj.weight, r_added).unflatten(1, (-1, at.head_dim))
        r_q, r_k, r_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for h in range(q.shape[1]):
            g = h // at.num_key_value_groups
            qh, kh = rotated(q[:, h], cos, sin), rotated(k[:, g], cos, sin)
            to_q, to_k, to_v = head(qh, kh, v[:, g], at.scaling, r_out[:, h])
            to_q, angles_q = unrotated(q[:, h], cos, sin, to_q, share)
            to_k, angles_k = unrotated(k[:, g], cos, sin, to_k, share)
            places += angles_q + angles_k
            r_q[:, h] += to_q
            r_k[:, g] += to_k
            r_v[:, g] += to_v
        for module, part in ((at.q_proj, r_q), (at.k_proj, r_k), (at.v_proj, r_v)):
            r = r + linear(normed, module.weight, part.flatten(1))
    return r.sum(-1), places
