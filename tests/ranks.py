"""Ranks on this machine: a function run by 2 to 4 processes of one gloo group.

The processes are forked from a server that has imported torch and done nothing else (a fork of the test process
itself would inherit its threads), so that a group starts in tenths of a second. They meet through a file, so that
parallel test workers never compete for a port.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# torch._dynamo: the first call of a custom operator would import it, one second in every process.
PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "tilewise.attention", "pytest"]
GRACE = 5.0  # seconds that the others have, once one rank failed, to say how it looked to them


class RanksFailed(AssertionError):
    """Some ranks raised, died or did not finish in time; the message holds what each of them said."""


def run_ranks(job: Callable[..., Any], world: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """`job(rank, world, *args)` in `world` processes of one gloo group; what each returned, by rank.

    `job` must be a function at the top of a module; it, `args` and the results must pickle. Every process has one
    thread, random numbers seeded alike, and the process group ready. Raises RanksFailed with the traceback of every
    rank that failed, and where each one stood that had not finished after `timeout` seconds. No process outlives
    the call, nor the caller.
    """
    start = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(start)
    context.set_forkserver_preload(PRELOAD)
    payload = pickle.dumps((job, args))
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes, lifelines = [], [], []
        try:
            for rank in range(world):
                ours, theirs = context.Pipe(duplex=False)
                lifeline, held = context.Pipe(duplex=False)
                process = context.Process(
                    target=_run,
                    args=(rank, world, folder, payload, theirs, lifeline, timeout),
                    name=f"rank {rank}",
                    daemon=True,
                )
                process.start()
                theirs.close()
                lifeline.close()
                processes.append(process)
                pipes.append(ours)
                lifelines.append(held)
            answers = _collect(pipes, timeout)
        finally:
            for held in lifelines:  # a process ends itself when its lifeline is cut
                held.close()
            _end(processes)
        return _results(answers, Path(folder), timeout)


def _collect(pipes: list[Connection], timeout: float) -> list[tuple[str, Any]]:
    """What each rank said: ("done", result), ("failed", traceback), ("died", None) or ("silent", None)."""
    answers: list[tuple[str, Any]] = [("silent", None)] * len(pipes)
    open_pipes = dict(zip(pipes, range(len(pipes))))
    end = time.monotonic() + timeout
    while open_pipes:
        ready = wait(list(open_pipes), max(0.0, end - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = open_pipes.pop(pipe)
            try:
                answers[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                answers[rank] = ("died", None)
            if answers[rank][0] != "done":
                end = min(end, time.monotonic() + GRACE)
    return answers


def _end(processes: list[Any]) -> None:
    for process in processes:
        process.join(GRACE)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()


def _results(answers: list[tuple[str, Any]], folder: Path, timeout: float) -> list[Any]:
    if all(word == "done" for word, _ in answers):
        return [result for _, result in answers]
    said = []
    for rank, (word, what) in enumerate(answers):
        if word == "done":
            said.append(f"rank {rank} finished")
        elif word == "failed":
            said.append(f"rank {rank} failed:\n{what}")
        elif word == "died":
            said.append(f"rank {rank} died without a word")
        else:
            stack = folder / f"stack{rank}"
            where = stack.read_text() if stack.exists() else ""
            said.append(f"rank {rank} had not finished (limit {timeout:g} s)\n{where}")
    raise RanksFailed("\n".join(said))


class _Answer:
    """Sends what happens inside its `with` block to the parent: the result that was set, or the traceback."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.result: Any = None

    def __enter__(self) -> _Answer:
        return self

    def __exit__(self, kind, error, where) -> bool:
        if kind is None:
            message = ("done", self.result)
        else:
            message = ("failed", "".join(traceback.format_exception(kind, error, where)))
        self.pipe.send_bytes(pickle.dumps(message))
        return True


def _run(rank: int, world: int, folder: str, payload: bytes, pipe, lifeline, timeout: float) -> None:
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    with open(Path(folder) / f"stack{rank}", "w") as stack, _Answer(pipe) as answer:
        faulthandler.dump_traceback_later(0.8 * timeout, file=stack)
        for kind in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("error", kind)
        torch.set_num_threads(1)
        if sys.platform == "linux":
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # gloo otherwise asks the network for this machine's name
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        job, args = pickle.loads(payload)
        torch.manual_seed(0)
        answer.result = job(rank, world, *args)
        dist.barrier()  # nobody leaves while another still listens to it
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


def _end_with_parent(lifeline: Connection) -> None:
    try:
        lifeline.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)
