"""HISA: a token-level indexer that first finds the blocks worth searching."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.attention.method import Method
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.token_choice import choose_by_rows, lists_plan, shared, visible
from tilewise.tiles import Tiling, Visibility
from tilewise.tiles.visibility import to_heads

LEAK = 0.01  # of scores below 0, where no weights are given: keeps an order among keys that no head likes


class Index(NamedTuple):
    """What an indexer says of a sequence.

    Attributes:
        q: `[B, lists, heads, N_q, D]`, the heads of each list. k: `[B, lists, N_k, D]`.
        weight: `[B, lists, heads, N_q]` or None, each head alike.
    """

    q: Tensor
    k: Tensor
    weight: Tensor | None = None

    def scores(self, rows: slice, keys: Tensor) -> Tensor:
        """`sum_h w_h relu(q_h . k)` for some queries: float `[B, lists, rows, M]`.

        `keys` is `[B, lists, M, D]`, the same for all queries, or `[B, lists, rows, M, D]`.
        """
        q = self.q[:, :, :, rows]
        if keys.ndim == 4:
            products = q @ keys.unsqueeze(2).mT
        else:
            products = (q.transpose(2, 3) @ keys.mT).transpose(2, 3)
        if self.weight is None:
            return F.leaky_relu(products, LEAK).sum(2)
        return (products.relu() * self.weight[:, :, :, rows].unsqueeze(-1)).sum(2)


@dataclass(frozen=True)
class HISA(Method):
    """Hierarchical indexing for token-level selection (Xu et al., 2026, arXiv 2603.28458).

    Each query reads the `top_k` keys that an indexer scores highest, `sum_h w_h relu(q_h . k)` over its heads, as
    in DeepSeek's sparse attention. There every key is scored; here the same scores of mean keys of blocks first
    name `blocks` blocks to search, the first and the query's own always among them, and only their tokens are
    scored.

    The indexer is an `Indexer`, a module with weights of its own whose lists all heads share:
    `HISA().given(indexer(x))`. Without one the heads index for themselves: the query heads of a kv head, alike in
    weight, share a list over its keys; scores below 0 then keep a hundredth of their size instead of none.

    Differs from the paper: the candidate blocks of the first stage are those the mask shows to the query, whatever
    the mask; a mean is over tokens that padding does not hide.

    Args:
        block: keys per block. blocks: blocks searched per query, the first and its own included; None searches all,
            which is the flat indexer. top_k: keys read per query. index: see `given`.

    Raises ValueError for settings out of range, and when a call is not of the sequence that was indexed.
    """

    block: int = 128
    blocks: int | None = 64
    top_k: int = 2048
    index: Index | None = field(default=None, repr=False, compare=False)
    name = "hisa"
    reads = "q, k"

    def __post_init__(self) -> None:
        for name, value, least in (
            ("block", self.block, 1),
            ("blocks", self.blocks, 2),
            ("top_k", self.top_k, 1),
        ):
            if value is None and name == "blocks":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if self.index is not None and not isinstance(self.index, Index):
            raise TypeError(f"index must be None or what an Indexer gives, got {type(self.index).__name__}")

    def given(self, index: Index) -> HISA:
        """The same method with what an indexer said of the sequence, for calls on that sequence alone."""
        return HISA(self.block, self.blocks, self.top_k, index)

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        n_q, n_k = q.shape[2], k.shape[2]
        if not n_k:
            return Plan((Pass(view),), view)
        index = self._index(q, k, view)
        groups, tiling = index.k.shape[1], Tiling(self.block)
        width = min(self.top_k, n_k)
        blocks = self.blocks
        if blocks is None or blocks * self.block >= n_k:

            def choose(rows: slice) -> Tensor:
                return self._best(index.scores(rows, index.k), visible(view, rows, n_q, groups))

            numbers = groups * index.q.shape[2] * n_k
        else:
            means = tiling.mean(index.k, view.keys_seen())[0].to(index.k.dtype)

            def choose(rows: slice) -> Tensor:
                return self._descend(index, means, blocks, rows, visible(view, rows, n_q, groups))

            width = min(width, blocks * self.block)
            numbers = groups * (blocks * self.block * (index.q.shape[2] + k.shape[3]) + n_k)
        return lists_plan(choose_by_rows(choose, q, groups, width, numbers), view)

    def _index(self, q: Tensor, k: Tensor, view: Visibility) -> Index:
        """The given index, checked, or that of the heads themselves; with as many lists as the mask asks for."""
        (b, heads, n_q, _), (kv_heads, n_k) = q.shape, k.shape[1:3]
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        if self.index is None:
            groups = shared(view, heads, kv_heads)
            return Index(q.to(wide).unflatten(1, (groups, heads // groups)), to_heads(k, groups).to(wide))
        own = self.index
        if own.q.shape[3] != n_q or own.k.shape[2] != n_k or own.k.shape[0] not in (1, b):
            raise ValueError(
                f"the index is of {own.q.shape[3]} queries, {own.k.shape[2]} keys and batch {own.k.shape[0]}, the"
                f" call has {n_q}, {n_k} and {b}: index this sequence"
            )
        groups = shared(view, heads, 1)
        q, k = (x.detach().to(wide).expand(b, groups, *x.shape[2:]) for x in own[:2])
        weight = own.weight
        if weight is not None:
            weight = weight.detach().to(wide).expand(b, groups, *weight.shape[2:])
        return Index(q, k, weight)

    def _best(self, scores: Tensor, seen: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The `top_k` best seen keys of each row in their order, int64, -1 for none.

        Column j of the scores is token j, or `tokens[..., j]`.
        """
        best, place = scores.masked_fill(~seen, -torch.inf).topk(min(self.top_k, scores.shape[-1]), -1)
        listed = place if tokens is None else tokens.gather(-1, place)
        return listed.masked_fill(best == -torch.inf, -1).sort(-1).values

    def _descend(self, index: Index, means: Tensor, blocks: int, rows: slice, seen: Tensor) -> Tensor:
        """Stage one names blocks, stage two scores their tokens: lists `[B, G, rows, K]`."""
        b, groups, n_k, d = index.k.shape
        tiling, size = Tiling(self.block), self.block
        scores = index.scores(rows, means)  # [b, g, rows, T]
        seen = seen.expand(b, groups, *seen.shape[2:])
        shown = tiling.split(seen.transpose(2, 3), False).any(3).transpose(2, 3)
        # The first block and the last that a query sees are searched whatever their score.
        order = torch.arange(means.shape[2], device=scores.device)
        first = torch.where(shown, order, n_k).amin(-1, keepdim=True)
        last = torch.where(shown, order, -1).amax(-1, keepdim=True)
        ranked = scores.masked_fill((order == first) | (order == last), torch.inf).masked_fill(
            ~shown, -torch.inf
        )
        best, place = ranked.topk(blocks, -1)  # [b, g, rows, m]
        tokens = (place.unsqueeze(-1) * size + torch.arange(size, device=place.device)).flatten(3)
        inside = (tokens < n_k) & (best > -torch.inf).repeat_interleave(size, -1)
        tokens = tokens.clamp(max=n_k - 1)
        keys = index.k.gather(2, tokens.flatten(2).unsqueeze(-1).expand(-1, -1, -1, d)).unflatten(
            2, tokens.shape[2:]
        )
        return self._best(index.scores(rows, keys), inside & seen.gather(-1, tokens), tokens)


class Indexer(nn.Module):
    """DeepSeek's lightning indexer: a few narrow heads that share one key, and a weight for each head and query.

    The scores of token t for query i are `sum_h w_ih relu(q_ih . k_t)`; all heads of attention read what it finds.
    Rotary positions are the caller's: rotate what `forward` gives, if the weights were trained so.

    Args:
        width: of the hidden states. heads, dim: of the indexer.

    `forward`: hidden states `[B, N, width]` to an `Index` of them, for `HISA().given(...)`; in decoding give the
    keys of all tokens so far with the query of the last (`Index(*)` takes any lengths).
    """

    def __init__(self, width: int, heads: int = 64, dim: int = 128) -> None:
        super().__init__()
        for name, value in (("width", width), ("heads", heads), ("dim", dim)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        self.heads, self.dim = heads, dim
        self.query = nn.Linear(width, heads * dim, bias=False)
        self.key = nn.Linear(width, dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.weight = nn.Linear(width, heads, bias=False)

    def forward(self, x: Tensor) -> Index:
        q = self.query(x).unflatten(2, (self.heads, self.dim)).transpose(1, 2)
        weight = self.weight(x).mT * (self.heads * self.dim) ** -0.5
        return Index(q.unsqueeze(1), self.norm(self.key(x)).unsqueeze(1), weight.unsqueeze(1))
