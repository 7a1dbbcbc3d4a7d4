"""Kernelized attention with relative positions, in N log N by FFT."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tilewise.attention.kernelized.toeplitz import WIDE, Mix, direct_rows, rounding

FEATURES = ("positive", "trigonometric")
PRODUCTS = ("auto", "fft", "direct")
LOST = 2.0**-26  # the share of the largest value that transforms may round away before a row is done directly


class Kernelized(NamedTuple):
    """Outputs `[B, H, N, D_v]`, and the rows (of N) that were computed by the quadratic form, int64 `[rows]`."""

    out: Tensor
    direct: Tensor


def draw(count: int, dim: int, seed: int = 0, orthogonal: bool = True) -> Tensor:
    """Random directions `[count, dim]`, float64, each distributed as a standard normal vector.

    With `orthogonal` every `dim` of them are at right angles, which lowers the variance of the features
    (Choromanski et al., 2021). The same seed gives the same directions. Raises ValueError for sizes below 1.
    """
    if count < 1 or dim < 1:
        raise ValueError(f"count and dim must be >= 1, got {count} and {dim}")
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    if not orthogonal:
        return gaussian
    blocks = []
    for _ in range(-(-count // dim)):
        square = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        unitary, upper = torch.linalg.qr(square)
        blocks.append(unitary * upper.diagonal().sign())  # signs make it uniform over rotations
    return torch.cat(blocks)[:count] * gaussian.norm(dim=1, keepdim=True)


def features(x: Tensor, draws: Tensor, kind: str = "positive") -> tuple[Tensor, Tensor]:
    """Feature map whose products estimate exp(x . y): values `[..., R]` and their log factor `[...]`.

    positive: exp(w . x - |x|^2 / 2) / sqrt(R), R draws; the factor is the largest exponent, so that values lie in
    [0, 1 / sqrt(R)]. trigonometric: exp(|x|^2 / 2) / sqrt(R) (sin w . x, cos w . x), 2 R values; not positive, so
    a sum of weights may vanish. `x [..., D]`, draws `[R, D]`, one dtype.
    """
    products, half = x @ draws.mT, x.square().sum(-1) / 2
    root = math.sqrt(draws.shape[0])
    if kind == "trigonometric":
        return torch.cat([products.sin(), products.cos()], -1) / root, half
    exponents = products - half.unsqueeze(-1)
    top = exponents.detach().amax(-1)
    return (exponents - top.unsqueeze(-1)).exp() / root, top


def kernelized_rpe(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, draws: Tensor, *,
    causal: bool = False, normalize: bool = True, kind: str = "positive", keep: Tensor | None = None,
    product: str = "auto",
) -> Kernelized:  # fmt: skip
    """Attention with weights phi(q_i) . phi(k_j) exp(bias[j - i]), in O(N log N) (Luo et al., 2021).

    Args:
        q `[B, H, N, D]`; k `[B, H_kv, N, D]`; v `[B, H_kv, N, D_v]`: one floating dtype, as many queries as keys.
        bias: `[H|1, 2N - 1]`, entry N - 1 + (j - i) for query i and key j.
        draws: `[R, D]`, see `draw`.
        causal: keys after the query are hidden. The answer is causal to rounding, not bit by bit: a transform
            mixes all positions.
        normalize: divide q and k by their norms, as the paper does; otherwise by D^(1/4), so that features
            estimate exp(q . k / sqrt(D)).
        kind: "positive" or "trigonometric", see `features`.
        keep: bool `[B, N]`, False for padding; a query that sees no key gets 0.
        product: "fft", "direct" (the quadratic form), or "auto": FFT, and directly the rows for which `rounding`
            cannot promise 2^-26 of the largest value. "fft" raises ValueError where there are such rows.

    Differentiable once in every floating argument. Memory is O(B H N (R + D_v)), and besides about four times the
    larger of 8 MiB and one float64 sequence per batch entry and head; R D_v N numbers are never held. Grouped k and
    v are repeated. Raises ValueError or TypeError for arguments that do not fit.
    """
    _check(q, k, v, bias, draws, keep, kind, product)
    n, wide = q.shape[2], torch.float64 if q.dtype == torch.float64 else torch.float32
    phi_q, phi_k, log_k, values = _prepare(q, k, v, draws.to(wide), normalize, kind)
    logs = _visible(bias.to(WIDE).expand(q.shape[1], -1), causal)
    keep = q.new_ones(1, n, dtype=torch.bool) if keep is None else keep
    row_seen = (keep.cumsum(1) > 0 if causal else keep.any(1, keepdim=True).expand(-1, n)).unsqueeze(1)
    here = keep[:, None, None]  # [B|1, 1, 1, N]
    if product == "direct" or n == 0:
        rows, out = torch.arange(n, device=q.device), torch.zeros_like(values.mT)
    else:
        out, rows = _by_fft(phi_q, phi_k, log_k, values, logs, here, row_seen)
    if len(rows):
        if product == "fft":
            raise ValueError(
                f"product 'fft' would lose more than {LOST:.1e} of {len(rows)} of {n} rows to rounding: the weights"
                " they see are too small beside the others; 'auto' computes such rows directly"
            )
        log_k, logs = log_k.to(wide), logs.to(wide)
        out = out.index_copy(2, rows, direct_rows(rows, phi_q, phi_k, log_k, values.mT, logs, here))
    return Kernelized(out.to(v.dtype), rows)


def definition(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, draws: Tensor, *,
    causal: bool = False, normalize: bool = True, kind: str = "positive",
) -> Tensor:  # fmt: skip
    """The meaning of `kernelized_rpe` without padding: its N x N weights, written out; `[B, H, N, D_v]`.

    No care for overflow, memory or time. `bias [H, 2N - 1]`, H = H_kv.
    """
    n, d = q.shape[2:]
    q, k = (x / (x.norm(dim=-1, keepdim=True) if normalize else d**0.25) for x in (q, k))

    def phi(x: Tensor) -> Tensor:
        half = x.square().sum(-1, keepdim=True) / 2
        if kind == "trigonometric":
            waves = torch.cat([(x @ draws.mT).sin(), (x @ draws.mT).cos()], -1)
            return half.exp() * waves / math.sqrt(len(draws))
        return (x @ draws.mT - half).exp() / math.sqrt(len(draws))

    i, j = torch.arange(n, device=q.device).unsqueeze(1), torch.arange(n, device=q.device)
    weights = (phi(q) @ phi(k).mT) * bias[:, j - i + n - 1].exp()
    if causal:
        weights = weights.tril()
    return weights @ v / weights.sum(-1, keepdim=True)


class KernelizedRPE(nn.Module):
    """Normalised kernelized attention with learned relative positions (Luo et al., 2021, arXiv 2106.12566).

    The features of unit vectors have bounded variance, (e^4 - 1) / R of the kernel squared at worst, where those
    of norm r have (e^(4 r^2) - 1) / R: that is why the paper's model trains from scratch. Unit vectors alone
    cannot attend sharply (weights differ by e^2 at most); the positions can. Train and prefill; no decoding.

    Args:
        heads: query heads. head_dim: D. max_distance: distances beyond it share its bias.
        count: random features R (even for trigonometric ones, half of them sines).
        kind, causal, normalize, product: see `kernelized_rpe`. orthogonal, seed: see `draw`.

    `bias`, the parameter, is `[heads, 2 max_distance + 1]` and starts at zero; `draws` is a buffer, one for all.
    `direct_rows` says how many rows the last call computed by the quadratic form.

    Where it differs from the paper: exponents are taken relative to maxima, transforms are done in float64, rows
    that a transform would lose are computed directly, draws are orthogonal as in the Performer, and the default
    number of features is ours.
    """

    def __init__(
        self, heads: int, head_dim: int, max_distance: int, count: int = 64, *,
        kind: str = "positive", causal: bool = False, normalize: bool = True, orthogonal: bool = True,
        seed: int = 0, product: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        if heads < 1 or max_distance < 0:
            raise ValueError(f"heads must be >= 1 and max_distance >= 0, got {heads} and {max_distance}")
        _check_names(kind, product)
        if kind == "trigonometric" and count % 2:
            raise ValueError(f"count must be even for trigonometric features, got {count}")
        self.max_distance, self.kind, self.causal = max_distance, kind, causal
        self.normalize, self.orthogonal, self.product, self.direct_rows = normalize, orthogonal, product, 0
        self.bias = nn.Parameter(torch.zeros(heads, 2 * max_distance + 1))
        self.draws: Tensor
        drawn = draw(count if kind == "positive" else count // 2, head_dim, seed, orthogonal)
        self.register_buffer("draws", drawn.to(torch.get_default_dtype()))

    def redraw(self, seed: int) -> None:
        """Replace the random directions by those of another seed."""
        count, head_dim = self.draws.shape
        self.draws.copy_(draw(count, head_dim, seed, self.orthogonal))

    def distances(self, n: int) -> Tensor:
        """The bias of every distance in a sequence of `n` tokens, `[heads, 2n - 1]`."""
        offsets = torch.arange(1 - n, max(n, 1), device=self.bias.device)
        return self.bias[:, offsets.clamp(-self.max_distance, self.max_distance) + self.max_distance]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
        """`q [B, heads, N, D]`, `k [B, H_kv, N, D]`, `v [B, H_kv, N, D_v]` to `[B, heads, N, D_v]`."""
        result = kernelized_rpe(
            q, k, v, self.distances(q.shape[2]), self.draws, causal=self.causal, normalize=self.normalize,
            kind=self.kind, keep=keep, product=self.product,
        )  # fmt: skip
        self.direct_rows = len(result.direct)
        return result.out


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, draws: Tensor, normalize: bool, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of queries and keys `[B, H, R, N]`, log factors of keys `[B, H, N]`, values `[B, H, D_v, N]`.

    The factors of queries cancel.
    """
    heads = q.shape[1]
    k, v = (x.to(draws.dtype).repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    q, k = (_unit(x) if normalize else x / x.shape[3] ** 0.25 for x in (q.to(draws.dtype), k))
    (phi_q, _), (phi_k, log_k) = features(q, draws, kind), features(k, draws, kind)
    return phi_q.mT, phi_k.mT, log_k, v.mT


def _by_fft(
    phi_q: Tensor, phi_k: Tensor, log_k: Tensor, values: Tensor, logs: Tensor, here: Tensor, row_seen: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, H, N, D_v]`, and the rows that rounding may have spoilt, whose outputs mean nothing."""
    top = log_k.detach().masked_fill(~here[:, 0], -torch.inf).amax(2, keepdim=True)
    x = phi_k * (log_k - top.nan_to_num(neginf=0)).exp().unsqueeze(2)
    x = x.masked_fill(~here, 0)
    weights = (logs - logs.detach().amax(1, keepdim=True)).exp()
    mixed = Mix.apply(phi_q, x, torch.cat([values, torch.ones_like(values[:, :, :1])], 2), weights)
    with torch.no_grad():
        lost = 2 * rounding(phi_q, x, weights) > LOST * mixed[:, :, -1].abs()
    total = mixed[:, :, -1:].masked_fill((lost | ~row_seen).unsqueeze(2), 1)
    out = (mixed[:, :, :-1] / total).mT.masked_fill(~row_seen.unsqueeze(3), 0)
    rows = (lost & row_seen).flatten(0, 1).any(0).nonzero().squeeze(1)
    return out.to(values.dtype), rows


def _unit(x: Tensor) -> Tensor:
    """`x` over its norm; a zero vector stays, with a finite gradient."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / norm.masked_fill(norm == 0, 1)


def _visible(bias: Tensor, causal: bool) -> Tensor:
    """The bias `[H, 2N - 1]`, -inf at distances that a causal mask hides."""
    if not causal:
        return bias
    n = (bias.shape[1] + 1) // 2
    later = torch.arange(bias.shape[1], device=bias.device) >= n
    return bias.masked_fill(later, -torch.inf)


def _check_names(kind: str, product: str) -> None:
    if kind not in FEATURES:
        raise ValueError(f"kind must be one of {FEATURES}, got {kind!r}")
    if product not in PRODUCTS:
        raise ValueError(f"product must be one of {PRODUCTS}, got {product!r}")


def _check(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, draws: Tensor, keep: Tensor | None, kind: str, product: str
) -> None:
    _check_names(kind, product)
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.ndim != 4 or k.ndim != 4 or v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"q, k and v must be [B, H, N, D], k and v alike, got {[list(x.shape) for x in (q, k, v)]}"
        )
    b, heads, n, d = q.shape
    if (b, n, d) != (k.shape[0], k.shape[2], k.shape[3]) or k.shape[1] < 1 or heads % k.shape[1]:
        raise ValueError(
            "q and k must have the same B, N and D, and H a multiple of H_kv: as many queries as keys; got"
            f" {list(q.shape)} and {list(k.shape)}"
        )
    if bias.ndim != 2 or bias.shape[0] not in (1, heads) or (n and bias.shape[1] != 2 * n - 1):
        raise ValueError(f"bias must be [H or 1, 2N - 1] = [{heads}, {2 * n - 1}], got {list(bias.shape)}")
    if draws.ndim != 2 or draws.shape[1] != d or not len(draws):
        raise ValueError(f"draws must be [R, {d}] with R >= 1, got {list(draws.shape)}")
    if keep is not None and (keep.dtype != torch.bool or keep.shape != (b, n)):
        raise ValueError(f"keep must be bool [{b}, {n}], got {keep.dtype} {list(keep.shape)}")
