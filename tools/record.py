"""Records the runs of `tilewise compare` that the docs show: docs/results/compare*.json, one after the other.

    python tools/record.py [NAME ...]    # all, or some of the names below

Run on a quiet machine (CONTRIBUTING, Figures). A run that fails leaves the recorded one as it was. Only the run of
the README's picture keeps its tile maps, which are most of a file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/results"
# Settings that read about an eighth of the visible tiles of 8,192 bytes, on the bundled model.
EIGHTH = (
    "sink-window:window=384,moba:top_k=4,xattention:threshold=0.3,pbs:threshold=0.05,hisa:top_k=512:blocks=32,"
    "spark:top_k=512,seer-attention:top_k=8"
)
RUNS: dict[str, tuple[str, ...]] = {
    "compare": (),
    "compare-all": ("--methods", "all", "--tokens", "8192"),
    "compare-eighth": ("--methods", EIGHTH, "--tokens", "8192"),
    "compare-tuned": ("--methods", "sage2,moba,docs/results/tuned.json", "--tokens", "8192"),
}
PICTURED = "compare"  # tools/picture.py draws its page


def record(name: str) -> float:
    """Run one comparison and keep its result; returns the seconds it took. Raises CalledProcessError."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        command = [sys.executable, "-m", "tilewise", "compare", *RUNS[name], "--json", str(path)]
        subprocess.run(command, cwd=ROOT, check=True)
        result = json.loads(path.read_text(encoding="utf-8"))
    if name != PICTURED:
        result["tile_maps"] |= {"mass": [], "kept": []}
    result["command"] = " ".join(["tilewise compare", *RUNS[name]])
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return time.monotonic() - begun


def main(names: Sequence[str]) -> int:
    unknown = sorted(set(names) - set(RUNS))
    if unknown:
        print(f"unknown runs {', '.join(unknown)}; known are {', '.join(RUNS)}", file=sys.stderr)
        return 2
    for name in names or RUNS:
        print(f"{name}: {record(name):,.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
