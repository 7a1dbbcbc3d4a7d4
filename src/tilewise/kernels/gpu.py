"""What Triton engines share: whether they can run, on GPUs or in the interpreter, and in blocks of which size.

Imports no Triton.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("triton") is not None
# Only where TRITON_INTERPRET=1 was set before Triton is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def absent(x: Tensor) -> str | None:
    """Why nothing of Triton runs where `x` is; None where it does."""
    if not x.is_cuda and not INTERPRETED:
        return f"runs on GPUs, the tensors are on {x.device.type}"
    return None if INSTALLED else "triton is not installed"


def too_wide(x: Tensor) -> str | None:
    """Why engines that sum in float32 cannot take tensors like `x`; None where they can."""
    if x.dtype in DTYPES:
        return None
    return f"accumulates in float32, the tensors are {str(x.dtype).removeprefix('torch.')}"


def padded(n: int) -> int:
    """The block that holds `n`: a power of two, and at least what a matrix unit multiplies at once."""
    return max(16, 1 << (n - 1).bit_length())
