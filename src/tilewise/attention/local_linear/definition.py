"""The meaning of local linear attention: the paper's closed form, one direct solve per query, in any dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tilewise.tiles import Mask, as_mask
from tilewise.tiles.visibility import to_heads


def definition(
    q: Tensor, k: Tensor, v: Tensor, *,
    mask: Mask | Tensor | str | None = None, ridge: float | Tensor = 1.0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """The intercept of the weighted ridge regression around each query, `[B, H, N_q, D_v]`.

    With w_ij = exp(scale q_i . k_j) and z_ij = k_j - q_i, query i fits v_j ~ b + W z_ij, minimising

        sum_j w_ij |v_j - b - W z_ij|^2 + ridge omega_i |W|^2,    omega_i = sum_j w_ij,

    and gives out b. Eliminating W, as the paper does: mu_i = sum_j w_ij z_ij, Sigma_i = sum_j w_ij z_ij z_ij^T +
    ridge omega_i I, rho_i = Sigma_i^-1 mu_i, and the weight of v_j is w_ij (1 - z_ij . rho_i) / (omega_i - mu_i .
    rho_i). Arguments as in `local_linear_attention`; a mask is boolean. Differentiable by autograd.

    No care for memory or time: it holds N_q x N_k x D numbers. A query that sees nothing gives out 0.
    """
    heads, d = q.shape[1], q.shape[3]
    k, v = to_heads(k, heads), to_heads(v, heads)
    if k.shape[1] != heads:
        k, v = (x.expand(-1, heads, -1, -1) for x in (k, v))
    seen = to_heads(as_mask(mask).bind(q.shape[2], k.shape[2], device=q.device).tokens(), heads)
    empty = ~seen.any(-1, keepdim=True)
    scores = (d**-0.5 if scale is None else scale) * q @ k.mT
    weights = scores.masked_fill(~seen, -math.inf).masked_fill(empty, 0).softmax(-1)  # omega_i is 1
    weights = weights.masked_fill(empty, 0)
    z = k.unsqueeze(2) - q.unsqueeze(3)  # [b, h, q, k, d]
    mu = (weights.unsqueeze(-1) * z).sum(3)
    ridge = torch.as_tensor(ridge, dtype=q.dtype, device=q.device).expand(q.shape[:3])
    sigma = torch.einsum("bhqk,bhqkd,bhqke->bhqde", weights, z, z)
    sigma = sigma + ridge[..., None, None] * torch.eye(d, dtype=q.dtype, device=q.device)
    rho = torch.linalg.solve(sigma, mu.unsqueeze(-1)).squeeze(-1)
    share = weights * (1 - (z * rho.unsqueeze(3)).sum(-1))
    total = (1 - (mu * rho).sum(-1, keepdim=True)).masked_fill(empty, 1)
    return (share / total) @ v
