"""RAT: a gated recurrence inside chunks, softmax attention across them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.attention import attend
from tilewise.attention.gates.rotary import frequencies, turn
from tilewise.recurrence.mixer import Mixer, check_width, from_heads, to_heads, wide
from tilewise.recurrence.model import mixer
from tilewise.recurrence.per_channel import elementwise
from tilewise.recurrence.rows import Rows
from tilewise.recurrence.state import Carried
from tilewise.tiles import Causal, Partial, merge

SLOTS = 16  # room for chunks grows by so many at a time


@dataclass(frozen=True, eq=False)
class RATState(Carried):
    """One key and value for every full chunk, and the running ones of the open chunk.

    Attributes:
        keys, values: `[S, H, M, D]`, the M slots for chunks, zeros beyond count // chunk; keys are turned.
        key, value: `[S, H * D]`, float32 or wider, running, not turned; 0 at a chunk's start.
        count: int64 `[S]`, tokens read.
    """

    keys: Tensor
    values: Tensor
    key: Tensor
    value: Tensor
    count: Tensor


@mixer("rat")
class RAT(Mixer):
    """RAT: between a recurrence and attention (Wei et al., 2025, arXiv 2507.04416).

    Within a chunk keys and values run through `y_t = g_t y_{t-1} + (1 - g_t) x_t`, with a gate for every channel,
    from 0 at its start. A query sees the last running key of every full chunk before its own, and the running key
    of its own chunk: softmax attention over N / chunk + 1 keys. A chunk of 1 is attention over gated keys and
    values, one as long as the sequence a recurrence. Queries and keys are turned by the place of their chunk
    (rotary), and the output is gated by a sigmoid of the token.

    Differs from the paper in nothing we know of but initial weights; chunks are counted from each sequence's start
    and lengths need not be multiples of the chunk.

    Args:
        width: of the inputs. heads: their number. chunk: tokens of a chunk, 16 in the paper.
        groups: queries and keys are projected for so many heads and repeated for the others, which differ by their
            gates; values and gates have all heads. base: of the rotary angles.

    Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self, width: int, heads: int = 4, chunk: int = 16, groups: int = 2, base: float = 10000.0
    ) -> None:
        super().__init__()
        dim = check_width(width, heads)
        check_width(chunk, 1, "chunk")
        if groups not in [g for g in range(1, heads + 1) if heads % g == 0]:
            raise ValueError(f"groups must divide heads, got {groups!r} and {heads}")
        self.heads, self.chunk, self.repeats = heads, chunk, heads // groups
        self.angles = frequencies(base, dim)
        self.query, self.key = (nn.Linear(width, groups * dim, bias=False) for _ in range(2))
        self.value, self.gate = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        # Gates begin at about 1 - 1/r with r from 1 to the chunk, so that channels remember over all its lengths.
        self.bias = nn.Parameter(torch.empty(width).uniform_(1, max(1.0 + 1e-6, chunk - 1)).log())
        self.forget, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, state=None, *, mask=None, cu_seqlens=None):
        rows = Rows.of(x, None if state is None else state.count, self.chunk, mask, cu_seqlens)
        if state is None:
            state = self._empty(rows.filled.shape[0], x)
        keep = rows.take((wide(self.forget(x)) + wide(self.bias)).sigmoid())
        running = [
            self._within(rows, keep, rows.take(part), before)
            for part, before in ((self._repeated(self.key(x)), state.key), (self.value(x), state.value))
        ]
        first = state.count // self.chunk  # chunks that are full already
        chunks = first.unsqueeze(1) + rows.places // self.chunk  # [s, t]
        q = self._turned(rows.take(self._repeated(self.query(x))), chunks)
        k = self._turned(running[0], chunks).to(x.dtype)
        v = to_heads(running[1], self.heads).to(x.dtype)
        after = self._after(rows, state, first, k, v, running)
        seen = Causal().at(chunks.unsqueeze(1) - 1, torch.arange(after.keys.shape[2], device=x.device))
        full = Partial(*attend(q, after.keys, after.values, mask=seen, return_lse=True))
        own = Partial(v, wide(q * k).sum(-1) / math.sqrt(k.shape[3]))
        mixed = from_heads(merge([full, own]).out) * rows.take(self.gate(x).sigmoid())
        return self.out(rows.put(mixed)), after

    def _empty(self, sequences: int, x: Tensor) -> RATState:
        dim = self.value.out_features // self.heads
        slots = x.new_zeros(sequences, self.heads, 0, dim)
        running = wide(x.new_zeros(sequences, self.heads * dim))
        return RATState(
            slots, slots, running, running, torch.zeros(sequences, dtype=torch.int64, device=x.device)
        )

    def _repeated(self, x: Tensor) -> Tensor:
        return x.repeat(1, 1, self.repeats)

    def _turned(self, x: Tensor, chunks: Tensor) -> Tensor:
        return turn(to_heads(x, self.heads), chunks.unsqueeze(1), self.angles).to(x.dtype)

    def _within(self, rows: Rows, keep: Tensor, x: Tensor, before: Tensor) -> Tensor:
        """Each chunk's running mean, `[S, T, width]`; the first goes on from `before [S, width]`."""
        s = x.shape[0]
        # Places before the first new token keep what came before as it is.
        old = (rows.places < rows.filled.unsqueeze(1)).unsqueeze(2)
        keep, add = keep.masked_fill(old, 1), (1 - keep) * x
        shape = (rows.chunks, rows.span)
        start = F.pad(wide(before).unsqueeze(1), (0, 0, 0, max(0, shape[0] - 1)))[:, : shape[0]]
        keep, add = (part.unflatten(1, shape).flatten(0, 1) for part in (keep, add.masked_fill(old, 0)))
        return elementwise(keep, add, start.flatten(0, 1)).unflatten(0, (s, shape[0])).flatten(1, 2)

    def _after(self, rows: Rows, state: RATState, first: Tensor, k, v, running) -> RATState:
        """The state behind these rows: their full chunks' last keys and values in the slots behind the old ones."""
        count = state.count + rows.lengths
        total = count // self.chunk
        most = int(total.max()) if len(total) else 0
        slots = max(state.keys.shape[2], -(-most // SLOTS) * SLOTS, SLOTS)
        index = torch.arange(slots, device=k.device)
        came = (index >= first.unsqueeze(1)) & (index < total.unsqueeze(1))  # [s, slots]
        kept = []
        for old, new in ((state.keys, k), (state.values, v)):
            ends = new[:, :, max(0, rows.span - 1) :: max(1, rows.span)]  # [s, h, chunks, d]
            old = F.pad(old, (0, 0, 0, slots - old.shape[2])).to(new.dtype)
            if ends.shape[2]:
                place = (index - first.unsqueeze(1)).clamp(0, ends.shape[2] - 1).view(-1, 1, slots, 1)
                old = torch.where(came.view(-1, 1, slots, 1), ends.take_along_dim(place, 2), old)
            kept.append(old)
        last = []
        for part, before in zip(running, (state.key, state.value)):
            if part.shape[1]:
                place = (rows.ends - 1 - rows.start).clamp(0, part.shape[1] - 1).view(-1, 1, 1)
                part = part.take_along_dim(place, 1)[:, 0]
                before = torch.where((rows.lengths > 0).unsqueeze(1), part, before.to(part.dtype))
            last.append(before.masked_fill((count % self.chunk == 0).unsqueeze(1), 0))
        return RATState(kept[0], kept[1], last[0], last[1], count)
