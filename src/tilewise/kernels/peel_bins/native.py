"""The native engine: C++ for CPUs, compiled on first use (see `tilewise.kernels.building`).

Parities are counts of bits. Only bins that the round before has changed are decoded again. One thread: a
spectrum of a hundred coefficients takes less than starting another.
"""

from __future__ import annotations

import array
from pathlib import Path

import torch

from tilewise.kernels.library import KernelLibrary
from tilewise.kernels.peel_bins.call import Call, Peeled

LIBRARY = KernelLibrary("peel_bins", Path(__file__).parent, tensors=0, numbers=16)
SOURCES = LIBRARY.sources
MOST_BITS = 61  # of a place; with the sign they stay below that of a word


def refuse(call: Call) -> str | None:
    """Why this engine cannot run the call."""
    if call.left.device.type != "cpu":
        return f"runs on CPUs, the call's tensors are on {call.left.device.type}"
    if call.n > MOST_BITS:
        return f"holds places of at most {MOST_BITS} bits, the call's have {call.n}"
    return LIBRARY.unavailable()


def run(call: Call) -> Peeled:
    """Places and values of the coefficients found."""
    given = (call.left, call.hashes, call.offsets, call.chosen, call.decoders)
    kept = [x.contiguous() for x in given]
    groups, offsets, bins = call.left.shape
    room = groups * bins * call.rounds
    index, value = torch.empty(room, dtype=torch.int64), torch.empty(room, dtype=torch.float64)
    allowed, told = array.array("d", [call.allowed]), array.array("q", [0, 0, 0])
    words = [x.data_ptr() for x in (*kept, index, value)]
    words += [allowed.buffer_info()[0], told.buffer_info()[0], groups, offsets, bins]
    words += [call.hashes.shape[1], call.chosen.shape[1], call.n, call.rounds]
    LIBRARY.call("tilewise_peel_bins_run", array.array("q", words))
    found, explained, rounds = told
    return Peeled(index[:found].clone(), value[:found].clone(), bool(explained), rounds)
