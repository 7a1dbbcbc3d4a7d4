"""PrFlashAttention on re-shaped tensors: a row's drawn blocks side by side, a lower triangle at their end."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from tilewise.attention.api import attend, plan
from tilewise.attention.probabilistic.block_distances import PrFlashAttention
from tilewise.tiles import Causal, Padding, TileMap


def attend_reshaped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: PrFlashAttention | None = None,
    *,
    scale: float | None = None,
    engine: str = "auto",
) -> Tensor:
    """Causal PrFlashAttention by re-shaping tensors (Li, 2024, arXiv 2410.18441), equal to `attend(..., method)`.

    The keys and values of the blocks that a row of tiles drew are gathered in their order, at most `budget` blocks
    with the row's own one last, and the rows are laid along the batch. There plain causal attention, aligned
    bottom-right, is all that is needed: earlier blocks are wholly visible and the last is a lower triangle. Rows
    with fewer blocks are filled up on the left with hidden ones.

    It copies `budget` times the keys and values, where `attend` reads them in place: it is the paper's wording of
    the method, and a way to run it with any dense causal attention.

    Args:
        q: `[B, H_q, N, D]`; k, v: `[B, H_kv, N, D]`, of one length. method: None for the defaults.
        scale, engine: as for `tilewise.attend`.
    Returns:
        `[B, H_q, N, D_v]`. Raises ValueError for other lengths, and as `attend` does.
    """
    method = PrFlashAttention() if method is None else method
    if not isinstance(method, PrFlashAttention):
        raise TypeError(f"method must be a PrFlashAttention, got {type(method).__name__}")
    made = plan(method, q, k, mask="causal", scale=scale)
    (b, heads, n, _), size = q.shape, method.tile
    if k.shape[2] != n:
        raise ValueError(f"q and k must be of one length, got {n} and {k.shape[2]}")
    if not n:
        return q.new_zeros(b, heads, 0, v.shape[3])
    rows = -(-n // size)
    keep = cast(TileMap, made.tile_maps[0]).keep[:1]  # [1, H, rows, rows]: batch entries draw alike
    width = int(keep.sum(-1).max())
    order = torch.arange(rows, device=q.device) + rows * keep
    chosen = order.argsort(-1)[..., rows - width :]  # blocks left out first, then those drawn, in their order
    shown = keep.gather(3, chosen)[0, 0]  # [rows, width]; as many in every head

    def cut(x: Tensor) -> Tensor:
        return pad(x, (0, 0, 0, rows * size - n)).unflatten(2, (rows, size))  # [B, h, rows, size, D]

    def gathered(x: Tensor) -> Tensor:
        x = cut(x).repeat_interleave(heads // x.shape[1], 1)
        head = torch.arange(heads, device=x.device).view(-1, 1, 1)
        return x[:, head, chosen[0]].flatten(3, 4).transpose(1, 2).flatten(0, 1)  # [B rows, H, width size, D]

    mask = Causal() & Padding(shown.repeat_interleave(size, 1).repeat(b, 1))
    queries = cut(q).transpose(1, 2).flatten(0, 1)
    out = cast(Tensor, attend(queries, gathered(k), gathered(v), mask=mask, scale=scale, engine=engine))
    return out.unflatten(0, (b, rows)).transpose(1, 2).flatten(2, 3)[:, :, :n]
