"""Attention over a sequence that is spread over the ranks of a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tilewise.attention.api import explain
from tilewise.attention.context_parallel.layout import LAYOUTS, Spread, rank_positions
from tilewise.attention.context_parallel.local import Map
from tilewise.attention.context_parallel.schedules import SCHEDULES, Job, SpreadAttention
from tilewise.attention.context_parallel.traffic import Message, Ring, Traffic, gather_sizes
from tilewise.attention.method import Method, as_method
from tilewise.tiles import Mask, Partial, as_mask
from tilewise.tiles.masks import Both, Placed

__all__ = ["Message", "Traffic", "context_parallel_attend", "rank_positions"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def context_parallel_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: Method | str | None = None,
    *,
    mask: Mask | Tensor | str | None = None,
    scale: float | None = None,
    schedule: str = "ring",
    layout: str = "contiguous",
    group: Any = None,
    return_lse: bool = False,
    traffic: Traffic | None = None,
) -> Tensor | Partial:
    """Attention over a sequence of which every rank holds a slice; equal to `attend` over the whole of it.

    Two schedules, exact both, forward and backward:

    - "ring" (Liu et al., 2023, arXiv 2310.01889): keys and values go round, one rank up per step. In the backward
      pass the gradients of keys and values go round with them, summed up on the way.
    - "token_ring" (Wang et al., 2024, arXiv 2412.20501): queries go round, one rank down per step, and the partial
      results (out, lse) of each step are sent straight to the queries' owner, up, while the next queries come
      down. So both directions of the links are used. Results of a step leave in the step after next, as in the
      authors' code; the last ones travel alone.

    All sends and receives of a step are posted before its computation and awaited after it. What the mask hides
    from all further ranks is not sent, and blocks that hide all from one another are not computed; both follow from
    the mask and the lengths alone, so that ranks agree without asking.

    Where this differs from TokenRing as published: queries go down and results up for every mask (the authors' code
    does so for causal masks and the reverse otherwise); the authors give no backward pass, ours sends queries,
    output gradients, lse and one number per row down, and brings query gradients home; grouped heads are allowed.

    Args:
        q: this rank's slice, `[B, H_q, n_q, D]`; k `[B, H_kv, n_k, D]`, v `[B, H_kv, n_k, D_v]`, as for `attend`.
            Everything but n_q and n_k must be alike on all ranks; those may differ and may be 0.
        method: None or "dense". Others choose tiles by looking at the whole sequence and are refused.
        mask: as for `attend`, and the same on every rank: a mask, a padding or a boolean grid of the *whole*
            sequence. Floating (additive) masks are refused.
        scale: factor of the scores; None is 1/sqrt(D).
        schedule: "ring" or "token_ring". Where H_q / H_kv exceeds 2, queries alone weigh more than keys and values
            together, and "ring" loads every link less. With 3 ranks or fewer TokenRing's two exchanges more take
            back what it gains.
        layout: how slices lie in the sequence: "contiguous", of any lengths, or "zigzag" (see `rank_positions`),
            which gives all ranks as much to do under a causal mask.
        group: a process group; None is the default one. All its ranks make the same calls in the same order, and
            if one needs gradients all do, and all run the backward pass.
        return_lse: also return the log-sum-exp, as `attend` does; differentiable.
        traffic: filled with what this rank sends and computes.

    Sums are held in float32 (float64 for float64 inputs). q, k, v, outputs and their gradients travel in the
    inputs' dtype, lse in float32, and the sums of key and value gradients of "ring" in float32.

    Returns:
        This rank's slice of the output, `[B, H_q, n_q, D_v]` in q's dtype, or with `return_lse` a
        `Partial(out, lse)`.

    Raises:
        ValueError, TypeError: an argument that does not fit, here or on another rank, or that differs between
            ranks; on all ranks, so that none waits for another. RuntimeError: no process group was started.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "context_parallel_attend needs a process group: start with torchrun and call"
            " torch.distributed.init_process_group first"
        )
    group = dist.group.WORLD if group is None else group
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group must be one that this process belongs to")
    ring = Ring(group, rank, dist.get_world_size(group), traffic)
    error = _refuse(q, k, v, method, mask, scale, schedule, layout)
    lengths = _agree(ring, q, k, v, mask, schedule, layout, error)
    queries, keys = (Spread.of(x, layout, name) for x, name in zip(lengths, ("queries", "keys")))
    where = Map.of(as_mask(mask), queries, keys, q)
    job = Job(ring, where, schedule, q.shape[3] ** -0.5 if scale is None else float(scale))
    partial = Partial(*SpreadAttention.apply(q, k, v, job))
    return partial if return_lse else partial.out


def _refuse(q, k, v, method, mask, scale, schedule, layout) -> Exception | None:
    """Why this rank's arguments do not fit, or None."""
    try:
        explain(q, k, v, scale=scale, return_lse=True)  # checks q, k, v and scale as attend does
        if as_method(method).name != "dense":
            raise ValueError(
                f"method must be None or 'dense' here, got {method!r}: other methods choose tiles by looking at"
                " the whole sequence, which no rank holds"
            )
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(map(repr, SCHEDULES))}, got {schedule!r}")
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
        if isinstance(mask, Tensor) and mask.is_floating_point():
            raise TypeError(
                "mask must be boolean or a mask object here; floating (additive) masks are refused"
            )
        if isinstance(as_mask(mask), Placed):
            raise ValueError("mask must not be placed with .at(...): the slices say where their tokens stand")
    except (ValueError, TypeError) as error:
        return error
    return None


def _agree(
    ring: Ring, q, k, v, mask, schedule, layout, error: Exception | None
) -> tuple[list[int], list[int]]:
    """How many queries and keys each rank holds; raises on all ranks when one has wrong or other arguments."""
    names = [
        "batch",
        "query heads",
        "kv heads",
        "head_dim of q",
        "head_dim of v",
        "dtype",
        "schedule",
        "layout",
    ]
    names += ["need of gradients", "kind of mask"]
    numbers = [0] * (3 + len(names))
    if error is None:
        train = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        shared = [q.shape[0], q.shape[1], k.shape[1], q.shape[3], v.shape[3], DTYPES.index(q.dtype)]
        shared += [SCHEDULES.index(schedule), LAYOUTS.index(layout), int(train), _kind(as_mask(mask))]
        numbers = [1, q.shape[2], k.shape[2], *shared]
    device = q.device if isinstance(q, Tensor) else torch.device("cpu")
    everyone = gather_sizes(numbers, ring, device)
    if error is not None:
        raise error
    wrong = [rank for rank, theirs in enumerate(everyone) if not theirs[0]]
    if wrong:
        raise ValueError(f"the arguments were refused on rank {', '.join(map(str, wrong))}")
    for place, name in enumerate(names, 3):
        if len({theirs[place] for theirs in everyone}) > 1:
            raise ValueError(
                f"all ranks must have the same {name}, got {[x[place] for x in everyone]} by rank"
            )
    return [x[1] for x in everyone], [x[2] for x in everyone]


def _kind(mask: Mask) -> int:
    """A number for the class of a mask and its integers; ranks with other masks would wait for one another."""
    words = [type(mask).__name__]
    if isinstance(mask, Both):
        words += [str(_kind(mask.first)), str(_kind(mask.second))]
    words += [
        f"{name}={x}"
        for name, x in sorted(getattr(mask, "__dict__", {}).items())
        if x is None or isinstance(x, int)
    ]
    number = 0
    for letter in "|".join(words):
        number = (number * 131 + ord(letter)) % (2**61 - 1)  # hash() of a string differs between processes
    return number
