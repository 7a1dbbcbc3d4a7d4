"""LongVQ: attention to a codebook of keys, made of what a moving average remembers; linear in time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.codebook import Codebook
from tilewise.recurrence.mixer import Mixer, check_width, wide
from tilewise.recurrence.model import mixer
from tilewise.recurrence.per_channel import running
from tilewise.recurrence.rows import Rows
from tilewise.recurrence.state import Carried


class MovingAverage(nn.Module):
    """Mega's multi-dimensional damped moving average (Ma et al., 2022, arXiv 2209.10655), causal.

    Each channel x runs through `averages` of its own, `h_t = a (b x_t) + (1 - a d) h_{t-1}` with a and d in (0, 1),
    and becomes `silu(sum of e h_t + w x_t)`.

    `forward` takes `x [B, N, width]`, what was carried, `[S, width * averages]`, and `mask` and `cu_seqlens` as
    mixers do; it gives `[B, N, width]` and what to carry on.
    """

    def __init__(self, width: int, averages: int = 4) -> None:
        super().__init__()
        check_width(averages, 1, "averages")
        self.alpha, self.delta = (nn.Parameter(0.2 * torch.randn(width, averages)) for _ in range(2))
        signs = torch.tensor([(-1.0) ** i for i in range(averages)])
        self.into = nn.Parameter(signs + 0.02 * torch.randn(width, averages))
        self.out, self.own = nn.Parameter(torch.randn(width, averages)), nn.Parameter(torch.randn(width))
        with torch.no_grad():
            self.alpha.add_(torch.linspace(-2, 2, averages))  # averages over a few tokens and over many

    def forward(self, x: Tensor, before: Tensor, **packing) -> tuple[Tensor, Tensor]:
        high = wide(x)
        alpha, delta = wide(self.alpha).sigmoid(), wide(self.delta).sigmoid()
        add = (high.unsqueeze(3) * (alpha * self.into)).flatten(2)
        found, after = running((1 - alpha * delta).flatten().expand_as(add), add, before, **packing)
        shape = self.into.shape
        made = (found.unflatten(2, shape) * self.out).sum(3) / math.sqrt(shape[1])
        return F.silu(made + high * self.own).to(x.dtype), after


@dataclass(frozen=True, eq=False)
class LongVQState(Carried):
    """All of a constant size, float32 or wider but for values and codes.

    Attributes:
        memory: of the moving averages. uses, sums: `[S, H, codes]` and `[S, H, codes, D]`, how many tokens each
            codeword stands for, of all but the last full chunk and the open one, and the sum of their values.
        codes, values: `[S, window, H]` and `[S, window, width]`, of the last full chunk and of the open one. count:
            int64 `[S]`, tokens read.
    """

    memory: Tensor
    uses: Tensor
    sums: Tensor
    codes: tuple[Tensor, Tensor]
    values: tuple[Tensor, Tensor]
    count: Tensor


@mixer("long-vq")
class LongVQ(Mixer):
    """Vector-quantised attention over a structured memory (Liu et al., 2024, arXiv 2404.11163).

    A moving average of the inputs makes queries, keys and gates; each key is taken for the nearest of `codes`
    codewords. A query's softmax over all tokens before it is then one over the codewords, each with the mean of its
    tokens' values and the log of their number added to its score, and no token far away need be kept. The last
    `window` tokens have a learned bias for each distance. The result is gated twice.

    Args:
        width: of the inputs. heads: their number. key: size of queries and keys as a share of the width. codes: of
            each head. window: distances below it have a bias, and about so many tokens are kept one by one.
        averages: of each channel in the memory. structured: False leaves the moving average out, for a control:
            queries, keys and gates are then made of the token alone.

    The paper gives no code. Of it we take a gated mix of attention and a state space model, keys that are
    quantised, and a bias in a local window; from Transformer-VQ (Lingle, 2023, arXiv 2309.16354) how a causal
    softmax over quantised keys is computed in linear time and how codewords are learned (`Codebook`); from Mega (Ma
    et al., 2022, arXiv 2209.10655) the memory, values of the inputs themselves, and both gates. Ours: heads,
    queries and keys of length 1 with a learned sharpness, a bias by distance alone, and no residual inside, which
    is the block's. Gradients reach keys from queries that see them one by one, as in Transformer-VQ.

    Raises ValueError for sizes below 1 and those that do not divide.
    """

    def __init__(
        self,
        width: int,
        heads: int = 1,
        key: float = 0.5,
        codes: int = 64,
        window: int = 64,
        averages: int = 4,
        structured: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.dim, keys = heads, check_width(width, heads), int(width * key)
        size = check_width(keys, heads, "width * key")
        for name, value in (("codes", codes), ("window", window)):
            check_width(value, 1, name)
        self.window, self.size = window, width * averages if structured else 0
        self.memory = MovingAverage(width, averages) if structured else None
        self.shared, self.value = nn.Linear(width, keys), nn.Linear(width, width)
        self.scale = nn.Parameter(1 + 0.1 * torch.randn(2, keys))
        self.shift = nn.Parameter(0.1 * torch.randn(2, keys))
        self.book = Codebook(heads, codes, size)
        self.sharpness = nn.Parameter(torch.full((heads,), 0.5 * math.log(size)))
        self.near = nn.Parameter(torch.zeros(heads, window))
        self.gates, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, state=None, *, mask=None, cu_seqlens=None):
        packing = {"mask": mask, "cu_seqlens": cu_seqlens}
        rows = Rows.of(x, None if state is None else state.count, self.window, mask, cu_seqlens)
        if state is None:
            state = self._empty(len(rows.lengths), x)
        seen, memory = (x, state.memory) if self.memory is None else self.memory(x, state.memory, **packing)
        shared = F.silu(self.shared(seen)).unsqueeze(2)
        q, k = (shared * self.scale + self.shift).unflatten(3, (self.heads, -1)).unbind(2)  # [b, n, h, d]
        q, k = (F.normalize(wide(part), dim=-1) for part in (q, k))
        codes, k = self.book(k, mask)
        told = [rows.take(part) for part in (q, k, codes, F.silu(self.value(x)))]
        found, state = self._attended(rows, *told, state=state)
        update, reset, own = self.gates(seen).chunk(3, -1)
        made = F.silu(own + self.mix(rows.put(found).to(x.dtype) * F.silu(reset)))
        out = self.out(update.sigmoid() * made)
        out = out if mask is None else out.masked_fill(~mask.unsqueeze(2), 0)
        return out, replace(state, memory=memory, count=state.count + rows.lengths)

    def _empty(self, sequences: int, x: Tensor) -> LongVQState:
        heads, codes = self.book.uses.shape
        uses = wide(x).new_zeros(sequences, heads, codes)
        chunk = torch.zeros(sequences, self.window, heads, dtype=torch.int64, device=x.device)
        values = x.new_zeros(sequences, self.window, x.shape[2])
        memory, count = wide(x).new_zeros(sequences, self.size), chunk.new_zeros(sequences)
        sums = uses.unsqueeze(3).repeat(1, 1, 1, self.dim)
        return LongVQState(memory, uses, sums, (chunk, chunk), (values, values), count)

    def _attended(
        self, rows: Rows, q: Tensor, k: Tensor, codes: Tensor, v: Tensor, *, state: LongVQState
    ) -> tuple[Tensor, LongVQState]:
        """What each place reads, `[S, T, width]`, and the state after, whose memory and count are still the old."""
        if not rows.chunks:
            return v, state
        # Whole chunks, one more in front: the last that was full before. [s, c + 1, l, ...]
        both = [rows.whole(new, open_) for new, (_, open_) in ((codes, state.codes), (v, state.values))]
        keys = rows.whole(k, self.book.named(state.codes[1]))
        lists = [
            torch.cat((before.to(new.dtype), new), 1).unflatten(1, (-1, self.window))
            for before, new in ((state.codes[0], both[0]), (state.values[0], both[1]))
        ]
        keys = torch.cat((self.book.named(state.codes[0]).to(keys.dtype), keys), 1).unflatten(
            1, (-1, self.window)
        )
        values = wide(lists[1]).unflatten(3, (self.heads, -1))
        there = state.count >= self.window
        uses, sums = self._far(lists[0], values, there, state)
        q = q.unflatten(1, (rows.chunks, -1))  # [s, c, t, h, d]
        scores = torch.cat(
            (self._to_words(q, uses[:, : rows.chunks]), self._to_near(rows, q, keys, there)), -1
        )
        far, near = scores.softmax(-1).split((uses.shape[3], 2 * self.window), -1)
        means = (sums / uses.clamp(min=1).unsqueeze(4))[:, : rows.chunks]
        found = torch.einsum("schtk,schkd->scthd", far, means)
        found = found + torch.einsum("schtl,sclhd->scthd", near, _pairs(values))
        return found.flatten(3).flatten(1, 2), self._after(rows, state, both, lists, uses, sums)

    def _far(self, codes: Tensor, values: Tensor, there: Tensor, state: LongVQState) -> tuple[Tensor, Tensor]:
        """Uses `[S, C + 2, H, codes]` and sums `[S, C + 2, H, codes, D]` of the codewords, before each chunk of all
        that is not within it or the one before it."""
        chosen = F.one_hot(codes, self.book.words.shape[1]).to(values.dtype)  # [s, c + 1, l, h, k]
        first = there.view(-1, 1, 1, 1).to(values.dtype)
        chosen = torch.cat((chosen[:, :1] * first.unsqueeze(4), chosen[:, 1:]), 1)
        uses = torch.cat((state.uses.unsqueeze(1), chosen.sum(2)), 1).cumsum(1)
        added = torch.einsum("sclhk,sclhd->schkd", chosen, values)
        return uses, torch.cat((state.sums.unsqueeze(1), added), 1).cumsum(1)

    def _to_words(self, q: Tensor, uses: Tensor) -> Tensor:
        """Scores of codewords, `[S, C, H, T, codes]`: as if of each of their tokens."""
        scores = torch.einsum("scthd,hkd->schtk", q, wide(self.book.words))
        return scores * self._sharp() + uses.log().unsqueeze(3)

    def _to_near(self, rows: Rows, q: Tensor, keys: Tensor, there: Tensor) -> Tensor:
        """Scores of the tokens of a chunk and the one before it, `[S, C, H, T, 2 window]`; none after the query."""
        scores = torch.einsum("scthd,sclhd->schtl", q, _pairs(keys)) * self._sharp()
        places = torch.arange(q.shape[2], device=q.device) + rows.start + self.window
        apart = places.unsqueeze(1) - torch.arange(2 * self.window, device=q.device)  # [t, 2 l]
        near = (apart >= 0) & (apart < self.window)
        bias = wide(self.near)[:, apart.clamp(0, self.window - 1)].masked_fill(~near, 0)
        hidden = (apart < 0).view(1, 1, 1, *apart.shape)
        first = torch.arange(rows.chunks, device=q.device).view(1, -1, 1, 1, 1) == 0
        before = torch.arange(2 * self.window, device=q.device) < self.window
        hidden = hidden | (first & before & ~there.view(-1, 1, 1, 1, 1))
        return (scores + bias).masked_fill(hidden, -torch.inf)

    def _sharp(self) -> Tensor:
        return wide(self.sharpness).exp().view(1, 1, -1, 1, 1)

    def _after(self, rows: Rows, state: LongVQState, both, lists, uses: Tensor, sums: Tensor) -> LongVQState:
        """The state behind the rows: what is open, the last full chunk, and all before that by codeword."""
        row, full = torch.arange(len(rows.lengths), device=uses.device), rows.ends // self.window
        opens = [rows.open(new, old) for new, (_, old) in zip(both, (state.codes, state.values))]
        pairs = [(chunks[row, full], open_) for chunks, open_ in zip(lists, opens)]
        return replace(state, uses=uses[row, full], sums=sums[row, full], codes=pairs[0], values=pairs[1])


def _pairs(x: Tensor) -> Tensor:
    """`[S, C + 1, L, ...]` as `[S, C, 2 L, ...]`: each chunk behind the one before it."""
    return torch.cat((x[:, :-1], x[:, 1:]), 2)
