"""Attention over paged keys and values: decoding, chunked prefill, packed queries, hooks on mask and scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.attention.paged.pages import Pages
from tilewise.kernels.attend_tiles import Call, attend
from tilewise.tiles import Mask, Partial, Visibility, as_mask
from tilewise.tiles.visibility import to_heads

MaskFunction = Callable[[Tensor, Tensor], Tensor]
LogitsHook = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_paged(
    q: Tensor,
    pages: Pages,
    *,
    q_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Mask | MaskFunction | Tensor | str | None = "causal",
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    logits_hook: LogitsHook | None = None,
    engine: str = "auto",
    return_lse: bool = False,
) -> Tensor | Partial:
    """Attention of each sequence's last queries over its pages (FlashInfer: Ye et al., 2025, arXiv 2501.01005).

    The queries' own keys and values are in the pages already: append first. One query per sequence is decoding,
    more are a chunk of a prompt. For inference: there is no gradient.

    Differs from the paper: variants are arguments, not code compiled into a kernel. Masks (windows, documents, any
    boolean), soft cap and bias run on every engine; a `logits_hook` is exact on every engine too, but slow, as the
    pages are gathered and all scores made before the engine sees them. Variants without a softmax (sigmoid
    attention) are not offered. Scheduling is the engine's (see `tilewise.attention.paged.balance`).

    Args:
        q: `[B, H_q, n_q, D]`, in the pools' dtype, the last n_q tokens of each sequence; with `cu_seqlens`
            `[1, H_q, total, D]`. H_q is a multiple of H_kv.
        q_lengths: int64 `[B]`, 0 to n_q: the first so many rows are sequence b's last tokens, the others are
            padding and get out 0, lse -inf. None = all n_q.
        cu_seqlens: int64 `[B + 1]`, starts of the sequences' queries in packed q, and the total.
        mask: as for `tilewise.attend` over positions in the sequence, "causal" by default; a boolean tensor has at
            least as many columns as the longest sequence has tokens; a function `(q_pos [B, 1, n_q, 1],
            k_pos [1, 1, 1, N_k]) -> bool`, broadcastable to `[B, H_q, n_q, N_k]`, is computed as that grid.
        bias: additive, floating, `[B|1, H_q|1, n_q|1, N_k|1]`, columns as for a mask tensor. With `cu_seqlens` the
            rows of bias or mask tensor are those of q: `[1, H_q|1, total|1, N_k|1]`.
        scale: factor of the scores; None is 1/sqrt(D). softcap: cap scores smoothly at this magnitude.
        logits_hook: `(scores [B, H_q, n_q, N_k], q_pos, k_pos) -> scores`, applied after scale, soft cap and bias;
            positions as for a mask function. What the mask hides stays hidden.
        engine: "auto", or the name of an engine, which then runs or raises.
        return_lse: also return the natural log of each row's sum of exponentials.

    Returns:
        As q with D_v features, or with `return_lse` a `Partial(out, lse)`. A row that sees nothing gets out 0.

    Raises TypeError, ValueError: an argument that does not fit, by name.
    """
    variant = Variant(mask, scale, softcap, logits_hook, engine)
    check_queries(q, pages, packed=cu_seqlens is not None)
    rows = q.shape[2]
    seen = mask if isinstance(mask, Tensor) else None
    bias = _grid("bias", bias, q, pages)
    if seen is not None:
        if seen.dtype != torch.bool:
            raise TypeError(f"mask must be boolean as a tensor (additive ones are a bias), got {seen.dtype}")
        seen, variant = _grid("mask", seen, q, pages), replace(variant, mask=None)
    keys = Keys.of(pages)
    if cu_seqlens is None:
        counts = check_counts(q_lengths, q, len(pages.lengths))
        partial = attend_keys(q, keys, *places(keys.lengths, counts, rows), None, variant, bias, seen)
    elif q_lengths is not None:
        raise ValueError("q_lengths and cu_seqlens are two ways to say one thing, got both")
    else:
        partial = _attend_packed(
            q, keys, _check_packed(cu_seqlens, q, len(pages.lengths)), variant, bias, seen
        )
    return partial if return_lse else partial.out


@dataclass(frozen=True, eq=False)
class Variant:
    """What is done with the scores, and who does it: arguments of `attend_paged`, by the same names."""

    mask: Mask | MaskFunction | Tensor | str | None
    scale: float | None
    softcap: float | None
    logits_hook: LogitsHook | None
    engine: str

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be None or > 0, got {self.softcap!r}")

    def view(self, q_pos: Tensor, k_pos: Tensor) -> Visibility:
        """The mask for queries and keys at these positions."""
        if callable(self.mask):
            seen = self.mask(q_pos.unsqueeze(3), k_pos.unsqueeze(2))
            if not isinstance(seen, Tensor) or seen.dtype != torch.bool or seen.ndim != 4:
                raise TypeError(
                    f"mask must return a boolean tensor [B|1, H|1, n_q|1, N_k|1], returned {type(seen)}"
                )
            seen = seen.expand(*seen.shape[:2], q_pos.shape[2], k_pos.shape[2])
            return Visibility.everything(q_pos, k_pos).with_dense(seen)
        made = as_mask(self.mask)
        return made.bind(q_pos.shape[2], k_pos.shape[2], q_pos=q_pos, k_pos=k_pos, device=q_pos.device)


class Keys(NamedTuple):
    """Keys and values of sequences: pools with a table, or without one `[B, H_kv, N, D]`."""

    k: Tensor
    v: Tensor
    lengths: Tensor
    table: Tensor | None

    @classmethod
    def of(cls, source: Pages | tuple[Tensor, Tensor]) -> Keys:
        """Those of `Pages`, with no more entries than the longest sequence needs, or of plain `(k, v)`."""
        if isinstance(source, Pages):
            most = int(source.lengths.max()) if len(source.lengths) else 0
            table = source.table[:, : max(1, -(-most // source.size))]
            return cls(source.k, source.v, source.lengths, table)
        fits = isinstance(source, tuple) and len(source) == 2 and all(isinstance(x, Tensor) for x in source)
        if not fits or any(x.ndim != 4 for x in source) or source[0].shape[:3] != source[1].shape[:3]:
            raise TypeError("keys must be Pages or (k, v) with k [B, H_kv, N, D] and v [B, H_kv, N, D_v]")
        k, v = source
        return cls(k, v, torch.full((k.shape[0],), k.shape[2], device=k.device), None)

    @property
    def tokens(self) -> int:
        """Keys in a row, used or not."""
        return self.k.shape[2] * (1 if self.table is None else self.table.shape[1])

    def rows(self, index: Tensor) -> Keys:
        """Only these sequences."""
        if self.table is None:
            return Keys(self.k[index], self.v[index], self.lengths[index], None)
        return Keys(self.k, self.v, self.lengths[index], self.table[index])


def places(lengths: Tensor, counts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Positions of the queries, int64 `[B, 1, rows]`, and which of the rows are queries at all."""
    row = torch.arange(rows, device=lengths.device)
    real = (row < counts.unsqueeze(1)).unsqueeze(1)
    at = (lengths - counts).unsqueeze(1) + row
    return at.unsqueeze(1).masked_fill(~real, 0), real


def attend_keys(
    q: Tensor,
    keys: Keys,
    q_pos: Tensor,
    real: Tensor,
    start: Tensor | None,
    variant: Variant,
    bias: Tensor | None = None,
    seen: Tensor | None = None,
) -> Partial:
    """Queries `[B, H_q, n_q, D]` at `q_pos [B, 1, n_q]` over keys from position `start [B]` on (None: from 0)."""
    k_pos = torch.arange(keys.tokens, device=q.device).view(1, 1, -1)
    ends = keys.lengths
    if start is not None:
        k_pos, ends = k_pos + start.view(-1, 1, 1), ends + start
    view = variant.view(q_pos, k_pos).limit(hi=torch.where(real, ends.view(-1, 1, 1) - 1, -1))
    if seen is not None:
        view = view.with_dense(_columns(seen, keys.tokens).expand(-1, -1, q.shape[2], keys.tokens))
    bias = None if bias is None else _columns(bias, keys.tokens)
    scale = 1 / math.sqrt(q.shape[3]) if variant.scale is None else float(variant.scale)
    call = Call(q, keys.k, keys.v, view, bias=bias, scale=scale, softcap=variant.softcap, pages=keys.table)
    if variant.logits_hook is not None:
        call = _hooked(call, variant.logits_hook, k_pos)
    partial = attend(call, variant.engine)
    # Rows that see nothing look at pages of others, which may hold anything.
    return partial._replace(out=partial.out.masked_fill((partial.lse == -torch.inf).unsqueeze(-1), 0))


def _hooked(call: Call, hook: LogitsHook, k_pos: Tensor) -> Call:
    """The same call with its scores made here, changed by the hook, and given to the engine as a bias on zeros."""
    wide = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    k = to_heads(call.gathered().k, call.q.shape[1]).to(wide)
    scores = call.scale * call.q.to(wide) @ k.mT
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.bias is not None:
        scores = scores + call.bias
    made = hook(scores, call.view.q_pos.unsqueeze(3), k_pos.unsqueeze(2))
    if not isinstance(made, Tensor) or made.shape != scores.shape or not made.is_floating_point():
        given = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise TypeError(f"logits_hook must return floating scores {list(scores.shape)}, returned {given}")
    return replace(call, bias=made.to(wide), scale=0.0, softcap=None)


def _attend_packed(q: Tensor, keys: Keys, counts: Tensor, variant: Variant, bias, seen) -> Partial:
    """Packed queries, in one call for all sequences whose counts lie in one octave, so padding is below a half."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(1, q.shape[1], q.shape[2], keys.v.shape[3])
    lse = q.new_full((1, *q.shape[1:3]), -torch.inf, dtype=wide)
    starts = counts.cumsum(0) - counts
    octaves = [int(count).bit_length() for count in counts]
    for octave in sorted(set(octaves) - {0}):
        members = torch.tensor([b for b, x in enumerate(octaves) if x == octave], device=q.device)
        some, own = counts[members], keys.rows(members)
        q_pos, real = places(own.lengths, some, int(some.max()))
        index = (starts[members].unsqueeze(1) + torch.arange(q_pos.shape[2], device=q.device)) * real[:, 0]

        def cut(x: Tensor | None, index: Tensor = index) -> Tensor | None:
            return x if x is None or x.shape[2] == 1 != q.shape[2] else x[0][:, index].transpose(0, 1)

        partial = attend_keys(cut(q), own, q_pos, real, None, variant, cut(bias), cut(seen))  # type: ignore[arg-type]
        out[0][:, index[real[:, 0]]] = partial.out.transpose(0, 1)[:, real[:, 0]]
        lse[0][:, index[real[:, 0]]] = partial.lse.transpose(0, 1)[:, real[:, 0]]
    return Partial(out, lse)


def _columns(x: Tensor, tokens: int) -> Tensor:
    """Mask or bias with as many columns as there are keys; those that are added belong to no sequence."""
    if x.shape[3] == 1:
        return x
    return torch.nn.functional.pad(x[..., :tokens], (0, max(0, tokens - x.shape[3])))


def _grid(name: str, x: Tensor | None, q: Tensor, pages: Pages) -> Tensor | None:
    if x is None:
        return None
    if not isinstance(x, Tensor) or not 1 <= x.ndim <= 4 or x.device != q.device:
        raise TypeError(f"{name} must be a tensor [B|1, H_q|1, n_q|1, N_k|1] on {q.device}")
    if name == "bias" and not x.is_floating_point():
        raise TypeError(f"bias must be floating, got {x.dtype}")
    x = x[(None,) * (4 - x.ndim)]
    least = int(pages.lengths.max()) if len(pages.lengths) else 0
    if any(have not in (1, want) for have, want in zip(x.shape, q.shape[:3])) or 1 != x.shape[3] < least:
        wanted = [*q.shape[:3], f"at least {least}"]
        raise ValueError(f"{name} must broadcast to {wanted}, got {list(x.shape)}")
    return x


def check_queries(q: Tensor, pages: Pages, packed: bool = False) -> None:
    """Raise unless q fits the pages."""
    if not isinstance(pages, Pages):
        raise TypeError(f"pages must be Pages, got {type(pages).__name__}")
    if not isinstance(q, Tensor) or q.dtype != pages.k.dtype or q.device != pages.k.device:
        given = f"{q.dtype} on {q.device}" if isinstance(q, Tensor) else type(q).__name__
        raise TypeError(f"q must be {pages.k.dtype} on {pages.k.device} like the pages, got {given}")
    kv_heads, d = pages.k.shape[1], pages.k.shape[3]
    batch = 1 if packed else len(pages.lengths)
    if q.ndim != 4 or q.shape[0] != batch or not q.shape[1] or q.shape[1] % kv_heads or q.shape[3] != d:
        raise ValueError(f"q must be [{batch}, a multiple of {kv_heads}, n_q, {d}], got {list(q.shape)}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, pages.k, pages.v)):
        raise ValueError(
            "q and pages must need no gradient: paged attention is for inference (torch.no_grad)"
        )


def check_counts(q_lengths: Tensor | None, q: Tensor, batch: int) -> Tensor:
    """Queries of each sequence, int64 `[B]`."""
    if q_lengths is None:
        return torch.full((batch,), q.shape[2], dtype=torch.int64, device=q.device)
    fits = isinstance(q_lengths, Tensor) and q_lengths.dtype == torch.int64 and q_lengths.shape == (batch,)
    if not fits or q_lengths.device != q.device:
        raise TypeError(f"q_lengths must be int64 [{batch}] on {q.device}")
    if bool(((q_lengths < 0) | (q_lengths > q.shape[2])).any()):
        raise ValueError(f"q_lengths must be in 0..{q.shape[2]}, got {q_lengths.tolist()}")
    return q_lengths


def _check_packed(cu_seqlens: Tensor, q: Tensor, batch: int) -> Tensor:
    fits = isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype in (torch.int32, torch.int64)
    if not fits or cu_seqlens.shape != (batch + 1,) or cu_seqlens.device != q.device:
        raise TypeError(f"cu_seqlens must be int32 or int64 [{batch + 1}] on {q.device}")
    counts = cu_seqlens.to(torch.int64).diff()
    if int(cu_seqlens[0]) or int(cu_seqlens[-1]) != q.shape[2] or bool((counts < 0).any()):
        raise ValueError(
            f"cu_seqlens must go from 0 to the {q.shape[2]} queries without decreasing, got {cu_seqlens.tolist()}"
        )
    return counts
