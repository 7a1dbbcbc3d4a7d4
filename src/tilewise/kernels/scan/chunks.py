"""How sequences of any lengths are cut into chunks, so that all of them can be worked on together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.kernels.scan.call import Call

TILE = 64  # tokens of a chunk
AT_ONCE = 1 << 22  # numbers in a temporary: 16 MiB of float32


@dataclass(frozen=True, eq=False)
class Part:
    """Some steps over the chunks of all sequences, the longest sequence first.

    `tokens [rows, tile]` are places in the flattened batch, -1 where a chunk is not full; `counts` says how many
    rows
    each step has: the first that many sequences.
    """

    tokens: Tensor
    counts: list[int]

    def take(self, x: Tensor) -> Tensor:
        """`[B, H, N, ...]` to `[rows, H, tile, ...]`, zeros where there is no token."""
        found = x.transpose(1, 2).flatten(0, 1)[self.tokens.clamp(min=0)]
        hidden = (self.tokens < 0).view(*self.tokens.shape, *[1] * (found.ndim - 2))
        return found.masked_fill(hidden, 0).transpose(1, 2)

    def put(self, to: Tensor, x: Tensor) -> None:
        """The reverse: write `[rows, H, tile, ...]` into `to [B, H, N, ...]`."""
        real = self.tokens >= 0
        b, token = (self.tokens[real] // to.shape[2], self.tokens[real] % to.shape[2])
        to[b, :, token] = x.transpose(1, 2)[real].to(to.dtype)


@dataclass(frozen=True, eq=False)
class Cut:
    """The parts of a call, in the order of time, and the sequences by falling length."""

    order: Tensor
    parts: list[Part]

    @classmethod
    def of(cls, call: Call) -> Cut:
        """Parts so small that temporaries are bounded, or of `call.chunk` tokens of every sequence."""
        spans, device = call.spans(), call.q.device
        starts, lengths = (
            torch.tensor(x, dtype=torch.int64)
            for x in ([b * call.q.shape[2] + start for b, start, _ in spans], [e - s for _, s, e in spans])
        )
        order = lengths.argsort(descending=True, stable=True)
        starts, lengths = starts[order], lengths[order]
        longest = int(lengths.max()) if len(spans) else 0
        tile = min(TILE, max(16, 1 << max(0, longest - 1).bit_length()))
        counts = (lengths.unsqueeze(0) > torch.arange(0, longest, tile).unsqueeze(1)).sum(1).tolist()
        d_k, d_v = call.k.shape[3], call.v.shape[3]
        most = max(1, AT_ONCE // max(1, call.q.shape[1] * (tile * (d_k + d_v + tile) + d_k * d_v)))
        if call.chunk is not None:
            most = max(1, call.chunk // tile) * max(counts, default=1)
        parts: list[Part] = []
        first = 0
        while first < len(counts):
            last, rows = first + 1, counts[first]
            while last < len(counts) and rows + counts[last] <= most:
                rows += counts[last]
                last += 1
            places = [
                _places(starts, lengths, step * tile, tile, counts[step]) for step in range(first, last)
            ]
            parts.append(Part(torch.cat(places).to(device), counts[first:last]))
            first = last
        return cls(order.to(device), parts)

    def sorted(self, state: Tensor) -> Tensor:
        """States of the sequences by falling length."""
        return state[self.order]

    def restored(self, state: Tensor) -> Tensor:
        """The reverse."""
        return state[self.order.argsort()]


def _places(starts: Tensor, lengths: Tensor, first: int, tile: int, count: int) -> Tensor:
    within = first + torch.arange(tile)
    return (starts[:count, None] + within).masked_fill(within >= lengths[:count, None], -1)
