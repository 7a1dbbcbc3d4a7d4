"""Facts about the machine that torch does not tell, and its clock."""

from __future__ import annotations

import os
import platform
import shutil
import time
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor's name as the system gives it; on systems that do not, its architecture."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def compiler() -> str | None:
    """Path of the C++ compiler: $CXX if set, else the first of c++, g++, clang++ that is there."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def clock(device: torch.device) -> float:
    """Seconds, after everything given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cache_sizes() -> tuple[int, int, int]:
    """Bytes of a core's first and second cache for data and of the third; usual ones where nothing tells.

    A third cache counts whole, as if all cores of the process shared it.
    """
    usual = {1: 32 << 10, 2: 1 << 20, 3: 16 << 20}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            if kind != "Instruction" and int(level) in usual:
                usual[int(level)] = int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
        except (OSError, ValueError, KeyError):
            continue  # a system that tells otherwise
    return usual[1], usual[2], usual[3]
