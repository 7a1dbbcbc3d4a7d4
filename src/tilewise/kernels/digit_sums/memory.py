"""Room for many points: on Linux in large pages, where the system gives them to those that ask."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

PAGE = 1 << 21
_HUGE = 14  # MADV_HUGEPAGE


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, with the system advised to back it by large pages.

    A million points of 32 coordinates fill 65,536 pages of 4 KB, and getting these took 90 ms where writing
    took 20; large ones took 16. NumPy asks for them on its own, PyTorch does not.
    """
    made = torch.empty(tuple(shape), dtype=dtype, device=device)
    advise = _madvise()
    if made.device.type == "cpu" and made.nbytes >= 2 * PAGE and advise is not None:
        first = -(-made.data_ptr() // PAGE) * PAGE
        last = (made.data_ptr() + made.nbytes) // PAGE * PAGE
        advise(
            ctypes.c_void_p(first), ctypes.c_size_t(last - first), _HUGE
        )  # advice: refusing it changes nothing
    return made


@lru_cache
def _madvise():
    """The system's function, or None where there is none."""
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
