"""Who sees which descriptors when frames come in chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.tiles import Mask, Visibility
from tilewise.tiles.visibility import FAR


@dataclass(frozen=True, eq=False)
class ChunkMemory(Mask):
    """A query sees all keys of its own chunk, and of earlier chunks those that were retained.

    Two position axes: a key's chunk is at most the query's; and it is the query's own, unless the key is retained.

    Args:
        q_chunk: int64 `[N_q]` or `[B|1, 1, N_q]`, chunk of each query; k_chunk: the same for keys.
        retained: bool like `k_chunk`, keys that stay in memory after their chunk.

    Raises ValueError for sizes that do not fit the call.
    """

    q_chunk: Tensor
    k_chunk: Tensor
    retained: Tensor

    def narrow(self, view: Visibility) -> Visibility:
        chunks = []
        for name, x, n in (
            ("q_chunk", self.q_chunk, view.q_pos.shape[2]),
            ("k_chunk", self.k_chunk, view.k_pos.shape[2]),
            ("retained", self.retained, view.k_pos.shape[2]),
        ):
            if x.ndim not in (1, 3) or x.shape[-1] != n:
                raise ValueError(f"{name} must be [{n}] or [B, 1, {n}], got {list(x.shape)}")
            chunks.append(x.to(view.pos.device).reshape((1,) * (3 - x.ndim) + x.shape))
        q, k, retained = chunks
        far = torch.full_like(q, FAR)
        return view.with_axis(-far, q, k).with_axis(q, far, k.masked_fill(retained, FAR))
