"""Large-chunk test-time training: fast weights updated once a chunk, attention inside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.attention import attend
from tilewise.attention.gates.rotary import frequencies, turn
from tilewise.recurrence.fast_weights import FastWeights, read_chunk
from tilewise.recurrence.mixer import HeadNorm, Mixer, check_width, from_heads, to_heads, wide
from tilewise.recurrence.model import mixer
from tilewise.recurrence.rows import Rows
from tilewise.recurrence.state import Carried
from tilewise.tiles import Causal


@dataclass(frozen=True, eq=False)
class LaCTState(Carried):
    """The memory after the last full chunk, and the tokens of the open one.

    Attributes:
        weights: float32 or wider. keys, values: for attention, `[S, chunk, width]`, keys turned. fast: the memory's
            keys, alike. rates: `[S, chunk, 3 * memories]`. count: int64 `[S]`, tokens read.
    """

    weights: FastWeights
    keys: Tensor
    values: Tensor
    fast: Tensor
    rates: Tensor
    count: Tensor


@mixer("lact")
class LaCT(Mixer):
    """Large-chunk test-time training (Zhang et al., 2025, arXiv 2505.23884), the layer for language.

    A token reads the memory as the chunks before its own have left it (apply, then update), and its own chunk by
    causal attention; both share queries, keys and values. At a chunk's end the memory, a SwiGLU network, takes one
    gradient step on `-f(k) . v` summed over the chunk's tokens, each with its own rates, and the rows of its
    weights are brought back to the length they began with.

    Differs from the authors' code: attention stays inside the chunk where theirs may slide over its border, the
    memory's arithmetic is float32 or wider throughout, and there is no momentum.

    Args:
        width: of the inputs. heads: of attention. memories: heads of the memory. chunk: tokens of an update.
        expand: hidden size of the memory as a share of its head's. rate: what rates begin at. muon: orthogonalise
            updates by Newton-Schulz iterations. base: of the rotary angles.

    Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        width: int,
        heads: int = 4,
        memories: int = 1,
        chunk: int = 2048,
        expand: float = 1.0,
        rate: float = 0.001,
        muon: bool = False,
        base: float = 500000.0,
    ) -> None:
        super().__init__()
        dim, part = check_width(width, heads), check_width(width, memories)
        check_width(chunk, 1, "chunk")
        hidden = int(part * expand)
        check_width(hidden, 1, "width / memories * expand")
        if not rate > 0:
            raise ValueError(f"rate must be above 0, got {rate!r}")
        self.heads, self.memories, self.chunk, self.muon = heads, memories, chunk, muon
        self.angles = frequencies(base, dim)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.query_norm, self.key_norm = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.scale, self.shift = nn.Parameter(torch.ones(2, width)), nn.Parameter(torch.zeros(2, width))
        self.gate, self.up = (
            nn.Parameter(torch.randn(memories, hidden, part) / math.sqrt(part)) for _ in range(2)
        )
        self.down = nn.Parameter(torch.randn(memories, part, hidden) / math.sqrt(hidden))
        self.rate = nn.Linear(width, 3 * memories)
        nn.init.constant_(self.rate.bias, math.log(math.expm1(rate)))
        self.norm, self.share = HeadNorm(memories, part), nn.Linear(width, memories)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, state=None, *, mask=None, cu_seqlens=None):
        rows = Rows.of(x, None if state is None else state.count, self.chunk, mask, cu_seqlens)
        if state is None:
            state = self._empty(rows.filled.shape[0], x)
        places = (state.count - rows.filled).unsqueeze(1) + rows.places  # [s, t], since the sequence began
        q, k = self.query_norm(self.query(x)), self.key_norm(self.key(x))
        ask, fast = (rows.take(self._fast(part, i)) for i, part in enumerate((q, k)))
        q, k, ask, fast = (self._turned(part, places) for part in (rows.take(q), rows.take(k), ask, fast))
        v, rates = rows.take(self.value(x)), rows.take(F.softplus(wide(self.rate(x))))
        held = (state.keys, state.values, state.fast, state.rates)
        whole = [rows.whole(new, old) for new, old in zip((k, v, fast, rates), held)]
        near = self._attention(rows, q, whole[0], whole[1])
        far, weights = self._memory(rows, state.weights, ask, whole)
        far = self.norm(far.to(x.dtype)) * to_heads(F.silu(rows.take(self.share(x))), self.memories)
        kept = [rows.open(part, old) for part, old in zip(whole, held)]
        after = LaCTState(weights, kept[0], kept[1], kept[2], kept[3], state.count + rows.lengths)
        return self.out(rows.put(near + from_heads(far))), after

    def _first(self) -> FastWeights:
        return FastWeights(*(wide(w).unsqueeze(0) for w in (self.gate, self.up, self.down)))

    def _empty(self, sequences: int, x: Tensor) -> LaCTState:
        weights = self._first().map(lambda w: w.expand(sequences, -1, -1, -1))
        chunk = x.new_zeros(sequences, self.chunk, x.shape[2])
        rates = wide(x.new_zeros(sequences, self.chunk, 3 * self.memories))
        return LaCTState(
            weights, chunk, chunk, chunk, rates, torch.zeros(sequences, dtype=torch.int64, device=x.device)
        )

    def _fast(self, x: Tensor, which: int) -> Tensor:
        """The memory's queries (0) or keys (1): scaled, shifted, through silu, of length 1 in each head."""
        x = F.silu(x * self.scale[which] + self.shift[which]).unflatten(2, (self.memories, -1))
        return (x / (x.norm(dim=-1, keepdim=True) + 1e-5)).flatten(2)

    def _turned(self, x: Tensor, places: Tensor) -> Tensor:
        return from_heads(turn(to_heads(x, self.heads), places.unsqueeze(1), self.angles)).to(x.dtype)

    def _attention(self, rows: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of every chunk by itself, `[S, T, width]`."""
        if not rows.chunks:
            return q
        q = to_heads(q.unflatten(1, (rows.chunks, rows.span)).flatten(0, 1), self.heads)
        k, v = (to_heads(part.unflatten(1, (-1, self.chunk)).flatten(0, 1), self.heads) for part in (k, v))
        seen = Causal().at(rows.places[: rows.span], torch.arange(self.chunk, device=q.device))
        out = attend(q, k, v, mask=seen)
        return from_heads(out).unflatten(0, (-1, rows.chunks)).flatten(1, 2)  # type: ignore[arg-type]

    def _memory(self, rows: Rows, weights: FastWeights, ask: Tensor, whole: list[Tensor]):
        """What each token reads, `[S, M, T, D]`, and the weights after the chunks that are full."""
        ask = wide(to_heads(ask, self.memories))
        _, v, k, rates = whole
        k, v = wide(to_heads(k, self.memories)), wide(to_heads(F.silu(v), self.memories))
        rates = to_heads(rates, self.memories)
        lengths, found = self._first().lengths, []
        for chunk in range(rows.chunks):
            found.append(weights(ask[:, :, chunk * rows.span : (chunk + 1) * rows.span]))
            full = rows.ends >= (chunk + 1) * self.chunk
            if full.any():
                part = slice(chunk * self.chunk, (chunk + 1) * self.chunk)
                told = (k[:, :, part], v[:, :, part], rates[:, :, part])
                weights = read_chunk(weights, *told, lengths=lengths, muon=self.muon).where(full, weights)
        return torch.cat(found, 2) if found else ask, weights
