"""Times that a test compares; the test is marked `timed`, and runs with nothing beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def least_times(runs: Mapping[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Seconds of each run at its quickest, after one that does not count.

    Every round goes through all runs, so that what slows the machine for a while slows none of them alone.
    """
    best = dict.fromkeys(runs, float("inf"))
    for counts in (False, *[True] * rounds):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            if counts:
                best[name] = min(best[name], time.perf_counter() - begun)
    return best
