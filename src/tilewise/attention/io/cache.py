"""A cache of so many words that counts what moves, and that PyTorch may not compute outside of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class CacheError(ValueError):
    """The cache was asked for more words than it has, or something was computed outside of it."""


class Cache(TorchDispatchMode):
    """A cache of `words` numbers. While it is entered, PyTorch may touch nothing but what it holds.

    Every operation is looked at: operands that were not read in, and results that are not stored in what was
    allocated, raise CacheError. Moving data is what its own methods do, and they count.
    """

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.used, self.most, self.reads, self.writes = words, 0, 0, 0, 0
        self._held: dict[int, Tensor] = {}
        self._moving = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self._moving:
            for x in _tensors((args, kwargs, result)):
                if x.untyped_storage().data_ptr() not in self._held:
                    raise CacheError(f"{func} touches a tensor {list(x.shape)} that is not in the cache")
        return result

    @contextmanager
    def _move(self) -> Iterator[None]:
        self._moving = True
        try:
            yield
        finally:
            self._moving = False

    def room(self) -> float:
        """Words that are free."""
        return self.words - self.used

    def new(self, *shape: int, like: Tensor, fill: float = 0.0) -> Tensor:
        """Room for a tensor, filled with one number. Raises CacheError where there is none."""
        with self._move():
            x = like.new_full(shape, fill)
        if x.numel() > self.room():
            raise CacheError(
                f"{list(shape)} needs {x.numel()} words, but {self.used} of {self.words} are taken"
            )
        self._held[x.untyped_storage().data_ptr()] = x
        self.used += x.numel()
        self.most = max(self.most, self.used)
        return x

    def outside(self, *shape: int, like: Tensor) -> Tensor:
        """Room in slow memory, zeros; it costs nothing until something is moved."""
        with self._move():
            return like.new_zeros(shape)

    def read(self, slow: Tensor, *at: slice) -> Tensor:
        """A copy of `slow[at]` in the cache."""
        with self._move():
            source = slow[at]
        x = self.new(*source.shape, like=slow)
        with self._move():
            x.copy_(source)
        self.reads += x.numel()
        return x

    def write(self, x: Tensor, slow: Tensor, *at: slice) -> None:
        """Copy `x`, which the cache holds, to `slow[at]`."""
        with self._move():
            slow[at].copy_(x)
        self.writes += x.numel()

    def drop(self, *held: Tensor) -> None:
        """Forget tensors."""
        for x in held:
            del self._held[x.untyped_storage().data_ptr()]
            self.used -= x.numel()


def _tensors(x: Any) -> Iterator[Tensor]:
    """Every tensor in nested arguments."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple, dict)):
        for one in x.values() if isinstance(x, dict) else x:
            yield from _tensors(one)
