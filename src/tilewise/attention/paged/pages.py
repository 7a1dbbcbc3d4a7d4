"""Paged keys and values of a ragged batch: who holds which page, appending, sharing by fork, freeing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class Pages:
    """Keys and values of many sequences in pages of S tokens (FlashInfer: Ye et al., 2025, arXiv 2501.01005).

    A page belongs to any sequence whose row of `table` names it, and to several where they share a beginning. In
    the paper's words the table is a block-sparse matrix of sequences by pages; here each row has as many entries as
    the longest one, where the paper's has index pointers. `attend_paged` reads pages where they lie.

    Pools are kept and written in place; table and lengths are copied. Entries of the table beyond what a sequence's
    length needs may be anything, even outside the pool. Slots of a page behind a sequence's end must be finite, as
    they are masked by a weight of 0; `append` sees to it for pages it takes.

    Args:
        k: `[pages, H_kv, S, D]`, floating. v: `[pages, H_kv, S, D_v]`, same dtype and device.
        table: int64 `[B, P]`; entry j of row b is the page of sequence b's tokens j * S to (j + 1) * S - 1.
        lengths: int64 `[B]`, tokens of each sequence, 0 to P * S.

    Raises:
        TypeError: another dtype or device. ValueError: sizes that do not fit, lengths beyond the table, needed
            entries outside the pool.
    """

    k: Tensor
    v: Tensor
    table: Tensor
    lengths: Tensor
    _holders: list[int] = field(init=False, repr=False)  # entries that name each page
    _free: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, x in (("k", self.k), ("v", self.v)):
            if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
                raise TypeError(f"{name} must be a floating tensor [pages, H_kv, S, D], got {_describe(x)}")
        if self.v.dtype != self.k.dtype or self.v.device != self.k.device:
            raise TypeError(
                f"k and v must share dtype and device, got {self.k.dtype} on {self.k.device} and {self.v.dtype} on"
                f" {self.v.device}"
            )
        if self.v.shape[:3] != self.k.shape[:3] or not all(self.k.shape) or not self.v.shape[3]:
            raise ValueError(
                "k and v must be [pages, H_kv, S, D] with the same first three sizes, none of them 0, got"
                f" {list(self.k.shape)} and {list(self.v.shape)}"
            )
        for name, x, axes in (("table", self.table, 2), ("lengths", self.lengths, 1)):
            fits = isinstance(x, Tensor) and x.dtype == torch.int64 and x.ndim == axes
            if not fits or x.device != self.k.device:
                wanted = "[B, P]" if axes == 2 else "[B]"
                raise TypeError(f"{name} must be int64 {wanted} on {self.k.device}, got {_describe(x)}")
        if self.table.shape[0] != self.lengths.shape[0]:
            raise ValueError(
                f"table and lengths must have a row per sequence, got {self.table.shape[0]} and"
                f" {self.lengths.shape[0]}"
            )
        most = self.table.shape[1] * self.size
        if bool(((self.lengths < 0) | (self.lengths > most)).any()):
            raise ValueError(
                f"lengths must be in 0..{most} ({self.table.shape[1]} pages of {self.size} tokens), got"
                f" {self.lengths.tolist()}"
            )
        used = self.table[self._used()]
        if bool(((used < 0) | (used >= self.k.shape[0])).any()):
            wrong = used[(used < 0) | (used >= self.k.shape[0])]
            raise ValueError(f"table must name pages 0..{self.k.shape[0] - 1}, got {wrong.unique().tolist()}")
        self._holders = torch.bincount(used, minlength=self.k.shape[0]).tolist()
        self._free = [page for page, count in enumerate(self._holders) if not count][::-1]
        self.lengths = self.lengths.clone()
        self._settle()

    @classmethod
    def empty(
        cls,
        batch: int,
        pages: int,
        page_size: int,
        heads: int,
        head_dim: int,
        v_dim: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Pages:
        """Room for `pages` pages of `page_size` tokens, and `batch` sequences without any; `heads` are kv heads."""
        shape = (pages, heads, page_size)
        k = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
        v = torch.zeros(*shape, head_dim if v_dim is None else v_dim, dtype=dtype, device=device)
        table = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        return cls(k, v, table, table[:, 0])

    @property
    def size(self) -> int:
        """Tokens in a page."""
        return self.k.shape[2]

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes held by both pools."""
        return sum(x.numel() * x.element_size() for x in (self.k, self.v))

    @property
    def used_nbytes(self) -> int:
        """Bytes of the pages that sequences hold, shared ones counted once."""
        return self.nbytes // self.k.shape[0] * (self.k.shape[0] - self.free_pages)

    def sequence(self, i: int) -> tuple[Tensor, Tensor]:
        """Copies of sequence i's keys `[H_kv, n, D]` and values `[H_kv, n, D_v]`."""
        self._check_index("i", i)
        n = int(self.lengths[i])
        pages = self.table[i, : -(-n // self.size)]
        k, v = (x[pages].transpose(0, 1).flatten(1, 2)[:, :n] for x in (self.k, self.v))
        return k, v

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor, counts: Tensor | None = None) -> None:
        """Add tokens to the ends of sequences, taking pages as needed.

        A page that others hold too is copied before it is written. Taken pages are cleared first, so that nothing
        of a freed sequence is left in them.

        Args:
            k: `[B, H_kv, n, D]`; v: `[B, H_kv, n, D_v]`, in the pools' dtype.
            counts: int64 `[B]`, how many of the n tokens are sequence b's, the first ones; None = all.

        Raises TypeError or ValueError for tensors that do not fit, and ValueError when too few pages are free; then
        nothing is changed.
        """
        new = self._check_new(k, v, counts)
        old = self.lengths.tolist()
        writers = Counter(
            int(self.table[b, n // self.size]) for b, n in enumerate(old) if new[b] and n % self.size
        )
        needed = sum(min(count, self._holders[page] - 1) for page, count in writers.items())
        needed += sum(self._count(n + new[b]) - self._count(n) for b, n in enumerate(old))
        if needed > len(self._free):
            raise ValueError(
                f"appending {sum(new)} tokens needs {needed} pages, {len(self._free)} of {self.k.shape[0]} are free"
            )
        columns = max([self._count(n + new[b]) for b, n in enumerate(old)], default=0)
        self.table = torch.nn.functional.pad(self.table, (0, max(0, columns - self.table.shape[1])))
        for b, n in enumerate(old):
            if new[b] and n % self.size:
                self._own(b, n // self.size)
            for entry in range(self._count(n), self._count(n + new[b])):
                page = self._take()
                self.k[page], self.v[page] = 0, 0
                self.table[b, entry] = page
        added = torch.tensor(new, dtype=torch.int64, device=k.device)
        row = torch.repeat_interleave(torch.arange(len(new), device=k.device), added)
        token = torch.arange(len(row), device=k.device) - (added.cumsum(0) - added)[row]
        at = self.lengths[row] + token
        pages, slots = self.table[row, at // self.size], at % self.size
        self.k[pages, :, slots] = k[row, :, token]
        self.v[pages, :, slots] = v[row, :, token]
        self.lengths += added
        self._settle()

    def fork(self, i: int, into: int | None = None) -> int:
        """A sequence that begins as sequence i does and holds the same pages; returns its index.

        Nothing is copied until one of the two writes to the last page, if that is only partly filled.

        Args:
            into: index of a sequence without tokens that becomes it; None adds a row.
        """
        self._check_index("i", i)
        if into is None:
            into = len(self.lengths)
            self.table = torch.cat([self.table, self.table[i : i + 1]])
            self.lengths = torch.cat([self.lengths, self.lengths[i : i + 1]])
        else:
            self._check_index("into", into)
            if int(self.lengths[into]):
                raise ValueError(
                    f"into must be a sequence without tokens, {into} has {int(self.lengths[into])}"
                )
            self.table[into], self.lengths[into] = self.table[i], self.lengths[i]
        for page in self._pages_of(into):
            self._holders[page] += 1
        return into

    def free(self, i: int) -> None:
        """Drop sequence i's tokens; its row stays, without any. Pages that nobody else holds become free."""
        self._check_index("i", i)
        for page in self._pages_of(i):
            self._release(page)
        self.lengths[i] = 0
        self._settle()

    def _count(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def _pages_of(self, i: int) -> list[int]:
        return self.table[i, : self._count(int(self.lengths[i]))].tolist()

    def _used(self) -> Tensor:
        """Which entries of the table a sequence's length needs, bool `[B, P]`."""
        entries = torch.arange(self.table.shape[1], device=self.table.device)
        return entries * self.size < self.lengths.unsqueeze(1)

    def _settle(self) -> None:
        """Point unused entries at the sequence's own first page: engines may look at them, for nothing."""
        table = self.table if self.table.shape[1] else self.table.new_zeros(len(self.table), 1)
        self.table = torch.where(self.lengths.unsqueeze(1) > 0, table[:, :1], 0).expand_as(table).clone()
        used = self._used()
        self.table[used] = table[used]

    def _take(self) -> int:
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _release(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)

    def _own(self, b: int, entry: int) -> None:
        """Make the page of this entry one that nobody else holds, by a copy where needed."""
        shared = int(self.table[b, entry])
        if self._holders[shared] == 1:
            return
        page = self._take()
        self.k[page], self.v[page] = self.k[shared], self.v[shared]
        self._release(shared)
        self.table[b, entry] = page

    def _check_index(self, name: str, i: int) -> None:
        if not isinstance(i, int) or not 0 <= i < len(self.lengths):
            raise ValueError(f"{name} must be a sequence in 0..{len(self.lengths) - 1}, got {i!r}")

    def _check_new(self, k: Tensor, v: Tensor, counts: Tensor | None) -> list[int]:
        batch = len(self.lengths)
        for name, x, pool in (("k", k, self.k), ("v", v, self.v)):
            if not isinstance(x, Tensor) or x.dtype != pool.dtype or x.device != pool.device:
                raise TypeError(
                    f"{name} must be {pool.dtype} on {pool.device} like its pool, got {_describe(x)}"
                )
            if x.ndim != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (batch, pool.shape[1], pool.shape[3]):
                raise ValueError(
                    f"{name} must be [{batch}, {pool.shape[1]}, n, {pool.shape[3]}], got {list(x.shape)}"
                )
        if k.shape[2] != v.shape[2]:
            raise ValueError(f"k and v must bring as many tokens, got {k.shape[2]} and {v.shape[2]}")
        if counts is None:
            return [k.shape[2]] * batch
        if not isinstance(counts, Tensor) or counts.dtype != torch.int64 or counts.shape != (batch,):
            raise TypeError(f"counts must be int64 [{batch}], got {_describe(counts)}")
        if bool(((counts < 0) | (counts > k.shape[2])).any()):
            raise ValueError(f"counts must be in 0..{k.shape[2]}, got {counts.tolist()}")
        return counts.tolist()


def _describe(value) -> str:
    return (
        f"{value.dtype} {list(value.shape)} on {value.device}"
        if isinstance(value, Tensor)
        else type(value).__name__
    )
