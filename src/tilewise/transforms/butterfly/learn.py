"""Learning a fast algorithm for a matrix: gradient descent on relaxed factors, then a polish of what it found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tilewise.transforms.butterfly.permutation import RelaxedPermutation
from tilewise.transforms.butterfly.transform import Butterfly


@dataclass(frozen=True, eq=False)
class Learned:
    """A Butterfly with fixed permutations in float64, and how far its matrix is from the target.

    `error` is the root mean square over all entries, `descended` what gradient descent alone had reached, `tries` how
    many starts it took.
    """

    transform: Butterfly
    error: float
    descended: float
    tries: int


def learn_butterfly(
    target: Tensor,
    *,
    depth: int = 1,
    numbers: str = "real",
    permutation: str = "learned",
    steps: int = 2000,
    rate: float = 0.03,
    tries: int = 5,
    enough: float = 1e-8,
    seed: int = 0,
) -> Learned:
    """The Butterfly nearest to a matrix that gradient descent finds (Dao et al., 2019, section 4.1).

    Every try starts from random factors and logits, minimises the mean square of `matrix - target` with Adam, takes
    the likelier permutations, and goes on with L-BFGS in float64 from the factors found. The first whose error is at
    most `enough` is returned, else the best of all. The paper searches rates with Hyperband; here the rate falls from
    `rate` to nothing along a cosine, and logits learn five times as fast.

    Args:
        target: `[n, n]`, n a power of two, complex where `numbers` is "complex".
        depth, numbers, permutation: of the `Butterfly`, tied.
        steps, rate: of Adam. tries: starts with other seeds. enough: the error to stop at.
        seed: of the first try; the global random state is left as it was.

    Raises ValueError for a target of another shape or kind.
    """
    if target.ndim != 2 or target.shape[0] != target.shape[1]:
        raise ValueError(f"target must be a square matrix, got {list(target.shape)}")
    if target.is_complex() != (numbers == "complex"):
        raise ValueError(f"target must be complex for numbers='complex' and for nothing else, got {target.dtype}")
    best: Learned | None = None
    for number in range(tries):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + number)
            made = Butterfly(target.shape[0], depth=depth, numbers=numbers, permutation=permutation)
        descended = _descend(made, target, steps, rate)
        made.harden()
        found = Learned(made, _polish(made, target), descended, number + 1)
        if best is None or found.error < best.error:
            best = found
        if best.error <= enough:
            break
    if best is None:
        raise ValueError(f"tries must be an integer >= 1, got {tries!r}")
    return best


def distance(made: Butterfly, target: Tensor) -> Tensor:
    """The mean square of the entries of the matrix less the target."""
    return (made.matrix() - target).abs().square().mean()


def _descend(made: Butterfly, target: Tensor, steps: int, rate: float) -> float:
    """Adam in float32; the root mean square error at the end."""
    target = target.to(torch.complex64 if target.is_complex() else torch.float32)
    logits = [p.logits for p in made.permutations if isinstance(p, RelaxedPermutation)]
    groups = [{"params": [made.twiddle], "lr": rate}, {"params": logits, "lr": 5 * rate}]
    optimiser = torch.optim.Adam([group for group in groups if group["params"]])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = distance(made, target)
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        return float(distance(made, target).sqrt())


def _polish(made: Butterfly, target: Tensor, rounds: int = 20) -> float:
    """L-BFGS on the factors in float64, in place; the root mean square error at the end."""
    wide = torch.complex128 if made.twiddle.is_complex() else torch.float64
    made.twiddle = nn.Parameter(made.twiddle.detach().to(wide))
    target = target.to(torch.complex128 if target.is_complex() else torch.float64)
    n = target.shape[0]
    optimiser = torch.optim.LBFGS(
        [made.twiddle],
        max_iter=100,
        history_size=50,
        tolerance_grad=1e-16,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = n * n * distance(made, target)
        loss.backward()
        return loss

    last = float("inf")
    for _ in range(rounds):
        now = float(optimiser.step(closure))
        if not now < 0.5 * last:
            break
        last = now
    with torch.no_grad():
        return float(distance(made, target).sqrt())
