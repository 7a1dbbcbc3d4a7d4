"""Large-chunk test-time training: fast weights updated once a chunk, attention to what is near."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.attention import attend
from tilewise.attention.gates.rotary import frequencies, turn
from tilewise.recurrence.attention_mixer import Cache, visible
from tilewise.recurrence.fast_weights import FastWeights, Lessons, orthogonal
from tilewise.recurrence.learner import Learner, Places, walk
from tilewise.recurrence.mixer import HeadNorm, Mixer, check_width, from_heads, to_heads, wide
from tilewise.recurrence.model import mixer
from tilewise.recurrence.rows import Rows
from tilewise.recurrence.state import Carried
from tilewise.tiles import Causal, Window


@dataclass(frozen=True, eq=False)
class LaCTState(Carried):
    """The memory, and the window; of one size whatever was read.

    Attributes:
        memory: its weights after the last full chunk, and what the open one adds so far; float32 or wider.
        near: keys, turned, and values of the last `window - 1` tokens. count: int64 `[S]`, tokens read.
    """

    memory: Learner
    near: Cache
    count: Tensor


@mixer("lact")
class LaCT(Mixer):
    """Large-chunk test-time training (Zhang et al., 2025, arXiv 2505.23884), the layer for language.

    A token reads the memory as the chunks before its own have left it (apply, then update), and the last
    `window` tokens by attention; both share queries, keys and values. At a chunk's end the memory, a SwiGLU
    network, takes one gradient step on `-f(k) . v` summed over the chunk's tokens, each with its own rates,
    and the rows of its weights are brought back to the length they began with.

    Differs from the authors' code: the memory's arithmetic is float32 or wider throughout, the open chunk's
    step is summed up as its tokens come instead of kept as keys and values, and there is no momentum.

    Args:
        width: of the inputs. heads: of attention. memories: heads of the memory. chunk: tokens of an update.
        window: tokens that attention sees, itself included; None is as many as a chunk has, and then the two
            together miss nothing.
        expand: hidden size of the memory as a share of its head's. rate: what rates begin at. muon:
            orthogonalise updates by Newton-Schulz iterations. base: of the rotary angles.

    Raises ValueError for sizes below 1 and those that do not divide.
    """

    def __init__(
        self,
        width: int,
        heads: int = 4,
        memories: int = 1,
        chunk: int = 2048,
        window: int | None = None,
        *,
        expand: float = 1.0,
        rate: float = 0.001,
        muon: bool = False,
        base: float = 500000.0,
    ) -> None:
        super().__init__()
        dim, part = check_width(width, heads), check_width(width, memories)
        check_width(chunk, 1, "chunk")
        window = chunk if window is None else window
        check_width(window, 1, "window")
        hidden = int(part * expand)
        check_width(hidden, 1, "width / memories * expand")
        if not rate > 0:
            raise ValueError(f"rate must be above 0, got {rate!r}")
        self.heads, self.memories, self.chunk, self.window, self.muon = heads, memories, chunk, window, muon
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
        fresh = state is None
        if state is None:
            state = self._empty(rows.filled.shape[0], x)
        places = (state.count - rows.filled).unsqueeze(1) + rows.places  # [s, t], since the sequence began
        q, k = self.query_norm(self.query(x)), self.key_norm(self.key(x))
        ask, fast = (self._turned(rows.take(self._fast(part, i)), places) for i, part in enumerate((q, k)))
        q, k = (self._turned(rows.take(part), places) for part in (q, k))
        v, rates = rows.take(self.value(x)), rows.take(F.softplus(wide(self.rate(x))))
        near, cache = self._attention(rows, places, state.near, (q, k, v), fresh)
        far, memory = self._memory(rows, state.memory, ask, fast, v, rates)
        far = self.norm(far.to(x.dtype)) * to_heads(F.silu(rows.take(self.share(x))), self.memories)
        after = LaCTState(memory, cache, state.count + rows.lengths)
        return self.out(rows.put(near + from_heads(far))), after

    def _first(self) -> FastWeights:
        return FastWeights(*(wide(w).unsqueeze(0) for w in (self.gate, self.up, self.down)))

    def _empty(self, sequences: int, x: Tensor) -> LaCTState:
        memory = Learner.fresh(self._first().map(lambda w: w.expand(sequences, -1, -1, -1)))
        none = torch.zeros(sequences, dtype=torch.int64, device=x.device)
        held = x.new_zeros(sequences, self.window - 1, x.shape[2])
        return LaCTState(memory, Cache((held, held), none, self.window - 1), none)

    def _fast(self, x: Tensor, which: int) -> Tensor:
        """The memory's queries (0) or keys (1): scaled, shifted, through silu, of length 1 in each head."""
        x = F.silu(x * self.scale[which] + self.shift[which]).unflatten(2, (self.memories, -1))
        return (x / (x.norm(dim=-1, keepdim=True) + 1e-5)).flatten(2)

    def _turned(self, x: Tensor, places: Tensor) -> Tensor:
        return from_heads(turn(to_heads(x, self.heads), places.unsqueeze(1), self.angles)).to(x.dtype)

    def _attention(
        self, rows: Rows, places: Tensor, near: Cache, parts: tuple[Tensor, ...], fresh: bool
    ) -> tuple[Tensor, Cache]:
        """Attention of each token to the window that ends with it, `[S, T, width]`, and the window after."""
        length = parts[0].shape[1]
        used = (int(rows.ends.max()) if len(rows.ends) else 0) - rows.start  # behind it no row has a token
        q, k, v, places, real = (part[:, :used] for part in (*parts, places, rows.real))
        tokens = None if bool(real.all()) else real
        read, after = near.then((k, v), tokens)
        seen = visible(self.window, places, near, tokens, fresh)
        if fresh and tokens is None:  # nothing came before: no places to hide
            read, seen = (k, v), Causal() & Window(self.window - 1, 0)
        q, k, v = (to_heads(part, self.heads) for part in (q, *read))
        out = from_heads(cast(Tensor, attend(q, k, v, mask=seen)))
        return F.pad(out, (0, 0, 0, length - used)), after

    def _memory(
        self, rows: Rows, memory: Learner, ask: Tensor, k: Tensor, v: Tensor, rates: Tensor
    ) -> tuple[Tensor, Learner]:
        """What each token reads, `[S, M, T, D]`, and the memory after the rows."""
        q, k, v = (wide(to_heads(part, self.memories)) for part in (ask, k, F.silu(v)))
        lengths = self._first().lengths

        def read(memory: Learner, part: slice, lessons: Lessons) -> Tensor:
            return memory.weights(q[:, :, part])

        def update(weights: FastWeights, step: FastWeights) -> FastWeights:
            return weights.moved(step.map(orthogonal) if self.muon else step, lengths)

        told = (k, v, to_heads(rates, self.memories))
        return walk(memory, told, self.chunk, Places.of(rows), read, loss="dot", update=update)
