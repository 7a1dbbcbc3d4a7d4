"""Learning a fast algorithm for a matrix: gradient descent on relaxed factors, then a polish."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tilewise.transforms.butterfly.factors import multiply
from tilewise.transforms.butterfly.permutation import Permutation, RelaxedPermutation, relaxed
from tilewise.transforms.butterfly.transform import Butterfly

POLISHED = 4  # of the best starts, at most


@dataclass(frozen=True, eq=False)
class Learned:
    """A Butterfly with fixed permutations in float64, and how far its matrix is from the target.

    `error` is the root mean square over all entries, `descended` what gradient descent alone had reached from
    the same start, with its mixture of permutations.
    """

    transform: Butterfly
    error: float
    descended: float


def learn_butterfly(
    target: Tensor,
    *,
    depth: int = 1,
    numbers: str = "real",
    permutation: str = "learned",
    steps: int = 1000,
    rate: float = 0.05,
    starts: int = 64,
    enough: float = 1e-8,
    seed: int = 0,
) -> Learned:
    """The Butterfly nearest to a matrix that gradient descent finds (Dao et al., 2019, section 4.1).

    Many starts from random factors and logits descend side by side, by Adam on the mean square of `matrix -
    target`. The better quarter goes on after a quarter of the steps, and a quarter of those after half of
    them: most starts meet a wrong permutation, which shows early. Of those left the best are polished: the
    likelier permutations are taken, and the factors go on in float64 with L-BFGS and, up to n = 128, damped
    Gauss-Newton steps, until one errs by at most `enough`. The paper searches rates and starts with
    Hyperband; here the rate falls from `rate` to nothing along a cosine, and logits learn five times as fast.

    Args:
        target: `[n, n]`, n a power of two, complex where `numbers` is "complex" and for nothing else.
        depth, numbers, permutation: of the `Butterfly`, tied.
        steps, rate: of Adam. starts: how many. enough: the error to stop at.
        seed: of all starts; the global random state is left as it was.

    Raises ValueError for a target of another shape or kind.
    """
    if target.ndim != 2 or target.shape[0] != target.shape[1]:
        raise ValueError(f"target must be a square matrix, got {list(target.shape)}")
    if target.is_complex() != (numbers == "complex"):
        raise ValueError(
            f"target must be complex for numbers='complex' and for nothing else, got {target.dtype}"
        )
    if isinstance(starts, bool) or not isinstance(starts, int) or starts < 1:
        raise ValueError(f"starts must be an integer >= 1, got {starts!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = [
            Butterfly(target.shape[0], depth=depth, numbers=numbers, permutation=permutation)
            for _ in range(starts)
        ]
    best: Learned | None = None
    for one, descended in _descend(made, target, steps, rate)[:POLISHED]:
        one.harden()
        found = Learned(one, _polish(one, target), descended)
        if best is None or found.error < best.error:
            best = found
        if best.error <= enough:
            break
    if best is None:
        raise ArithmeticError("no start was left")
    return best


def distance(made: Butterfly, target: Tensor) -> Tensor:
    """The mean square of the entries of the matrix less the target."""
    return (made.matrix() - target).abs().square().mean()


def _descend(made: list[Butterfly], target: Tensor, steps: int, rate: float) -> list[tuple[Butterfly, float]]:
    """Adam in float32 on all starts together; those left with their root mean square errors, best first.

    What they have learned is written back to them.
    """
    target = target.to(torch.complex64 if target.is_complex() else torch.float32)
    factors = torch.stack([one.twiddle.detach() for one in made], 1)  # [depth, starts, 2, 2, n - 1]
    logits = _logits(made)
    alive = list(range(len(made)))
    cuts = [steps // 4, steps // 2, steps]
    for start, end in zip([0, *cuts], cuts):
        factors, logits = factors.detach().requires_grad_(), logits.detach().requires_grad_()
        groups = [{"params": [factors], "lr": rate}, {"params": [logits], "lr": 5 * rate}]
        optimiser = torch.optim.Adam(groups[: 1 + bool(logits.numel())])
        for step in range(start, end):
            for group, own in zip(optimiser.param_groups, (rate, 5 * rate)):
                group["lr"] = own * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimiser.zero_grad()
            _distances(made[0], factors, logits, target).sum().backward()
            optimiser.step()
        with torch.no_grad():
            errors = _distances(made[0], factors, logits, target)
        left = len(alive) if end == steps else max(1, len(alive) // 4)
        keep = errors.argsort()[:left]
        factors, logits, errors = factors[:, keep], logits[:, keep], errors[keep]
        alive = [alive[i] for i in keep.tolist()]
    _write_back([made[i] for i in alive], factors.detach(), logits.detach())
    return [(made[i], float(error) ** 0.5) for i, error in zip(alive, errors)]


def _logits(made: list[Butterfly]) -> Tensor:
    """`[depth, starts, 2, 3]`; no rows where permutations are fixed."""
    rows = [
        torch.stack(
            [p.logits.detach() if isinstance(p, RelaxedPermutation) else torch.zeros(0, 3) for p in each]
        )
        for each in zip(*(one.permutations for one in made))
    ]
    return torch.stack(rows)


def _distances(like: Butterfly, factors: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """`distance` of all starts, `[starts]`."""
    x = torch.eye(like.n, dtype=factors.dtype).unsqueeze(1).expand(-1, factors.shape[1], -1)
    for permutation, own, choices in zip(like.permutations, factors, logits):
        x = permutation(x) if isinstance(permutation, Permutation) else relaxed(x, choices)
        x = multiply(own, x, tied=True)
    x = x.real if like.numbers == "real part" else x
    return (x - target.mT.unsqueeze(1)).abs().square().mean((0, 2))


def _write_back(made: list[Butterfly], factors: Tensor, logits: Tensor) -> None:
    with torch.no_grad():
        for i, one in enumerate(made):
            one.twiddle.copy_(factors[:, i])
            for permutation, choices in zip(one.permutations, logits[:, i]):
                if isinstance(permutation, RelaxedPermutation):
                    permutation.logits.copy_(choices)


def _polish(made: Butterfly, target: Tensor) -> float:
    """L-BFGS and Gauss-Newton steps on the factors in float64, in place; the root mean square error then."""
    wide = torch.complex128 if made.twiddle.is_complex() else torch.float64
    made.twiddle = nn.Parameter(made.twiddle.detach().to(wide))
    target = target.to(torch.complex128 if target.is_complex() else torch.float64)
    optimiser = torch.optim.LBFGS(
        [made.twiddle], max_iter=400, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = target.numel() * distance(made, target)
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        _solve(made, target)
        return float(distance(made, target).sqrt())


def _solve(made: Butterfly, target: Tensor, most: int = 128, rounds: int = 10) -> None:
    """Damped Gauss-Newton steps while they help, in place: L-BFGS alone stalls at half of the digits.

    The damping leaves alone what factors can pass on to one another without changing the product. Its normal
    equations are 8n wide, so matrices larger than `most` are left as they are.
    """
    if made.n > most:
        return
    like = made.twiddle

    def residual(flat: Tensor) -> Tensor:
        numbers = flat.view(*like.shape, 2) if like.is_complex() else flat.view(like.shape)
        given = {"twiddle": torch.view_as_complex(numbers) if like.is_complex() else numbers}
        rest = torch.func.functional_call(made, given, (torch.eye(made.n, dtype=torch.float64),)).mT - target
        return (torch.view_as_real(rest) if rest.is_complex() else rest).flatten()

    flat = (torch.view_as_real(like) if like.is_complex() else like).detach().flatten().clone()
    error = residual(flat)
    for _ in range(rounds):
        slopes = torch.func.jacfwd(residual)(flat)
        normal = slopes.mT @ slopes
        normal.diagonal().add_(1e-10 * normal.diagonal().mean())
        moved = flat - torch.linalg.solve(normal, slopes.mT @ error)
        after = residual(moved)
        if not after.square().sum() < error.square().sum():
            break
        flat, error = moved, after
    like.copy_(
        torch.view_as_complex(flat.view(*like.shape, 2)) if like.is_complex() else flat.view(like.shape)
    )
