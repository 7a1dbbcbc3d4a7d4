"""The compiled code of a native engine, as its Python side calls it: tensors in, a message out if it fails."""

from __future__ import annotations

import array
import ctypes
import struct
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from tilewise.kernels import building

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int64: 3}
_ABSENT = [0] * 10


class Library:
    """An operator's native code, built from the C++ in its folder and loaded on first use.

    Entry points are `int tilewise_NAME_ENTRY(const void* call, char* message, int64_t room)`, where `call` is a
    struct of `tensors` Grids and then `numbers` words; `tilewise_NAME_words()` says how many words it expects.
    """

    def __init__(self, name: str, folder: Path, *, tensors: int, numbers: int) -> None:
        self._name, self._tensors, self._numbers = name, tensors, numbers
        own, shared = sorted(folder.glob("native_*.h")), folder.parent / "native.h"
        self.sources = [*sorted(folder.glob("native*.cpp")), shared, *own]

    def unavailable(self) -> str | None:
        """Why it cannot be had on this machine, or None; builds it the first time."""
        return self._loaded if isinstance(self._loaded, str) else None

    def call(self, entry: str, tensors: Sequence[Tensor | None], *numbers: int | float) -> None:
        """Run an entry point; trailing tensors that are not given count as None. RuntimeError if it fails."""
        words = array.array("q")
        for x in tensors:
            words.extend(_grid(x))
        words.extend(_ABSENT * (self._tensors - len(tensors)))
        for number in numbers:
            packed = struct.pack("d", number) if isinstance(number, float) else struct.pack("q", number)
            words.extend(struct.unpack("q", packed))
        if len(words) != self._words:
            raise RuntimeError(f"{self._name} expects {self._words} words, got {len(words)}")
        message = ctypes.create_string_buffer(200)
        address, _ = words.buffer_info()
        run = getattr(self._loaded, f"tilewise_{self._name}_{entry}")
        if run(ctypes.c_void_p(address), message, ctypes.c_int64(len(message))):
            raise RuntimeError(f"the native engine failed: {message.value.decode(errors='replace')}")

    @property
    def _words(self) -> int:
        return len(_ABSENT) * self._tensors + self._numbers

    @cached_property
    def _loaded(self) -> ctypes.CDLL | str:
        """The compiled library, or why there is none, which is also said once as a warning."""
        try:
            library = building.load(self._name, self.sources)
        except building.BuildFailed as reason:
            warnings.warn(f"tilewise runs without its native engine: {reason}", stacklevel=2)
            return str(reason)
        if getattr(library, f"tilewise_{self._name}_words")() != self._words:
            return "the compiled library and this version of Tilewise disagree"  # a wrong build would crash
        return library


def _grid(x: Tensor | None) -> list[int]:
    """A tensor of up to four axes as the library reads it."""
    if x is None:
        return _ABSENT
    missing = 4 - x.ndim
    return [x.data_ptr(), _KINDS[x.dtype], *x.shape, *[1] * missing, *x.stride(), *[0] * missing]
