"""The compiled libraries of native engines: loaded once, spoken to in words of 64 bits."""

from __future__ import annotations

import array
import ctypes
import struct
import warnings
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from tilewise.kernels import building

KINDS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int64: 3,
    torch.bool: 4,
    torch.int32: 5,
    torch.int8: 6,
}
GRID = 10  # words of a tensor
ROOM = ctypes.c_int64(200)  # bytes for a message of what went wrong


NOTHING = (0,) * GRID


def grid(x: Tensor | None) -> tuple[int, ...]:
    """A tensor of up to four axes as a library reads it, `Grid` of native.h."""
    if x is None:
        return NOTHING
    missing = 4 - x.ndim
    return (x.data_ptr(), KINDS[x.dtype], *x.shape, *(1,) * missing, *x.stride(), *(0,) * missing)


def unsuited(x: Tensor) -> str | None:
    """Why native engines, which sum in float32, cannot take a call with tensors like `x`; None where they can."""
    if x.device.type != "cpu":
        return f"runs on CPUs, the call's tensors are on {x.device.type}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes in float32, the call is in {x.dtype}"
    return None


class Library:
    """The library of one kernel, built when it is first asked for.

    Args:
        name, sources: as in `building.load`. call_words: the entry point that says how many words a call has, and
            how many this version of Tilewise writes.
    """

    def __init__(self, name: str, sources: Sequence[Path], call_words: tuple[str, int]) -> None:
        self.name, self.sources, self.call_words = name, sources, call_words

    @cached_property
    def loaded(self) -> ctypes.CDLL | str:
        """The library, or why there is none, which is also said once as a warning."""
        try:
            library = building.load(self.name, self.sources)
        except building.BuildFailed as reason:
            _warn(str(reason))
            return str(reason)
        entry, words = self.call_words
        if getattr(library, entry)() != words:
            return "the compiled library and this version of Tilewise disagree"  # a wrong build would crash
        return library

    def unavailable(self) -> str | None:
        """Why there is none on this machine, or None."""
        return self.loaded if isinstance(self.loaded, str) else None

    def asks(self, entry: str) -> bool:
        """What an entry point without arguments says; False where there is no library."""
        return bool(self.number(entry))

    def number(self, entry: str) -> int:
        """The number that an entry point without arguments gives; 0 where there is no library."""
        if isinstance(self.loaded, str):
            return 0
        function = getattr(self.loaded, entry)
        function.restype = ctypes.c_int64
        return function()

    def call(self, entry: str, words: array.array | bytes) -> None:
        """Run an entry point on its packed arguments; raises ValueError or RuntimeError where it fails."""
        message = ctypes.create_string_buffer(ROOM.value)
        packed = words if isinstance(words, bytes) else ctypes.c_void_p(words.buffer_info()[0])
        failed = getattr(self.loaded, entry)(packed, message, ROOM)
        if not failed:
            return
        said = message.value.decode(errors="replace")
        if failed == 2:  # an argument that only reading it could tell
            raise ValueError(said)
        if failed:
            raise RuntimeError(f"the native engine failed: {said}")


@lru_cache
def _warn(reason: str) -> None:
    warnings.warn(f"tilewise runs without its native engine: {reason}", stacklevel=4)


class KernelLibrary(Library):
    """The library of a kernel whose calls are tensors and then numbers, built from the C++ in its folder.

    Entry points are `int tilewise_NAME_ENTRY(const void* call, char* message, int64_t room)`, where `call` is a
    struct of `tensors` Grids and then `numbers` words; `tilewise_NAME_words()` says how many words it expects.
    """

    def __init__(self, name: str, folder: Path, *, tensors: int, numbers: int) -> None:
        own, shared = sorted(folder.glob("native_*.h")), folder.parent / "native.h"
        sources = [*sorted(folder.glob("native*.cpp")), shared, *own]
        super().__init__(name, sources, (f"tilewise_{name}_words", GRID * tensors + numbers))
        self.tensors = tensors

    def run(self, entry: str, tensors: Sequence[Tensor | None], *numbers: int | float) -> None:
        """Run an entry point; trailing tensors that are not given count as None. RuntimeError if it fails."""
        words: list[int] = []
        for x in tensors:
            words += grid(x)
        words += NOTHING * (self.tensors - len(tensors))
        kinds = "".join("d" if isinstance(number, float) else "q" for number in numbers)
        packed = struct.pack(f"{len(words)}q{kinds}", *words, *numbers)
        if len(packed) != 8 * self.call_words[1]:
            raise RuntimeError(f"{self.name} expects {self.call_words[1]} words, got {len(packed) // 8}")
        self.call(f"tilewise_{self.name}_{entry}", packed)
