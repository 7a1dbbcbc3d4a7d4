"""The helper that runs ranks: results in order, tracebacks, time limits, and nothing left behind."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RanksFailed, run_ranks


def total(rank: int, world: int, start: float) -> tuple[int, float, int]:
    x = torch.tensor([start + rank])
    dist.all_reduce(x)
    return rank, float(x), os.getpid()


def fail_on_one(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("this is what went wrong")
    dist.barrier()


def hang_on_one(rank: int, world: int, notes: str) -> None:
    with open(f"{notes}/{rank}", "w") as file:
        file.write(str(os.getpid()))
    if rank == 0:
        time.sleep(1000)


def die(rank: int, world: int) -> None:
    if rank == 0:  # one alone: another's death, if it comes first, would break this one's connecting
        os._exit(3)


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_results_come_by_rank():
    results = run_ranks(total, 3, 0.5)
    assert [r[:2] for r in results] == [(0, 4.5), (1, 4.5), (2, 4.5)]
    assert all(gone(pid) for _, _, pid in results)


def test_a_failure_shows_its_traceback():
    with pytest.raises(RanksFailed, match=r"(?s)rank 1 failed:.*fail_on_one.*this is what went wrong"):
        run_ranks(fail_on_one, 2)


def test_a_silent_rank_is_ended_and_shown(tmp_path):
    with pytest.raises(RanksFailed, match=r"(?s)rank 0 had not finished.*hang_on_one"):
        run_ranks(hang_on_one, 2, str(tmp_path), timeout=2.0)
    assert all(gone(int((tmp_path / str(rank)).read_text())) for rank in range(2))


def test_a_death_is_noticed():
    with pytest.raises(RanksFailed, match="rank 0 died without a word"):
        run_ranks(die, 2, timeout=20.0)
