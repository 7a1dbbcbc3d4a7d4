"""Writes src/tilewise/transforms/qmc/lattice_vector.py: the default generating vector of lattices (half a
minute)."""

from __future__ import annotations

import textwrap
from pathlib import Path

from tilewise.transforms.qmc import search_lattice

TARGET = Path(__file__).parent.parent / "src/tilewise/transforms/qmc/lattice_vector.py"
DIMENSIONS, LOG2_POINTS = 256, 20


def main() -> None:
    vector = search_lattice(DIMENSIONS, LOG2_POINTS)
    numbers = textwrap.fill(
        ", ".join(map(str, vector)) + ",", 108, initial_indent="    ", subsequent_indent="    "
    )
    TARGET.write_text(
        '"""The default generating vector; written by tools/make_lattice.py."""\n\n'
        f"LOG2_POINTS = {LOG2_POINTS}\n# fmt: off\nVECTOR = (\n{numbers}\n)\n# fmt: on\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
