"""The Block Transformer: attention among blocks of tokens below, attention inside a block above."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.attention_mixer import Attention, Cache
from tilewise.recurrence.mixer import check_width
from tilewise.recurrence.model import Block, SwiGLU, generated
from tilewise.recurrence.rows import Rows
from tilewise.recurrence.state import Carried


@dataclass(frozen=True, eq=False)
class BlockTransformerState(Carried):
    """What a `BlockTransformer` carries from one call to the next.

    Attributes:
        blocks: a `Cache` for each layer of the block decoder, with one key and value for each block that is
            full and one for the start.
        tokens: a `Cache` for each layer of the token decoder, of the open block alone: its prefix and its
            tokens, at most `prefix + block - 1`.
        open: int64 `[S, block]`, the tokens of the open block, zeros behind them.
        count: int64 `[S]`, tokens read.
    """

    blocks: tuple[Cache, ...]
    tokens: tuple[Cache, ...]
    open: Tensor
    count: Tensor

    def select(self, sequences: Tensor) -> BlockTransformerState:
        """The states of these sequences, caches no longer than they need."""
        blocks, tokens = (
            tuple(cache.select(sequences) for cache in part) for part in (self.blocks, self.tokens)
        )
        return BlockTransformerState(blocks, tokens, self.open[sequences], self.count[sequences])


class BlockEmbedder(nn.Module):
    """A block of tokens as one vector: each is looked up in a table, and what is found is concatenated.

    Args:
        vocabulary: tokens known. width: of the result. block: tokens of a block.
        size: of an entry of the table. None is `width / block`, and concatenating is all there is to do; any
            other size adds a linear layer from `block * size` to `width`.

    `forward` takes int64 `[..., block]` and gives `[..., width]`. Raises ValueError for sizes below 1, and
    where the block does not divide the width and no size is given.
    """

    def __init__(self, vocabulary: int, width: int, block: int, size: int | None = None) -> None:
        super().__init__()
        check_width(block, 1, "block")
        size = check_width(width, block) if size is None else size
        check_width(size, 1, "size")
        self.table = nn.Embedding(vocabulary, size)
        nn.init.normal_(self.table.weight, std=0.02)
        self.project = nn.Identity() if size * block == width else nn.Linear(block * size, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.project(self.table(tokens).flatten(-2))


class BlockTransformer(nn.Module):
    """Attention to blocks far away and to tokens nearby: a language model (Ho et al., 2024, arXiv
    2406.02657).

    An embedder turns every `block` tokens into one vector. The block decoder, a causal Transformer over those
    vectors, gives at each block the context of the next one. The token decoder, a causal Transformer that
    never looks beyond its own block, reads that context as `prefix` vectors, then the block's tokens, and
    predicts each of them. So one in `block` tokens reads a cache of N / block keys, and all others at most
    `prefix + block - 1`.

    `forward` takes tokens int64 `[B, N]`, the state of an earlier call or None, `mask` (bool `[B, N]`, False
    for padding on either side) and `cu_seqlens` (packed sequences) as `SequenceModel` does, and gives logits
    `[B, N, vocabulary]` of the token after each, and a `BlockTransformerState`. A sequence may be split
    anywhere, inside blocks too.

    Differs from the authors' code in that a learned vector stands before the first block, so that its tokens
    are predicted too, where theirs leaves the first block out and pads it at random; in that prompts of any
    length are read from their first token on, where theirs pads the first block on the left; and in its
    layers, which are those of `SequenceModel` (RMSNorm, SwiGLU) and not GPT-NeoX's. The embedder is their
    lookup table and the context is told by a prefix, as in the paper's main models; its other embedders and
    ways to tell the context are not here.

    Args:
        vocabulary: tokens known. width: of both decoders. layers: of the block decoder and of the token
            decoder.
        heads: of attention. block: tokens of a block, 4 in the paper. prefix: vectors that tell the context,
            2 in the paper's main models. hidden: of the channel mixers; None is 8/3 of the width. table: size
            of the embedder's entries, as `size` of `BlockEmbedder`. tied: whether the output layer shares the
            token decoder's embedding.

    Raises ValueError for sizes below 1 and those that do not divide.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        layers: tuple[int, int] = (2, 2),
        heads: int = 4,
        block: int = 4,
        prefix: int = 2,
        *,
        hidden: int | None = None,
        table: int | None = None,
        tied: bool = True,
    ) -> None:
        super().__init__()
        numbers = {"vocabulary": vocabulary, "prefix": prefix, "layers": min(layers, default=0)}
        for name, value in numbers.items():
            check_width(value, 1, name)
        if len(layers) != 2:
            raise ValueError(f"layers must be those of the block and the token decoder, got {layers!r}")
        self.block, self.prefix, self.width = block, prefix, width
        hidden = round(8 * width / 3) if hidden is None else hidden

        def decoder(count: int) -> nn.ModuleList:
            return nn.ModuleList(
                Block(width, Attention(width, heads), SwiGLU(width, hidden)) for _ in range(count)
            )

        self.embedder = BlockEmbedder(vocabulary, width, block, table)
        self.start = nn.Parameter(torch.randn(width) * 0.02)
        self.block_decoder, self.token_decoder = decoder(layers[0]), decoder(layers[1])
        self.block_norm, self.norm = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.expand = nn.Linear(width, prefix * width)
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        state: BlockTransformerState | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, BlockTransformerState]:
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens must be integers [B, N], got {tokens.dtype} {list(tokens.shape)}")
        rows = Rows.of(tokens, None if state is None else state.count, self.block, mask, cu_seqlens)
        held = tokens.new_zeros(len(rows.lengths), self.block) if state is None else state.open
        whole = rows.whole(rows.take(tokens), held)  # [s, m * block], blocks that are open or full
        contexts, blocks = self._contexts(rows, whole, state)
        hidden, near = self._tokens(rows, whole, contexts, state)
        # A token's successor stands one place further on: place 0 is predicted before any token of these
        # rows.
        after = (rows.places + 1).clamp(max=max(0, hidden.shape[1] - 1))
        logits = self.head(self.norm(rows.put(hidden[:, after])))
        count = rows.lengths if state is None else state.count + rows.lengths
        return logits, BlockTransformerState(blocks, near, rows.open(whole, held), count)

    def generate(
        self,
        tokens: Tensor,
        count: int,
        *,
        mask: Tensor | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Tensor:
        """The next `count` tokens of each row, int64 `[B, count]`: the likeliest, or drawn at a temperature
        above 0.

        `mask` is False for padding of the prompts `tokens [B, N]`, on either side. Raises ValueError for a
        prompt without a token.
        """
        return generated(self, tokens, count, mask=mask, temperature=temperature, seed=seed)

    def _contexts(
        self, rows: Rows, whole: Tensor, state: BlockTransformerState | None
    ) -> tuple[Tensor, tuple[Cache, ...]]:
        """The prefixes `[S, C, prefix, width]` of chunks 0 .. C - 1 of the rows, and the block decoder's
        caches.

        A chunk that was open before has its prefix in the token decoder's cache already; what stands for it
        is 0.
        """
        full = rows.ends // self.block  # blocks that these tokens fill
        most = int(full.max()) if len(full) else 0
        x = self.embedder(whole[:, : most * self.block].unflatten(1, (most, self.block)))
        there = torch.arange(most, device=whole.device) < full.unsqueeze(1)
        if state is None:
            x = torch.cat((self.start.to(x.dtype).expand(len(full), 1, -1), x), 1)
            there = torch.cat((torch.ones_like(full, dtype=torch.bool).unsqueeze(1), there), 1)
        before = [None] * len(self.block_decoder) if state is None else state.blocks
        caches: Sequence[Cache] = () if state is None else state.blocks
        if x.shape[1]:
            x, caches = _run(self.block_decoder, x, before, None if bool(there.all()) else there)
        made = self.expand(self.block_norm(x)).unflatten(2, (self.prefix, self.width))
        if state is not None:
            made = torch.cat((made.new_zeros(len(full), 1, self.prefix, self.width), made), 1)
        return made, tuple(caches)

    def _tokens(
        self, rows: Rows, whole: Tensor, contexts: Tensor, state: BlockTransformerState | None
    ) -> tuple[Tensor, tuple[Cache, ...]]:
        """What each place of the rows is predicted from, `[S, C * block, width]`, and caches of the open
        blocks.

        The last of a block's tokens is read by the embedder alone: what follows it is another block's.
        """
        sequences, chunks = contexts.shape[:2]
        x, run = self._inputs(rows, whole, contexts, fresh=state is None)
        chunk, open_ = (
            torch.arange(contexts.shape[1], device=whole.device),
            (rows.ends // self.block).unsqueeze(1),
        )
        plain = run.all(2) & (chunk < open_)  # whole blocks from their prefix on, which nothing is kept of
        others = (run.any(2) & ~plain) | (chunk == open_)
        hidden = x.new_zeros(x.shape)
        if bool(plain.any()):
            made, _ = _run(self.token_decoder, x[plain], [None] * len(self.token_decoder), None)
            hidden = hidden.index_put((plain,), made)
        near = [] if state is None else list(state.tokens)
        places = run[others].any(0).nonzero().flatten()
        if len(places):
            reach = slice(int(places[0]), int(places[-1]) + 1)
            new = run[others][:, reach]
            caches, seen = self._held(state, others), None if bool(new.all()) else new
            made, near = _run(self.token_decoder, x[others][:, reach], caches, seen)
            where = torch.zeros_like(run)
            where[:, :, reach] = others.unsqueeze(2)
            hidden = hidden.index_put((where,), made.flatten(0, 1))
            opened = (chunk == open_)[others].nonzero().flatten()
            near = [cache.select(opened) for cache in near]
        return hidden[:, :, self.prefix - 1 :].flatten(1, 2), tuple(near)

    def _inputs(self, rows: Rows, whole: Tensor, contexts: Tensor, fresh: bool) -> tuple[Tensor, Tensor]:
        """The token decoder's inputs `[S, C, prefix + block - 1, width]`, and which of them are new, bool."""
        chunks = contexts.shape[1]
        length = chunks * self.block
        padded = F.pad(whole, (0, max(0, length - whole.shape[1])))[:, :length]
        told = self.embedding(padded).unflatten(1, (chunks, self.block))[:, :, :-1]
        place = torch.arange(length, device=whole.device)
        new = (place >= rows.filled.unsqueeze(1)) & (place < rows.ends.unsqueeze(1))
        new = new.unflatten(1, (chunks, self.block))[:, :, :-1]
        chunk = torch.arange(chunks, device=whole.device)
        begun = (chunk <= (rows.ends // self.block).unsqueeze(1)) & (chunk >= (0 if fresh else 1))
        begun = begun.unsqueeze(2).expand(-1, -1, self.prefix)
        return torch.cat((contexts.to(told.dtype), told), 2), torch.cat((begun, new), 2)

    def _held(self, state: BlockTransformerState | None, others: Tensor) -> list[Cache | None]:
        """Caches for the chunks in `others` (bool `[S, C]`): what the first of each row holds, and empty
        ones."""
        if state is None or not bool(others[:, 0].any()):
            return [None] * len(self.token_decoder)
        sequence, chunk = others.nonzero().unbind(1)
        first = chunk == 0
        if bool(first.all()):
            return [cache.select(sequence) for cache in state.tokens]
        made: list[Cache | None] = []
        for cache in state.tokens:
            parts = tuple(part[sequence] * first.view(-1, 1, 1) for part in cache.parts)
            made.append(Cache(parts, cache.seen[sequence] * first))
        return made


def _run(layers: nn.ModuleList, x: Tensor, caches, tokens: Tensor | None) -> tuple[Tensor, list[Cache]]:
    """Rows `x [S, N, width]` through the layers; `tokens` bool `[S, N]` is False for what is not there."""
    after = []
    for layer, cache in zip(layers, caches):
        x, cache = layer(x, cache, mask=tokens)
        after.append(cache)
    return x, after
