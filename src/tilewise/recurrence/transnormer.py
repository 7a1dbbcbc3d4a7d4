"""TransNormer: linear attention without a denominator, and softmax within blocks of tokens in the early layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.api import scan
from tilewise.recurrence.mixer import Mixer, MixerState, check_width, from_heads, to_heads
from tilewise.recurrence.model import ModelConfig, SequenceModel, mixer
from tilewise.recurrence.positions import positions
from tilewise.recurrence.state import Carried


@mixer("norm-attention")
class NormAttention(Mixer):
    """Norm attention of TransNormer (Qin et al., 2022, arXiv 2210.10340).

    Linear attention with features `1 + elu` whose denominator is replaced by an RMS norm of the output: where
    scores are small, a denominator's gradients grow without bound, the norm's do not.

    Args:
        width: of the inputs. heads: their number.
        denominator: True divides by the sum of scores as linear attention before it did, for comparison.

    Raises ValueError for sizes that do not divide.
    """

    def __init__(self, width: int, heads: int = 4, denominator: bool = False) -> None:
        super().__init__()
        check_width(width, heads)
        self.heads, self.denominator = heads, denominator
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.norm = None if denominator else nn.RMSNorm(width, eps=1e-5)

    def forward(self, x: Tensor, state=None, *, mask=None, cu_seqlens=None):
        q, k, v = (to_heads(part(x), self.heads) for part in (self.query, self.key, self.value))
        out, after = scan(
            1 + F.elu(q), 1 + F.elu(k), v, normalize="sum" if self.denominator else None, scale=1.0,
            state=None if state is None else state.scan, mask=mask, cu_seqlens=cu_seqlens, return_state=True,
        )  # fmt: skip
        out = from_heads(out)
        return self.out(out if self.norm is None else self.norm(out)), MixerState(after)


@dataclass(frozen=True, eq=False)
class BlockState(Carried):
    """The block that is not full yet: keys and values `[S, block, H, D]` (zeros where no token is), and how many
    tokens each sequence has had, int64 `[S]`."""

    keys: Tensor
    values: Tensor
    seen: Tensor


@mixer("diagonal-attention")
class DiagonalAttention(Mixer):
    """Diagonal attention of TransNormer (Qin et al., 2022, arXiv 2210.10340): softmax attention to the tokens
    before it in the same block, tokens 0 .. block - 1 being the first, and so on; blocks do not overlap.

    Args:
        width: of the inputs. heads: their number. block: tokens of one, 64 in the paper.

    Time is N * block, the state a block. Raises ValueError for sizes below 1 or that do not divide.
    """

    def __init__(self, width: int, heads: int = 4, block: int = 64) -> None:
        super().__init__()
        if not isinstance(block, int) or isinstance(block, bool) or block < 1:
            raise ValueError(f"block must be an integer >= 1, got {block!r}")
        self.heads, self.block, self.head_dim = heads, block, check_width(width, heads)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, state=None, *, mask=None, cu_seqlens=None):
        places, seen = positions(x, None if state is None else state.seen, mask, cu_seqlens)
        before = torch.zeros_like(seen) if state is None else state.seen
        filled = before % self.block
        # Every sequence begins a row of blocks of its own, behind the tokens of the block that was not full.
        blocks = (seen - before + filled + self.block - 1) // self.block + 1
        first = (blocks.cumsum(0) - blocks) * self.block
        owner = self._owner(x, cu_seqlens)
        slots = places - (before - filled)[owner] + first[owner]
        if mask is not None:
            slots, rows = slots[mask], x[mask]
        else:
            slots, rows = slots.flatten(), x.flatten(0, 1)
        total = int(blocks.sum()) * self.block
        q, k, v = (part(rows).unflatten(1, (self.heads, -1)) for part in (self.query, self.key, self.value))
        grids = [y.new_zeros(total, *y.shape[1:]).index_copy(0, slots, y) for y in (q, k, v)]
        if state is not None:
            own = torch.arange(self.block, device=x.device) < filled.unsqueeze(1)
            held = (first.unsqueeze(1) + torch.arange(self.block, device=x.device))[own]
            for i, kept in ((1, state.keys), (2, state.values)):
                grids[i] = grids[i].index_copy(0, held, kept.to(x.dtype)[own])
        q, k, v = (y.unflatten(0, (-1, self.block)).transpose(1, 2) for y in grids)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)
        out = self.out(out[slots].flatten(1))
        if mask is not None:
            out = x.new_zeros(x.shape).masked_scatter(mask.unsqueeze(2), out)
        return out.view(x.shape), self._left(grids, first, seen - before + filled, seen)

    @staticmethod
    def _owner(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """The sequence of each token, `[B, N]`."""
        b, n = x.shape[:2]
        if cu_seqlens is None:
            return torch.arange(b, device=x.device).unsqueeze(1).expand(b, n)
        offsets = cu_seqlens.to(x.device, torch.int64)
        return torch.searchsorted(offsets[1:].contiguous(), torch.arange(n, device=x.device), right=True)[
            None
        ]

    def _left(self, grids: list[Tensor], first: Tensor, end: Tensor, seen: Tensor) -> BlockState:
        """What is in the last block of each sequence, which is never full: `end` tokens lie in its row."""
        within = torch.arange(self.block, device=end.device)
        own = (within < (end % self.block).unsqueeze(1))[..., None, None]
        last = (first + end // self.block * self.block).unsqueeze(1) + within
        keys, values = (grid[last].masked_fill(~own, 0) for grid in grids[1:])
        return BlockState(keys, values, seen)


class TransNormer(SequenceModel):
    """TransNormer (Qin et al., 2022, arXiv 2210.10340): diagonal attention in the early layers, norm attention in
    the later ones.

    Args:
        vocabulary: tokens known. width: of the residual stream. layers: their number, `local` of which are diagonal
            (None: half, as in the paper). heads, block, hidden: of the attention, its blocks and the channel
            mixers.

    Called as `SequenceModel`. Raises ValueError for sizes below 1 or that do not divide, and more local layers than
    layers. Differs from the paper: the variant T2 (softmax, `1 + elu`), with SwiGLU channel mixers and RMS norms.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        layers: int,
        local: int | None = None,
        heads: int = 4,
        block: int = 64,
        hidden: int | None = None,
    ) -> None:
        local = layers // 2 if local is None else local
        if not 0 <= local <= layers:
            raise ValueError(f"local must be from 0 to the {layers} layers, got {local!r}")
        options = {"diagonal-attention": {"heads": heads, "block": block}, "norm-attention": {"heads": heads}}
        names = ("diagonal-attention",) * local + ("norm-attention",) * (layers - local)
        super().__init__(ModelConfig(vocabulary, width, names, options, hidden))
