"""BlockRank: many documents and a query in one prompt, ranked by the query's attention to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.attention.scores import grouped
from tilewise.tiles import Mask, Visibility

QUERY_START = 16384  # where the authors' code lets positions of the query begin


@dataclass(frozen=True, eq=False)
class BlockRank(Mask):
    """Causal attention of a ranking prompt: instruction, M documents, query (Gupta et al., 2025, arXiv 2510.05396).

    Documents see the instruction and themselves, the query sees everything before it, so the cost is linear in the
    number of documents. Documents share positions (`positions`), so their order does not matter. How much the last
    tokens of the query attend to each document in a middle layer (`relevance`) ranks them without decoding a word,
    after training with `ranking_loss` beside the usual loss; the authors add it with weight 0.1 at layer 20 of 32.

    As a mask it is three conditions on positions, of a few integers per token: causal; a key's segment is at most
    the query's; and with documents counted backwards it is so again, which leaves the instruction and the own
    document. Nothing N x N is made.

    Differs from the paper: segments may have any length and lie packed, without padding each to the longest.

    Args:
        cu_seqlens: int32 or int64 `[M + 3]`, or `[B, M + 3]` for a batch: where the instruction, each document and
            the query start, and the end. Segments may be empty, so that batch entries can have fewer documents.
            Tokens at or after the end belong to the query too: the answer that is being decoded, or padding, which
            a padding mask hides.
    """

    cu_seqlens: Tensor

    def __post_init__(self) -> None:
        cu = self.cu_seqlens
        if not isinstance(cu, Tensor) or cu.dtype not in (torch.int32, torch.int64) or cu.ndim not in (1, 2):
            given = f"{cu.dtype} {list(cu.shape)}" if isinstance(cu, Tensor) else type(cu).__name__
            raise TypeError(f"cu_seqlens must be an int32 or int64 tensor [M + 3] or [B, M + 3], got {given}")
        if cu.shape[-1] < 3 or bool((cu[..., 0] != 0).any()) or bool((cu.diff(dim=-1) < 0).any()):
            raise ValueError("cu_seqlens must start at 0, never decrease and hold at least three entries")

    @classmethod
    def of(cls, instruction: int, documents: Sequence[int], query: int) -> BlockRank:
        """The mask of one prompt, from the lengths of its segments in tokens."""
        lengths = [instruction, *documents, query]
        if any(not isinstance(n, int) or n < 0 for n in lengths):
            raise ValueError(f"lengths must be integers >= 0, got {lengths}")
        return cls(torch.tensor([0, *lengths]).cumsum(0))

    @property
    def documents(self) -> int:
        """How many documents there are, empty ones included."""
        return self.cu_seqlens.shape[-1] - 3

    @property
    def present(self) -> Tensor:
        """Bool `[B|1, M]`: documents that have tokens."""
        return self._starts().diff(dim=-1)[:, 1:] > 0

    def narrow(self, view: Visibility) -> Visibility:
        last = self.documents + 1
        q_segment, k_segment = self.segments(view.q_pos), self.segments(view.k_pos)
        none = torch.zeros_like(q_segment)
        alone = (q_segment == 0) | (q_segment == last)
        view = view.limit(hi=view.q_pos).with_axis(none, q_segment, k_segment)
        backwards = (last - k_segment).masked_fill(k_segment == 0, 0)
        return view.with_axis(none, (last - q_segment).masked_fill(alone, last), backwards)

    def segments(self, places: Tensor) -> Tensor:
        """The segment of the tokens at these places `[b, h, N]`: 0 instruction, 1 to M documents, M + 1 query."""
        ends = self._starts(places.device)[:, 1:].unsqueeze(1)  # [B, 1, M + 1]
        shape = torch.broadcast_shapes(ends.shape[:2], places.shape[:2])
        ends = ends.expand(*shape, -1).contiguous()
        return torch.searchsorted(ends, places.expand(*shape, -1).contiguous(), right=True)

    def positions(self, n: int | None = None, query_start: int | None = QUERY_START) -> Tensor:
        """Position ids for rotary or learned embeddings, int64 `[N]`, or `[B, N]` where the mask has a batch.

        The instruction counts from 0, every document goes on from the end of the instruction, and the query begins
        at `query_start`, or right after the longest document when that is None. So neither the number of documents
        nor their order moves anything.

        Args:
            n: how many tokens, by default to the end of `cu_seqlens` (the largest, for a batch).

        Raises ValueError when `query_start` lies within the documents' positions.
        """
        starts = self._starts()
        n = int(self.cu_seqlens.max()) if n is None else n
        sizes = starts.diff(dim=-1)
        free = sizes[:, 0] + (sizes[:, 1:].amax(1) if self.documents else 0)
        if query_start is not None and query_start < int(free.max()):
            raise ValueError(
                f"query_start must be at least {int(free.max())}, after the documents, got {query_start}"
            )
        begins = sizes[:, :1].repeat(1, self.documents + 2)
        begins[:, 0] = 0
        begins[:, -1] = free if query_start is None else query_start
        places = torch.arange(n, device=starts.device).view(1, 1, n)
        segment = self.segments(places)[:, 0]
        ids = places[0] - starts.gather(1, segment) + begins.gather(1, segment)
        return ids if self.cu_seqlens.ndim == 2 else ids[0]

    def relevance(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
        """Share of the attention to documents that falls on each, as seen by chosen tokens of the query.

        Softmax over the tokens of all documents (the instruction and the query itself left out), summed within
        each document, averaged over heads and tokens; as in the authors' code, who choose the last token of the
        prompt and the first of the answer. Differentiable. Holds `[B, H_q, S, N]` numbers, never N x N.

        Args:
            q: `[B, H_q, S, D]`, a layer's queries of the chosen tokens, with positions applied.
            k: `[B, H_kv, N, D]`, its keys of the whole prompt; more than the prompt is ignored.
            scale: factor of the scores, None for 1/sqrt(D).

        Returns float32 (float64 for such inputs) `[B, M]`; rows sum to 1, or to 0 where no document has tokens.
        """
        for name, x in (("q", q), ("k", k)):
            if x.ndim != 4 or not x.is_floating_point():
                raise ValueError(
                    f"{name} must be a floating tensor [B, H, N, D], got {x.dtype} {list(x.shape)}"
                )
        if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or not k.shape[1] or q.shape[1] % k.shape[1]:
            raise ValueError(f"q and k do not fit: {list(q.shape)} and {list(k.shape)}")
        if not q.shape[2]:
            raise ValueError("q must hold at least one chosen token of the query, got none")
        first, end = int(self.cu_seqlens[..., 1].min()), int(self.cu_seqlens[..., -2].max())
        if k.shape[2] < end or self.cu_seqlens.ndim == 2 and len(self.cu_seqlens) not in (1, len(k)):
            raise ValueError(
                f"k must hold the {end} tokens up to the query and the mask's batch, got {list(k.shape)}"
            )
        wide = torch.promote_types(q.dtype, torch.float32)
        scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
        logits = grouped(q.to(wide) * scale, k[:, :, first:end].to(wide))  # [B, H_q, S, end - first]
        segment = self.segments(torch.arange(first, end, device=k.device).view(1, 1, -1))[:, 0]
        outside = (segment < 1) | (segment > self.documents)  # [B|1, end - first]
        hidden = outside & ~outside.all(1, keepdim=True)  # a row of nothing but -inf would be NaN
        weights = logits.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
        mass = weights.mean((1, 2)).masked_fill(outside, 0)
        index = (segment - 1).clamp(0, max(self.documents - 1, 0)).expand_as(mass)
        return mass.new_zeros(len(mass), self.documents).scatter_add(1, index, mass)

    def _starts(self, device: torch.device | str | None = None) -> Tensor:
        """Where segments start, int64 `[B|1, M + 2]`."""
        return torch.atleast_2d(self.cu_seqlens[..., :-1]).to(device=device, dtype=torch.int64)


def ranking_loss(
    relevance: Tensor, relevant: Tensor, *, among: Tensor | None = None, temperature: float = 0.05
) -> Tensor:
    """BlockRank's auxiliary loss: InfoNCE over documents, `-log(sum over relevant e^(r/t) / sum over all e^(r/t))`.

    Args:
        relevance: `[B, M]` from `BlockRank.relevance`. relevant: bool `[B, M]`, one or more right documents.
        among: bool `[B|1, M]`, documents that are there (`BlockRank.present`); None = all.
        temperature: t, > 0; the authors' configuration has 0.05.

    Returns a scalar, averaged over the prompts that have a relevant document; 0 where none has. Raises ValueError
    for shapes that do not fit and a temperature that is not positive, TypeError for masks that are not boolean.
    """
    among = torch.ones_like(relevant) if among is None else among
    for name, x in (("relevant", relevant), ("among", among)):
        if x.dtype != torch.bool:
            raise TypeError(f"{name} must be boolean, got {x.dtype}")
    if relevance.ndim != 2 or relevant.shape != relevance.shape or among.shape[1:] != relevance.shape[1:]:
        raise ValueError(
            f"relevance, relevant and among must be [B, M], got {list(relevance.shape)}, {list(relevant.shape)}"
            f" and {list(among.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature!r}")
    right = relevant & among
    asked = right.any(1)
    if not bool(asked.any()):
        return relevance.sum() * 0
    logits = (relevance / temperature).masked_fill(~among, -torch.inf)[asked]
    found = logits.masked_fill(~right[asked], -torch.inf)
    return (logits.logsumexp(1) - found.logsumexp(1)).mean()
