"""Attention as a mixer, for hybrids: its state is a cache that grows, or one as long as its window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from tilewise.attention import attend
from tilewise.attention.latent.mla import MLA, LatentState, attend_latent, rotate
from tilewise.recurrence.mixer import Mixer, check_width, from_heads, to_heads
from tilewise.recurrence.model import mixer
from tilewise.recurrence.state import Carried
from tilewise.tiles import Causal, Mask, Padding, Window


@dataclass(frozen=True, eq=False)
class Cache(Carried):
    """What attention keeps of the tokens that each of S sequences has seen.

    Attributes:
        parts: `[S, T, ...]` each, such as keys and values; newest tokens last, places before the first hold
            0.
        seen: int64 `[S]`, tokens seen, of which the last `min(seen, T)` are kept.
        window: None where T grows with the longest sequence, or T, which is then constant.
    """

    parts: tuple[Tensor, ...]
    seen: Tensor
    window: int | None = None

    def select(self, sequences: Tensor) -> Cache:
        """The caches of these sequences, no longer than the longest of them."""
        made = super().select(sequences)
        if self.window is not None:
            return made
        longest = int(made.seen.max()) if len(made.seen) else 0
        return Cache(tuple(part[:, part.shape[1] - longest :] for part in made.parts), made.seen)

    def there(self) -> Tensor:
        """bool `[S, T]`: places that hold a token."""
        t = self.parts[0].shape[1]
        return torch.arange(t, device=self.seen.device) >= (t - self.seen).unsqueeze(1)

    def then(self, new: tuple[Tensor, ...], tokens: Tensor | None) -> tuple[tuple[Tensor, ...], Cache]:
        """Old and new parts `[S, T + N, ...]`, which queries read, and the cache after the new tokens.

        `tokens` bool `[S, N]` is False for padding among them; None is all.
        """
        n = new[0].shape[1]
        read = tuple(torch.cat((old, part), 1) for old, part in zip(self.parts, new))
        kept = read
        seen = self.seen + (n if tokens is None else tokens.sum(1))
        if tokens is not None:  # places without a token first, tokens behind them in their order
            order = torch.cat((self.there(), tokens), 1).long().argsort(dim=1, stable=True)
            kept = tuple(part.take_along_dim(order.unsqueeze(2), 1) for part in read)
        length = self.window
        if length is None:  # without padding known without looking
            length = self.parts[0].shape[1] + n if tokens is None else int(seen.max()) if len(seen) else 0
        kept = tuple(part[:, part.shape[1] - length :] for part in kept)
        after = Cache(kept, seen, self.window)
        if tokens is not None:
            there = after.there().unsqueeze(2)
            after = Cache(tuple(part.masked_fill(~there, 0) for part in kept), seen, self.window)
        return read, after


def visible(window: int | None, positions: Tensor, cache: Cache, tokens: Tensor | None, fresh: bool) -> Mask:
    """What queries at `positions` int64 `[S, N]` see of a cache's places and then of their own.

    Causal, within the last `window` tokens (None: all), padding and empty places hidden. `tokens` bool `[S,
    N]` is False for padding; `fresh`: nothing is in the cache yet.
    """
    seen: Mask = Causal() if window is None else Causal() & Window(window - 1, 0)
    kept = cache.parts[0].shape[1]
    if fresh and tokens is None and not kept:
        return seen  # positions are the usual ones, which engines know short cuts for
    new = torch.ones_like(positions, dtype=torch.bool) if tokens is None else tokens
    old = cache.seen.unsqueeze(1) - torch.arange(kept, 0, -1, device=positions.device)
    keys = torch.cat((old, positions), 1).unsqueeze(1)
    return (seen & Padding(torch.cat((cache.there(), new), 1))).at(positions.unsqueeze(1), keys)


class _CacheMixer(Mixer):
    """What mixers with a cache share: packed sequences made rows, positions, masks."""

    window: int | None = None  # tokens that a query sees, itself included; None is all before it

    def new_cache(self, x: Tensor, sequences: int) -> Cache:
        """A cache before any token."""
        length = 0 if self.window is None else self.window - 1
        parts = tuple(x.new_zeros(sequences, length, *shape) for shape in self.shapes())
        seen = torch.zeros(sequences, dtype=torch.int64, device=x.device)
        return Cache(parts, seen, None if self.window is None else length)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of each part of the cache, for a token."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it keeps")

    def read(
        self, x: Tensor, positions: Tensor, cache: Cache, tokens: Tensor | None, mask: Mask
    ) -> tuple[Tensor, Cache]:
        """The mixer for rows `x [S, N, width]` whose tokens stand at `positions` int64 `[S, N]`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it reads")

    def forward(self, x: Tensor, state=None, *, mask=None, cu_seqlens=None):
        if cu_seqlens is not None:
            return self._packed(x, state, cu_seqlens.to(x.device, torch.int64))
        return self._rows(x, state, mask)

    def _rows(self, x: Tensor, state: Cache | None, tokens: Tensor | None) -> tuple[Tensor, Cache]:
        sequences, n = x.shape[:2]
        cache = self.new_cache(x, sequences) if state is None else state
        if len(cache.seen) != sequences:
            raise ValueError(f"the state is of {len(cache.seen)} sequences, the call of {sequences}")
        if tokens is None:
            positions = cache.seen.unsqueeze(1) + torch.arange(n, device=x.device)
        else:
            positions = cache.seen.unsqueeze(1) + (tokens.long().cumsum(1) - 1).clamp(min=0)
            x = x.masked_fill(~tokens.unsqueeze(2), 0)
        out, after = self.read(
            x, positions, cache, tokens, visible(self.window, positions, cache, tokens, state is None)
        )
        return (out if tokens is None else out.masked_fill(~tokens.unsqueeze(2), 0)), after

    def _packed(self, x: Tensor, state: Cache | None, offsets: Tensor) -> tuple[Tensor, Cache]:
        """Sequences as rows with padding behind them, and back."""
        sizes, n = offsets.diff(), x.shape[1]
        owner = torch.searchsorted(offsets[1:].contiguous(), torch.arange(n, device=x.device), right=True)
        places = torch.arange(n, device=x.device) - offsets[owner]
        longest = int(sizes.max()) if len(sizes) else 0
        rows = x.new_zeros(len(sizes), longest, x.shape[2]).index_put((owner, places), x[0])
        tokens = torch.arange(longest, device=x.device) < sizes.unsqueeze(1)
        out, after = self._rows(rows, state, tokens)
        return out[owner, places].unsqueeze(0), after


@mixer("attention")
class Attention(_CacheMixer):
    """Causal softmax attention (Vaswani et al., 2017, arXiv 1706.03762), with grouped heads and rotary
    positions.

    Args:
        width: of the inputs. heads: of queries. kv_heads: of keys and values, which divide them; None is as
            many.
        rope_base: of the rotations' frequencies, of neighbouring features; None does without positions.

    The state is a `Cache` of keys and values. Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self, width: int, heads: int = 4, kv_heads: int | None = None, rope_base: float | None = 10_000.0
    ) -> None:
        super().__init__()
        dim = check_width(width, heads)
        kv_heads = heads if kv_heads is None else kv_heads
        if not isinstance(kv_heads, int) or kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"kv_heads must be an integer >= 1 that divides heads, got {kv_heads!r} and {heads}"
            )
        if rope_base is not None and dim % 2:
            raise ValueError(f"rotary positions want heads of an even size, got {dim}")
        self.heads, self.kv_heads, self.dim, self.rope_base = heads, kv_heads, dim, rope_base
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(width, kv_heads * dim, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width, bias=False)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.kv_heads * self.dim,),) * 2

    def read(self, x, positions, cache, tokens, mask):
        q, k = to_heads(self.query(x), self.heads), to_heads(self.key(x), self.kv_heads)
        if self.rope_base is not None:
            q, k = (rotate(part, positions.unsqueeze(1), self.rope_base) for part in (q, k))
        (keys, values), after = cache.then((from_heads(k), self.value(x)), tokens)
        keys, values = (to_heads(part, self.kv_heads) for part in (keys, values))
        return self.out(from_heads(cast(Tensor, attend(q, keys, values, mask=mask)))), after


@mixer("sliding-window")
class SlidingWindow(Attention):
    """`Attention` that sees the last `window` tokens, itself included; its cache keeps one less, always."""

    def __init__(
        self,
        width: int,
        heads: int = 4,
        kv_heads: int | None = None,
        rope_base: float | None = 10_000.0,
        window: int = 128,
    ) -> None:
        super().__init__(width, heads, kv_heads, rope_base)
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise ValueError(f"window must be an integer >= 1, got {window!r}")
        self.window = window


@mixer("mla")
class LatentAttention(_CacheMixer):
    """`tilewise.attention.MLA` as a mixer: the state is a `Cache` of latents and rotated keys.

    Args:
        width: of the inputs. heads: their number. head_dim: of keys and values; None is width / heads.
        latent: width of what is kept of a token, for all heads together; None is twice head_dim.
        rope_dim: of the rotated part of keys; 0 is no positions, as Kimi Linear has it. query_latent: as in
            MLA.

    Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        width: int,
        heads: int = 4,
        head_dim: int | None = None,
        latent: int | None = None,
        rope_dim: int = 0,
        query_latent: int | None = None,
    ) -> None:
        super().__init__()
        head_dim = check_width(width, heads) if head_dim is None else head_dim
        latent = 2 * head_dim if latent is None else latent
        self.mla = MLA(
            width, heads, head_dim=head_dim, rope_dim=rope_dim, latent=latent, query_latent=query_latent
        )

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.mla.latent,), (self.mla.rope_dim,)

    def read(self, x, positions, cache, tokens, mask):
        own = self.mla
        queries, turned = own.queries(x, positions.unsqueeze(1))
        new = own.keep(x, positions)
        (latent, rope), after = cache.then((new.latent, new.rope), tokens)
        if x.shape[1] == 1:  # one token: all heads read the latents themselves
            q = torch.einsum("bhnd,hcd->bhnc", queries, own.k_up)
            mixed = attend_latent(q, turned, LatentState(latent, rope), own.scale, mask)
            heads = torch.einsum("bhnc,hcd->bhnd", mixed, own.v_up)
        else:
            k, v = (torch.einsum("bnc,hcd->bhnd", latent, up) for up in (own.k_up, own.v_up))
            k = torch.cat((k, rope.unsqueeze(1).expand(-1, own.heads, -1, -1)), -1)
            q = torch.cat((queries, turned), -1)
            heads = cast(Tensor, attend(q, k, v, mask=mask, scale=own.scale))
        return own.out(from_heads(heads)), after
