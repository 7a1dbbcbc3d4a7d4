"""Low-rank biases: an additive bias given as factors that ride along with queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.tiles.visibility import to_heads

LOW = (torch.float16, torch.bfloat16)
WIDEST = 512  # head_dim that engines take
DIGIT = 256  # positions are cut into digits below this, which bfloat16 holds exactly


@dataclass(frozen=True, eq=False)
class LowRankBias:
    """The bias `q_factor k_factor^T`, of rank R (FlashBias: Wu et al., 2025, arXiv 2505.12044).

    Given to `tilewise.attend(..., bias=...)`, the factors are set beside queries and keys: the scores of
    `[q_factor / scale, q]` and `[k_factor, k]` are those of q and k plus the bias. Nothing N x N is made, every
    engine and method takes it, and gradients reach the factors. The log-sum-exp is that of the dense bias.

    Some biases are low-rank exactly (`alibi`, `distance`); learned ones nearly (`svd`); for biases that
    depend on the input small networks are fitted (`NeuralFactors`): the paper's three cases.

    Low precision: a factor rounded to bfloat16 has 8 bits, while the bias is a sum of products that may be large
    and cancel. So for float16 and bfloat16 inputs each factor becomes the sum of a few such numbers, the products
    that matter of which are set beside q and k: `max(pieces)` times R columns when one side takes one piece, 3 R
    with two on both. Pieces of (1, 1) are the plain cast that the authors' code does. In wider inputs one piece
    holds all; the bias is then exact to the rounding of its largest product, not of itself.

    Differs from the paper: an addition to any engine's inputs, not a kernel; the split just said; grouped heads.

    Args:
        q_factor: floating `[B|1, H_q|1, N_q, R]`. k_factor: `[B|1, H_kv|1, N_k, R]`; with grouped heads what
            differs between query heads of a group must be on the side of the queries.
        pieces: low-precision numbers that make up an entry of q_factor and of k_factor, 1 to 3 each.
        energy: share of the bias's squares that the factors keep, `[B|1, H|1]`, where that was measured.

    Raises TypeError for factors that are no floating tensors of one dtype, ValueError for shapes that do not fit.
    """

    q_factor: Tensor
    k_factor: Tensor
    pieces: tuple[int, int] = (2, 2)
    energy: Tensor | None = None

    def __post_init__(self) -> None:
        for name, x in (("q_factor", self.q_factor), ("k_factor", self.k_factor)):
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 4:
                given = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"{name} must be a floating tensor [B|1, H|1, N, R], got {given}")
        if self.q_factor.shape[3] != self.k_factor.shape[3] or not self.rank:
            raise ValueError(
                f"q_factor and k_factor must share a rank >= 1, got {self.rank} and {self.k_factor.shape[3]}"
            )
        if self.q_factor.dtype != self.k_factor.dtype or self.q_factor.device != self.k_factor.device:
            raise TypeError("q_factor and k_factor must share one dtype and device")
        if len(self.pieces) != 2 or not all(p in (1, 2, 3) for p in self.pieces):
            raise ValueError(f"pieces must be two integers in 1..3, got {self.pieces!r}")

    @property
    def rank(self) -> int:
        return self.q_factor.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors."""
        return sum(x.numel() * x.element_size() for x in (self.q_factor, self.k_factor))

    def dense(self) -> Tensor:
        """The bias itself, `[B|1, H|1, N_q, N_k]`: N_q x N_k, for tests and small inputs."""
        heads = max(self.q_factor.shape[1], self.k_factor.shape[1])
        return to_heads(self.q_factor, heads) @ to_heads(self.k_factor, heads).mT

    def columns(self, dtype: torch.dtype) -> int:
        """Columns that inputs of `dtype` grow by."""
        return self.rank * (len(self._products()) if dtype in LOW else 1)

    def extend(self, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """`q [B, H_q, N_q, D]` and `k [B, H_kv, N_k, D]` with the factors set before their D features.

        Before rather than behind, so that where products are summed in order the large ones of a bias that cancel
        do so before the scores, which they would round, are added.

        Raises ValueError when the factors do not fit, `scale` is 0, or more than 512 features would result.
        """
        self._check(q, k, scale)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        q_part, k_part = self.q_factor.to(wide) / scale, self.k_factor.to(wide)
        if q.dtype in LOW:
            q_part, k_part = _balanced(q_part, k_part)
            numbers = [_split(x, n, q.dtype) for x, n in zip((q_part, k_part), self.pieces)]
            pairs = [(numbers[0][a], numbers[1][b]) for a, b in self._products()]
            q_part, k_part = (torch.cat(parts, -1) for parts in zip(*pairs))
        return tuple(  # type: ignore[return-value]
            torch.cat([part.to(x.dtype).expand(*x.shape[:3], -1), x], -1)
            for part, x in ((q_part, q), (k_part, k))
        )

    def _products(self) -> list[tuple[int, int]]:
        """Pairs of pieces whose products are kept: those that are not below the precision of the split."""
        q_pieces, k_pieces = self.pieces
        most = max(self.pieces)
        return [(a, b) for a in range(q_pieces) for b in range(k_pieces) if a + b < most]

    def _check(self, q: Tensor, k: Tensor, scale: float) -> None:
        for name, part, x, role in (
            ("q_factor", self.q_factor, q, "query"),
            ("k_factor", self.k_factor, k, "kv"),
        ):
            fits = part.shape[0] in (1, x.shape[0]) and part.shape[1] in (1, x.shape[1])
            if not fits or part.shape[2] != x.shape[2]:
                hint = " (grouped heads: what differs between query heads belongs into q_factor)"
                raise ValueError(
                    f"the bias's {name} must be [{x.shape[0]} or 1, {x.shape[1]} or 1, {x.shape[2]}, R] for"
                    f" {x.shape[1]} {role} heads, got {list(part.shape)}{hint if role == 'kv' else ''}"
                )
            if part.device != x.device:
                raise ValueError(f"the bias's {name} is on {part.device}, the call on {x.device}")
        if scale == 0:
            raise ValueError("scale must not be 0 with a low-rank bias, whose factors are divided by it")
        if q.shape[3] + self.columns(q.dtype) > WIDEST:
            raise ValueError(
                f"head_dim {q.shape[3]} and {self.columns(q.dtype)} columns of the bias (rank {self.rank},"
                f" pieces {self.pieces} for {q.dtype}) exceed {WIDEST}: lower the rank or the pieces"
            )

    @classmethod
    def alibi(
        cls,
        slopes: Tensor,
        n_q: int,
        n_k: int | None = None,
        *,
        q_pos: Tensor | None = None,
        k_pos: Tensor | None = None,
    ) -> LowRankBias:
        """ALiBi, `-slope * (query position - key position)`: exact, of rank 2, or 1 more per factor 256 of length.

        Meant with a causal mask; without one, later keys are favoured, as the formula says (the variant with the
        distance's absolute value is not of low rank). Key positions are cut into digits that bfloat16 holds
        exactly. The part that is constant in a row is kept: the log-sum-exp needs it.

        Args:
            slopes: floating `[H_q]` (see `alibi_slopes`); differentiable.
            n_q, n_k: queries and keys (n_k: as many); queries are the last of the keys.
            q_pos, k_pos: integers `[N]` or `[B|1, 1, N]`, where positions are others than these.
        """
        if not isinstance(slopes, Tensor) or not slopes.is_floating_point() or slopes.ndim != 1:
            raise TypeError("slopes must be a floating tensor [H]")
        n_k = n_q if n_k is None else n_k
        q_pos = _positions("q_pos", q_pos, n_k - n_q, n_q, slopes.device)
        k_pos = _positions("k_pos", k_pos, 0, n_k, slopes.device)
        slope = slopes.view(1, -1, 1, 1)
        weights, digits, rest = [], [], k_pos
        largest = int(k_pos.abs().max()) if k_pos.numel() else 0
        for place in range(max(1, -(-largest.bit_length() // 8))):
            last = largest < DIGIT ** (place + 1)
            digits.append(rest if last else rest % DIGIT)
            weights.append(slope * DIGIT**place)
            rest = rest // DIGIT
        rows = -slope * q_pos.unsqueeze(-1)  # [B|1, H, N_q, 1]
        q_factor = torch.cat([*(w.expand_as(rows) for w in weights), rows], -1)
        keys = torch.stack([*digits, torch.ones_like(k_pos)], -1).to(slopes.dtype)
        return cls(q_factor, keys, pieces=(3, 1))

    @classmethod
    def distance(cls, q_xyz: Tensor, k_xyz: Tensor, weights: Tensor | float = 1.0) -> LowRankBias:
        """`weights * |x_q - x_k|^2` for points in d dimensions: exact, of rank d + 2.

        Points are taken relative to the keys' mean, which changes nothing but the rounding.

        Args:
            q_xyz: floating `[N_q, d]` or `[B|1, H|1, N_q, d]`; k_xyz: the same for keys, heads those of k.
            weights: a number, `[H_q]`, or `[B|1, H_q|1, N_q]`; negative to favour what is near. Differentiable, as
                are the points.
        """
        q_xyz, k_xyz = (_rank4(n, x) for n, x in (("q_xyz", q_xyz), ("k_xyz", k_xyz)))
        if q_xyz.shape[3] != k_xyz.shape[3]:
            raise ValueError(f"points must share their dimension, got {q_xyz.shape[3]} and {k_xyz.shape[3]}")
        weights = torch.as_tensor(weights, dtype=q_xyz.dtype, device=q_xyz.device)
        if weights.ndim not in (0, 1, 3):
            raise ValueError(f"weights must be a number, [H] or [B, H, N_q], got {list(weights.shape)}")
        weights = weights.unsqueeze(-1) if weights.ndim == 3 else weights.view(1, -1, 1, 1)
        centre = k_xyz.mean((0, 1, 2))
        q_xyz, k_xyz = q_xyz - centre, k_xyz - centre
        q_square, k_square = (x.square().sum(-1, keepdim=True) for x in (q_xyz, k_xyz))
        q_factor = torch.cat([q_square, torch.ones_like(q_square), -2 * q_xyz], -1) * weights
        return cls(q_factor, torch.cat([torch.ones_like(k_square), k_square, k_xyz], -1))

    @classmethod
    def svd(
        cls,
        dense: Tensor,
        rank: int | None = None,
        *,
        energy: float | None = None,
        kv_heads: int | None = None,
    ) -> LowRankBias:
        """The nearest bias of given rank to a learned one, by singular value decomposition; made once, offline.

        Args:
            dense: floating `[N_q, N_k]` or `[B|1, H|1, N_q, N_k]`.
            rank: of the factors. energy: instead, the share of the sum of squares that every head must keep; with
                neither, 0.995, what the authors keep of SwinV2's biases.
            kv_heads: for grouped heads, how many; query heads of a group then share one factor of the keys.

        Returns:
            The bias, its `energy` the share that each head (each group) keeps. Factors need no gradient.
        """
        dense = _rank4("dense", dense).detach()
        if rank is not None and energy is not None:
            raise ValueError("give rank or energy, not both")
        b, heads, n_q, n_k = dense.shape
        kv_heads = heads if kv_heads is None else kv_heads
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads must divide the {heads} heads of the bias, got {kv_heads}")
        stacked = dense.reshape(b, kv_heads, heads // kv_heads * n_q, n_k)
        left, values, right = torch.linalg.svd(stacked.double(), full_matrices=False)
        squares = values.square()
        kept = squares.cumsum(-1) / squares.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        if rank is None:
            share = 0.995 if energy is None else energy
            if not 0 < share <= 1:
                raise ValueError(f"energy must be in (0, 1], got {share!r}")
            enough = kept >= share - torch.finfo(torch.float64).eps * values.shape[-1]
            enough = enough | (squares.sum(-1, keepdim=True) == 0)
            rank = int(enough.to(torch.int64).argmax(-1).max()) + 1
        if not 1 <= rank <= values.shape[-1]:
            raise ValueError(f"rank must be in 1..{values.shape[-1]}, got {rank}")
        root = values[..., :rank].sqrt()
        q_factor = (left[..., :rank] * root.unsqueeze(-2)).reshape(b, heads, n_q, rank)
        k_factor = (right[..., :rank, :] * root.unsqueeze(-1)).mT
        share_kept = kept[..., rank - 1].masked_fill(squares.sum(-1) == 0, 1)
        return cls(q_factor.to(dense.dtype), k_factor.to(dense.dtype), energy=share_kept)


def alibi_slopes(heads: int) -> Tensor:
    """The slopes of ALiBi (Press et al., 2021) for so many heads, float32 `[heads]`.

    For a power of two, 2^(-8 i / heads), i from 1; else those of the power of two below, then every second one of
    twice as many heads.
    """
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads must be an integer >= 1, got {heads!r}")
    whole = 1 << (heads.bit_length() - 1)
    exponents = [-8 * i / whole for i in range(1, whole + 1)]
    exponents += [-4 * i / whole for i in range(1, 2 * (heads - whole), 2)]
    return torch.tensor([2.0**e for e in exponents])


def _balanced(q_part: Tensor, k_part: Tensor) -> tuple[Tensor, Tensor]:
    """Each column's size shared between both sides by a power of two, which is exact: float16 ends at 65504."""
    if not q_part.numel() or not k_part.numel():
        return q_part, k_part
    tops = [x.detach().abs().amax((0, 1, 2)).log2() for x in (q_part, k_part)]
    shift = ((tops[1] - tops[0]) / 2).round().nan_to_num(0, 0, 0).to(torch.int32)
    # Written as float32 exponents: exp2 and ldexp go through functions that may round.
    up, down = (((127 + x) << 23).view(torch.float32) for x in (shift, -shift))
    return q_part * up, k_part * down


def _split(x: Tensor, count: int, dtype: torch.dtype) -> list[Tensor]:
    """`count` tensors of `dtype` whose sum is x, as nearly as they can; the gradient goes to the first."""
    pieces = []
    for _ in range(count):
        pieces.append(x.to(dtype))
        x = x - pieces[-1].to(x.dtype)
    return pieces


def _positions(name: str, given: Tensor | None, start: int, n: int, device: torch.device) -> Tensor:
    """`[B|1, 1, N]` int64."""
    if given is None:
        return torch.arange(start, start + n, device=device).view(1, 1, n)
    if given.dtype not in (torch.int32, torch.int64) or given.ndim not in (1, 3) or given.shape[-1] != n:
        raise ValueError(
            f"{name} must be integers [{n}] or [B, 1, {n}], got {given.dtype} {list(given.shape)}"
        )
    given = given.to(device=device, dtype=torch.int64)
    return given.reshape((1,) * (3 - given.ndim) + given.shape)


def _rank4(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim not in (2, 4):
        given = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating tensor of 2 or 4 axes, got {given}")
    return x[(None,) * (4 - x.ndim)]
