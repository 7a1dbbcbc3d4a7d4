"""What every test runs under: fixed seeds, one thread per parallel worker, poisoned fresh memory."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo import trace_rules

# torch.compile looks up torch's functions by name once; left to its first use, it would find a poisoned one there
# and never again know the real one.
trace_rules.get_torch_obj_rule_map()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers in every test, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nothing was written to reads as NaN, so that an unwritten output cannot pass by luck."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
            fresh = allocate(*args, **kwargs)
            if fresh.is_floating_point():
                with torch.no_grad():
                    fresh.fill_(float("nan"))
            return fresh

        return allocate_nan

    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
