"""HISA: a token-level indexer that first finds the blocks worth searching."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tilewise.attention.method import Method
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.token_choice import lists_plan, shared
from tilewise.kernels.choose_keys import Call, choose_keys, explain
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
        n_k = k.shape[2]
        if not n_k:
            return Plan((Pass(view),), view)
        index, calls = self._index(q, k, view), []
        among = None
        if self.blocks is not None and self.blocks * self.block < n_k:
            calls.append(self._search(index, view, self.blocks))
            among = choose_keys(calls[0])
        calls.append(self._call(index, index.k, view, self.top_k, among=among, block=self.block))
        return lists_plan(choose_keys(calls[-1]), view, tuple(explain(call) for call in calls))

    def _search(self, index: Index, view: Visibility, blocks: int) -> Call:
        """Stage one: the blocks whose mean keys score highest.

        The first and the last that a query sees are searched whatever their score.
        """
        means = Tiling(self.block).mean(index.k, view.keys_seen())[0]
        wide = index._replace(q=index.q.to(means.dtype))
        return self._call(wide, means, view, blocks, covers=self.block, ends=True)

    @staticmethod
    def _call(index: Index, keys: Tensor, view: Visibility, top: int, **options) -> Call:
        """The `top` keys that the indexer scores highest."""
        slope, weight = LEAK, None
        if index.weight is not None:
            slope, weight = 0.0, index.weight.flatten(1, 2)
        return Call(index.q.flatten(1, 2), keys, view, top, index.q.shape[1], weight, slope, **options)

    def _index(self, q: Tensor, k: Tensor, view: Visibility) -> Index:
        """The given index, checked, or that of the heads themselves; with as many lists as the mask asks for."""
        (b, heads, n_q, _), (kv_heads, n_k) = q.shape, k.shape[1:3]
        if self.index is None:
            groups = shared(view, heads, kv_heads)
            return Index(q.unflatten(1, (groups, heads // groups)), to_heads(k, groups))
        own = self.index
        if own.q.shape[3] != n_q or own.k.shape[2] != n_k or own.k.shape[0] not in (1, b):
            raise ValueError(
                f"the index is of {own.q.shape[3]} queries, {own.k.shape[2]} keys and batch {own.k.shape[0]}, the"
                f" call has {n_q}, {n_k} and {b}: index this sequence"
            )
        groups = shared(view, heads, 1)
        dtype = torch.promote_types(own.q.dtype, own.k.dtype)
        q, k = (x.detach().to(dtype).expand(b, groups, *x.shape[2:]) for x in own[:2])
        weight = own.weight
        if weight is not None:
            weight = weight.detach().expand(b, groups, *weight.shape[2:])
        return Index(q, k, weight)


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
