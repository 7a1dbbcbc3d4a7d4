"""Time and memory of prefill and decoding, measured in rounds so that methods share the machine's moods."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewise.machine import clock

Patcher = Callable[[], AbstractContextManager]


@torch.inference_mode()
def prefill(model: Any, tokens: Tensor) -> float:
    """Milliseconds to read `tokens [1, N]` into a cache and score the next token."""
    start = clock(tokens.device)
    model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    return 1000 * (clock(tokens.device) - start)


@torch.inference_mode()
def decode(model: Any, tokens: Tensor, steps: int = 12) -> float:
    """Median milliseconds per token, generated one by one after all but the last `steps` of `tokens`."""
    cache = model(input_ids=tokens[:, :-steps], use_cache=True, logits_to_keep=1).past_key_values
    times = []
    for position in range(tokens.shape[1] - steps, tokens.shape[1]):
        start = clock(tokens.device)
        cache = model(
            input_ids=tokens[:, position : position + 1], past_key_values=cache, use_cache=True
        ).past_key_values
        times.append(1000 * (clock(tokens.device) - start))
    return statistics.median(times)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the 20th and 80th percentile."""
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    low, middle, high = torch.quantile(ordered, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return {"ms": middle, "low": low, "high": high}


class PeakMemory:
    """Megabytes by which memory rose above where it stood at the start of a block; None where it cannot be told."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mb: float | None = None
        self.reason: str | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            _give_back()
            try:
                Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
                self.before = _status("VmRSS")
            except OSError:
                self.reason = "peak memory of the CPU can be reset on Linux only"
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.mb = (torch.cuda.max_memory_allocated(self.device) - self.before) / 1e6
        elif self.reason is None:
            self.mb = max(0, _status("VmHWM") - self.before) / 1e6  # the kernel counts in batches of pages


def _give_back() -> None:
    """Return freed memory to the system, or what the method before held would hide what this one needs."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # only the GNU C library can
        ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
