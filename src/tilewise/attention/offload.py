"""Keys and values in two tiers: recent tokens beside the compute, older ones where there is room."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tilewise.attention.api import attend
from tilewise.tiles import (
    BlockCausal,
    Causal,
    Documents,
    Everything,
    Mask,
    Partial,
    Prefix,
    Window,
    as_mask,
    merge,
)
from tilewise.tiles.masks import Both

TIERS = ("auto", "memory", "disk")
_BY_POSITION = (Everything, Causal, Window, Documents, BlockCausal, Prefix)


@dataclass
class Moved:
    """Bytes that a cache has moved between its tiers so far.

    Attributes:
        spilled: keys and values that went cold, each token once.
        queries, partials: queries to the cold tier's device, `(out, lse)` back; 0 for "disk", whose device is the
            one that computes.
        fetched: keys and values brought back by `OffloadedCache.fetch`; attention brings none back.
    """

    spilled: int = 0
    queries: int = 0
    partials: int = 0
    fetched: int = 0


class OffloadedCache:
    """The keys and values of one layer: the last tokens hot, older ones cold, attention exact over both.

    Attention over the cold part is computed where it lies, in pieces, while the hot part is computed on its own
    device; the partial results are merged by their log-sum-exp. So a step moves queries and one `(out, lse)`,
    never keys or values. This is the CPU-GPU strategy of FastAttention (Lin et al., 2024,
    https://arxiv.org/abs/2410.16663).

    Where it differs: the paper keeps whole layers on one side (`split_layers` does), this one also splits a layer
    between its tokens; `budget=0` is a layer of the paper's CPU, None one of its GPU. Without a GPU the cold tier
    is a mapped file, which the CPU reads piece by piece: that saves memory, not traffic.
    The paper's two levels of tiles and masks made tile by tile are the engines'; its operand layouts for Volta and
    its AllReduce in tiles are not here.

    Args:
        budget: bytes that hot keys and values may take; they are taken at the first `append`. None: all stay hot.
        tier: "memory" (of the CPU), "disk", or "auto": memory for keys and values of a GPU, disk for the CPU's.
        folder: where the file of a disk tier lies, in a folder of its own that is deleted with the cache; None is
            the system's folder for temporary files.
        piece: cold tokens attended to at a time, which bounds what the cold tier works with.

    Modes: prefill, chunked prefill, decode; no gradients. Grouped heads as in `attend`.
    Raises ValueError for a negative budget, an unknown tier and pieces below 1.
    """

    def __init__(
        self, budget: int | None = None, *, tier: str = "auto", folder: str | os.PathLike | None = None,
        piece: int = 4096,
    ) -> None:  # fmt: skip
        if budget is not None and (not isinstance(budget, int) or budget < 0):
            raise ValueError(f"budget must be None or bytes >= 0, got {budget!r}")
        if tier not in TIERS:
            raise ValueError(f"tier must be one of {', '.join(TIERS)}, got {tier!r}")
        if not isinstance(piece, int) or piece < 1:
            raise ValueError(f"piece must be an integer >= 1, got {piece!r}")
        self.budget, self.tier, self.folder, self.piece = budget, tier, folder, piece
        self.tokens = self.cold_tokens = 0
        self.moved = Moved()
        self._depth = 0
        self._tiers: tuple[_Rows, _Rows] | None = None  # hot, cold

    @property
    def hot_tokens(self) -> int:
        """Tokens on the compute device, the last ones."""
        return self.tokens - self.cold_tokens

    @property
    def hot_bytes(self) -> int:
        """Bytes held by the hot tier, room to grow included."""
        return 0 if self._tiers is None else self._tiers[0].rows.nbytes

    @property
    def cold_bytes(self) -> int:
        """Bytes held by the cold tier, room to grow included."""
        return 0 if self._tiers is None else self._tiers[1].rows.nbytes

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens: `k [B, H_kv, n, D]`, `v [B, H_kv, n, D_v]`, of one floating dtype and device throughout.

        What no longer fits the budget spills, oldest first. Raises ValueError or TypeError, the cache unchanged,
        for tensors that do not go with each other or with those before.
        """
        self._check(k, v)
        with torch.no_grad():
            new = torch.cat([k, v], -1).permute(2, 0, 1, 3)  # [n, B, H_kv, D + D_v], as both tiers hold them
            if self._tiers is None:
                self._begin(new, k.shape[3])
            hot, cold = self._held("append to")
            end = self.tokens + len(new)
            if self.budget is None:
                hot.grow(end)
            leaving = max(0, self.hot_tokens + len(new) - len(hot.rows))
            old = min(leaving, self.hot_tokens)
            if leaving:
                cold.grow(self.cold_tokens + leaving)
                oldest = self._slots(self.cold_tokens, self.cold_tokens + old)
                cold.rows[self.cold_tokens : self.cold_tokens + old] = hot.rows[oldest].to(cold.rows.device)
                cold.rows[self.cold_tokens + old : self.cold_tokens + leaving] = new[: leaving - old]
                self.moved.spilled += leaving * new[:1].nbytes
            staying = new[leaving - old :]
            hot.rows[self._slots(end - len(staying), end)] = staying
            self.tokens, self.cold_tokens = end, self.cold_tokens + leaving

    def attend(
        self, q: Tensor, *, mask: Mask | str | None = "causal", scale: float | None = None,
        softcap: float | None = None, engine: str = "auto", cold_engine: str = "auto", return_lse: bool = False,
    ) -> Tensor | Partial:  # fmt: skip
        """Attention of the last tokens' queries over all tokens, as `tilewise.attend` has it.

        Args:
            q: `[B, H_q, N_q, D]` on the compute device, queries of the last N_q tokens.
            mask: None, "causal", or `Causal`, `Window`, `Documents`, `BlockCausal`, `Prefix` and what `&` makes of
                them; each piece of the cache gets its own limits, a few integers per token.
            scale, softcap, return_lse: as in `attend`. engine, cold_engine: who computes on either side.

        Raises ValueError before the first `append`, for masks that do not go by positions and where gradients are
        asked for, and whatever `attend` raises.
        """
        view = _by_position(mask)
        hot, cold = self._held("attend to")
        if torch.is_grad_enabled() and isinstance(q, Tensor) and q.requires_grad:
            raise ValueError("q must not require a gradient: an offloaded cache is for inference")
        n_q = q.shape[2] if isinstance(q, Tensor) and q.ndim == 4 else 0
        q_pos = torch.arange(self.tokens - n_q, self.tokens)

        def part(q: Tensor, rows: Tensor, k_pos: Tensor, engine: str) -> Partial:
            k, v = rows.permute(1, 2, 0, 3).split([self._depth, rows.shape[3] - self._depth], 3)
            limits = view.at(q_pos.to(q.device), k_pos)
            done = attend(q, k, v, mask=limits, scale=scale, softcap=softcap, engine=engine, return_lse=True)
            return Partial(*done)

        with torch.no_grad():
            # Queries leave before the hot part is launched: a copy from a GPU waits for what came before it.
            far = self._carry(q, cold.rows.device) if self.cold_tokens else q
            parts = []
            if self.hot_tokens or not self.cold_tokens:
                parts.append(part(q, hot.rows[: self.hot_tokens], self._positions(), engine))
            running: Partial | None = None
            for start in range(0, self.cold_tokens, self.piece):
                end = min(start + self.piece, self.cold_tokens)
                one = part(far, cold.rows[start:end], torch.arange(start, end), cold_engine)
                one = Partial(one.out.to(one.lse.dtype), one.lse)  # merged in full, rounded once
                running = one if running is None else merge([running, one])
            if running is not None:
                back = running.out.to(q.dtype), running.lse
                parts.append(Partial(*(self._carry(x, q.device) for x in back)))
                if self.tier == "memory":
                    self.moved.queries += q.nbytes
                    self.moved.partials += back[0].nbytes + back[1].nbytes
            whole = merge(parts)
        return whole if return_lse else whole.out

    def fetch(self) -> tuple[Tensor, Tensor]:
        """All keys `[B, H_kv, N, D]` and values `[B, H_kv, N, D_v]` in order, copied to the compute device.

        Raises ValueError before the first `append`.
        """
        hot, cold = self._held("fetch")
        old = cold.rows[: self.cold_tokens]
        recent = hot.rows[self._slots(self.cold_tokens, self.tokens)]
        rows = torch.cat([old.to(recent.device), recent]).permute(1, 2, 0, 3)
        self.moved.fetched += old.nbytes
        return rows[..., : self._depth], rows[..., self._depth :]

    def _begin(self, new: Tensor, depth: int) -> None:
        """Both tiers, sized by the first tokens."""
        tier = ("disk" if new.device.type == "cpu" else "memory") if self.tier == "auto" else self.tier
        hot = _Rows(new, new.device)
        if self.budget is not None:
            hot.grow(self.budget // max(1, new.nbytes // max(1, len(new))), exactly=True)
        cold = _Rows(new, torch.device("cpu"), self.folder, on_disk=tier == "disk")
        self._depth, self._tiers, self.tier = depth, (hot, cold), tier

    def _held(self, purpose: str) -> tuple[_Rows, _Rows]:
        """Both tiers, hot and cold."""
        if self._tiers is None:
            raise ValueError(f"nothing to {purpose}: append keys and values first")
        return self._tiers

    def _slots(self, start: int, end: int) -> Tensor:
        """Where the hot tokens `start` to `end - 1` lie: a ring, so that none is ever moved up."""
        rows = self._held("find")[0].rows
        return torch.arange(start, end, device=rows.device) % max(1, len(rows))

    def _positions(self) -> Tensor:
        """The position of the token in each hot slot, `[hot_tokens]`."""
        slots = self._slots(0, self.hot_tokens)
        return self.cold_tokens + (slots - self.cold_tokens) % max(1, self.hot_tokens)

    def _carry(self, x: Tensor, device: torch.device) -> Tensor:
        """`x` for the other tier. A disk's pages are read by the device that computes: nothing to carry."""
        return x if self.tier == "disk" else x.to(device, copy=True)

    def _check(self, k: Tensor, v: Tensor) -> None:
        for name, x in (("k", k), ("v", v)):
            if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
                given = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"{name} must be a floating tensor [B, H_kv, n, D], got {given}")
        if k.shape[:3] != v.shape[:3] or k.dtype != v.dtype or k.device != v.device:
            raise ValueError(
                f"k and v must share batch, heads, tokens, dtype and device, got {k.dtype} {list(k.shape)} on"
                f" {k.device} and {v.dtype} {list(v.shape)} on {v.device}"
            )
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ValueError("k and v must not require gradients: an offloaded cache is for inference")
        if self._tiers is None:
            return
        rows = self._tiers[0].rows
        have = (*rows.shape[1:3], self._depth, rows.shape[3] - self._depth, rows.dtype, rows.device)
        got = (*k.shape[:2], k.shape[3], v.shape[3], k.dtype, k.device)
        if have != got:
            raise ValueError(
                f"k and v must be as those before, (B, H_kv, D, D_v, dtype, device) {have}, got {got}"
            )


class _Rows:
    """Rows like `like`'s, `[room, B, H_kv, D + D_v]`: in memory, or in a file that is mapped."""

    def __init__(
        self,
        like: Tensor,
        device: torch.device,
        folder: str | os.PathLike | None = None,
        on_disk: bool = False,
    ) -> None:
        self.rows = like.new_empty((0, *like.shape[1:]), device=device)
        self.path: Path | None = None
        if on_disk:
            own = tempfile.mkdtemp(prefix="tilewise-", dir=folder)
            weakref.finalize(self, shutil.rmtree, own, ignore_errors=True)
            self.path = Path(own) / "rows"

    def grow(self, room: int, exactly: bool = False) -> None:
        """Room for at least `room` rows, twice as many as before so that growing stays cheap."""
        have = len(self.rows)
        if room <= have:
            return
        shape = (room if exactly else max(room, 2 * have), *self.rows.shape[1:])
        if self.path is not None and math.prod(shape):
            # A longer map of the same file; what was written stays.
            size, dtype = math.prod(shape), self.rows.dtype
            with self.path.open(
                "ab"
            ) as file:  # torch.from_file overwrites the first byte of a file it lengthens
                file.truncate(size * dtype.itemsize)
            self.rows = torch.from_file(str(self.path), shared=True, size=size, dtype=dtype).view(shape)
            return
        longer = self.rows.new_empty(shape)
        longer[:have] = self.rows
        self.rows = longer


def split_layers(layers: int, device_bytes: int, layer_bytes: int, other_bytes: int = 0) -> list[int | None]:
    """The paper's split: budgets for the caches of `layers` layers, None (hot) for as many as fit, 0 for the rest.

    Args:
        device_bytes: memory of the compute device; other_bytes: of it, what weights and activations take.
        layer_bytes: keys and values of one layer at the longest sequence, for the whole batch.

    Raises ValueError for negative numbers, and a layer of no bytes.
    """
    given = {"layers": layers, "device_bytes": device_bytes, "other_bytes": other_bytes}
    for name, value in given.items():
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if layer_bytes < 1:
        raise ValueError(f"layer_bytes must be >= 1, got {layer_bytes}")
    hot = min(layers, max(0, device_bytes - other_bytes) // layer_bytes)
    return [None] * hot + [0] * (layers - hot)


def _by_position(mask: Mask | str | None) -> Mask:
    """The mask, if positions are all it asks for: then every piece of the cache can be bound on its own."""

    def fits(one: Mask) -> bool:
        return (
            fits(one.first) and fits(one.second) if isinstance(one, Both) else isinstance(one, _BY_POSITION)
        )

    made = None if isinstance(mask, Tensor) else as_mask(mask)
    if made is None or not fits(made):
        raise ValueError(
            "mask must be None, 'causal' or made of Causal, Window, Documents, BlockCausal and Prefix, got"
            f" {type(mask).__name__}"
        )
    return made
