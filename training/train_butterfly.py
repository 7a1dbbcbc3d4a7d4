"""Learns butterfly factors of known transforms, for tests/transforms/test_butterfly.py.

    python training/train_butterfly.py                # all of them, some minutes of one core
    python training/train_butterfly.py dft-32 dct-8   # these

Gradient descent from random factors and random relaxed permutations, then L-BFGS in float64 with the
permutation it found (`learn_butterfly`). Seeds are fixed: the same machine and version of PyTorch give the
same factors. What is kept is float64, since the claim is about machine precision; complex numbers are pairs.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tilewise.transforms import dct, hadamard, learn_butterfly

WEIGHTS = Path(__file__).parent.parent / "tests/transforms/weights/butterfly.safetensors"
NUMBERS = {"dft": "complex", "dct": "real part", "hadamard": "real"}
SIZES = (8, 16, 32, 64)
STEPS = {8: 800, 16: 1000, 32: 1500, 64: 2000}
STARTS = {"dct-64": 32}  # else 64


def target(name: str, n: int) -> Tensor:
    """The orthonormal transform as a float64 or complex128 matrix."""
    eye = torch.eye(n, dtype=torch.float64)
    if name == "dft":
        return torch.fft.fft(eye, norm="ortho")
    return dct(eye).mT if name == "dct" else hadamard(n, dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [f"{name}-{n}" for name in NUMBERS for n in SIZES]
    parser.add_argument("which", nargs="*", choices=[*every, []], help="default: all")
    chosen = parser.parse_args().which or every
    torch.set_num_threads(1)
    WEIGHTS.parent.mkdir(exist_ok=True)
    for one in chosen:
        name, _, size = one.partition("-")
        n, start = int(size), time.perf_counter()
        found = learn_butterfly(
            target(name, n), numbers=NUMBERS[name], steps=STEPS[n], starts=STARTS.get(one, 64)
        )
        twiddle = found.transform.twiddle.detach()
        kept = load_file(WEIGHTS) if WEIGHTS.exists() else {}
        kept[f"{one}.twiddle"] = torch.view_as_real(twiddle).contiguous() if twiddle.is_complex() else twiddle
        kept[f"{one}.choices"] = found.transform.permutations[0].choices
        print(
            f"{one}: error {found.error:.1e} (descent alone {found.descended:.1e}),"
            f" {time.perf_counter() - start:.0f} s; {4 * (n - 1)} numbers for {math.prod((n, n))} entries",
            flush=True,
        )
        save_file(kept, WEIGHTS)


if __name__ == "__main__":
    main()
