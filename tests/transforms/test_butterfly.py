"""Butterfly products: exact factors, learned ones that recover transforms, and a layer of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tests.conformance.common import over_budget
from tilewise.transforms import (
    Butterfly,
    ButterflyLinear,
    Permutation,
    RelaxedPermutation,
    bit_reversed,
    dct,
    exact,
    hadamard,
    learn_butterfly,
)

WEIGHTS = Path(__file__).parent / "weights/butterfly.safetensors"
NUMBERS = {"dft": "complex", "dct": "real part", "hadamard": "real"}
SIZES = [8, 16, 32, 64]


def target(name: str, n: int) -> Tensor:
    """The orthonormal transform as a matrix in double precision."""
    eye = torch.eye(n, dtype=torch.float64)
    if name == "dft":
        return torch.fft.fft(eye, norm="ortho")
    return dct(eye).mT if name == "dct" else hadamard(n, dtype=torch.float64)


def learned(name: str, n: int) -> Butterfly:
    """The factors and permutation that training/train_butterfly.py found."""
    kept = load_file(WEIGHTS)
    made = Butterfly(n, numbers=NUMBERS[name], permutation="identity")
    twiddle = kept[f"{name}-{n}.twiddle"]
    made.twiddle = nn.Parameter(torch.view_as_complex(twiddle) if NUMBERS[name] != "real" else twiddle)
    made.permutations[0] = Permutation(n, kept[f"{name}-{n}.choices"])
    return made


def rms(x: Tensor) -> float:
    return float(x.detach().abs().square().mean().sqrt())


def best_of_equal_size(matrix: Tensor, numbers: int) -> tuple[float, float]:
    """Errors of the best low-rank matrix and of the best sparse one made of at most so many numbers."""
    n = len(matrix)
    values = torch.linalg.svdvals(matrix)
    low_rank = float(values[numbers // (2 * n) :].square().sum().sqrt()) / n
    sparse = matrix.abs().flatten().sort(descending=True).values[numbers:].square().sum().sqrt()
    return low_rank, float(sparse) / n


@pytest.mark.evidence
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("n", SIZES)
def test_learned_factors_are_the_transform_to_machine_precision(name, n):
    """Found by gradient descent from random numbers, they are as exact as factors from the formula.

    Both are products of log2(n) rounded factors; the budget of 8 allows for factors that are not unitary one
    by one. Controls: no matrix of low rank and no sparse one of as many numbers comes near, the best of
    either being known.
    """
    made, want = learned(name, n), target(name, n)
    error = rms(made.matrix() - want)
    assert error <= 8 * max(
        rms(exact(name, n).matrix() - want), torch.finfo(torch.float64).eps / math.sqrt(n)
    )
    x = torch.randn(5, n, dtype=torch.float64)
    torch.testing.assert_close(made(x), (x.to(want.dtype) @ want.T), rtol=1e-12, atol=1e-12)
    numbers = made.twiddle.numel() * (1 if name == "hadamard" else 2)
    low_rank, sparse = best_of_equal_size(want, numbers)
    if n >= 16:  # below, two numbers for each entry are enough for anything
        assert min(low_rank, sparse) > 1e10 * error


@pytest.mark.evidence
def test_gradient_descent_finds_the_fft():
    """From random factors and a random mixture of permutations, here and now.

    With the order of the samples left as it is, the same descent does not.
    """
    want = target("dft", 8)
    found = learn_butterfly(
        want,
        depth=1,
        numbers="complex",
        permutation="learned",
        steps=600,
        rate=0.05,
        starts=16,
        enough=1e-10,
        seed=0,
    )
    assert found.error < 1e-10
    fixed = learn_butterfly(want, numbers="complex", permutation="identity", steps=600, rate=0.05, starts=16)
    assert fixed.error > 0.05


@pytest.mark.parametrize("n", [2, 4, 8, 64, 256])
@pytest.mark.parametrize("name", ["dft", "idft", "dct", "hadamard"])
def test_exact_factors(name, n):
    want = target("dft", n).conj() if name == "idft" else target(name, n)
    made = exact(name=name, n=n)
    torch.testing.assert_close(made.matrix(), want)
    assert made.twiddle.numel() == 4 * (n - 1) and made.products == 2 * n * (n.bit_length() - 1)


@pytest.mark.parametrize("n", [2, 8, 64])
def test_convolutions_are_two_products(n):
    kernel, x = torch.randn(2, n, dtype=torch.float64)
    want = torch.stack([kernel.roll(i) for i in range(n)], 1) @ x
    made = exact("circulant", n, kernel=kernel)
    torch.testing.assert_close(made(x), want)
    assert made.depth == 2


@pytest.mark.parametrize("numbers", ["real", "complex", "real part"])
@pytest.mark.parametrize("tied", [False, True])
def test_product_of_dense_factors(numbers, tied):
    """Factor by factor against dense matrices that are filled in entry by entry."""
    n, depth = 16, 2
    made = Butterfly(n, depth=depth, numbers=numbers, tied=tied, permutation="bit-reversed")
    wide = torch.float64 if numbers == "real" else torch.complex128
    made.twiddle = nn.Parameter(made.twiddle.detach().to(wide))
    whole = torch.eye(n, dtype=wide)
    for number in range(depth):
        whole = whole[bit_reversed(n)]
        for level in range(4):
            h, factor = 2**level, torch.zeros(n, n, dtype=wide)
            for row in range(n):
                block, half, place = row // (2 * h), row // h % 2, row % h
                for other in range(2):
                    own = made.twiddle[number]
                    entry = (
                        own[half, other, h - 1 + place]
                        if tied
                        else own[level, half, other, block * h + place]
                    )
                    factor[row, block * 2 * h + other * h + place] = entry
            whole = factor @ whole
    want = whole.real if numbers == "real part" else whole
    torch.testing.assert_close(made.matrix(), want)
    x = torch.randn(2, 3, n, dtype=torch.float64)
    torch.testing.assert_close(
        made(x), (x.to(wide) @ whole.T).real if numbers == "real part" else x.to(wide) @ want.T
    )


def test_permutations():
    n = 32
    x = torch.randn(3, n)
    assert torch.equal(Permutation.named("identity", n)(x), x)
    assert torch.equal(Permutation.named("bit-reversed", n)(x), x[:, bit_reversed(n)])
    order = [*range(0, n, 2), *range(n - 1, 0, -2)]
    choices = torch.zeros(5, 3, dtype=torch.bool)
    choices[0, 0] = choices[0, 2] = True
    assert torch.equal(Permutation(n=n, choices=choices)(x), x[:, order])
    choices = (torch.rand(2, 3) > 0.5)[[0, 1, 1, 1, 1]]
    relaxed = RelaxedPermutation(n=n)
    with torch.no_grad():
        relaxed.logits.copy_(torch.where(choices[:2], 50.0, -50.0))
    assert torch.equal(relaxed.hard().choices, choices) and relaxed.sharpness == 1
    torch.testing.assert_close(relaxed(x), Permutation(n, choices)(x))
    assert sorted(Permutation(n, choices).index.tolist()) == list(range(n))


def test_hardening_takes_the_likelier_permutations():
    made = Butterfly(8)
    soft = made.permutations[0]
    choices = (soft.logits > 0)[[0, 1, 1]]
    assert made.harden() is made and torch.equal(made.permutations[0].choices, choices)
    again = Butterfly(8, permutation="identity")
    again.load_state_dict(made.state_dict())
    torch.testing.assert_close(again.matrix(), made.matrix())


def test_gradients():
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    for numbers in ("real", "complex", "real part"):
        made = Butterfly(8, numbers=numbers)
        made.twiddle = nn.Parameter(
            made.twiddle.detach().to(torch.float64 if numbers == "real" else torch.complex128)
        )
        made.permutations.double()
        given = (x, made.twiddle, made.permutations[0].logits)
        assert torch.autograd.gradcheck(lambda *_, made=made: made(x), given)


@pytest.mark.parametrize(
    ("width", "out"), [(1, 1), (1, 5), (2, 2), (5, 3), (16, 16), (17, 40), (40, 17), (64, 200)]
)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_of_any_size(width, out, depth, bias):
    layer = ButterflyLinear(
        in_features=width, out_features=out, bias=bias, depth=depth, permutation="bit-reversed"
    )
    x = torch.randn(2, 3, width, requires_grad=True)
    y = layer(x)
    assert y.shape == (2, 3, out)
    start = layer(torch.zeros(width))
    matrix = torch.stack([layer(row) for row in torch.eye(width)]) - start
    torch.testing.assert_close(y, x @ matrix + start)
    y.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)


def test_layer_keeps_lengths_at_the_start():
    layer = ButterflyLinear(64, 64, bias=False, permutation="identity")
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x).norm(dim=1), x.norm(dim=1))
    assert sum(p.numel() for p in layer.parameters()) == 2 * 2 * 64 * 6
    assert "64, 64, bias=False, depth=2" in repr(layer)


def test_layer_in_low_precision_is_within_budget():
    layer = ButterflyLinear(48, 64)
    x = torch.randn(7, 48)
    want = layer.double()(x.double()).detach()
    matrix = (
        layer(torch.eye(48, dtype=torch.float64)) - layer(torch.zeros(48, dtype=torch.float64))
    ).detach()
    naive = x @ matrix.float()
    reason = over_budget(layer.float()(x).detach(), naive, want)
    assert reason is None, reason


def test_layer_compiles_whole(monkeypatch):
    monkeypatch.undo()
    torch._dynamo.reset()
    layer = ButterflyLinear(20, 40)
    x = torch.randn(3, 20)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


class LowRank(nn.Module):
    """The control: a product of two thin matrices of at most as many numbers."""

    def __init__(self, width: int, out: int, numbers: int) -> None:
        super().__init__()
        rank = numbers // (width + out)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


WIDTH = 128


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy tones of a random phase, and which of the 63 frequencies each has."""
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(WIDTH // 2 - 1, (count,), generator=g)
    time, phase = torch.arange(WIDTH), 2 * math.pi * torch.rand(count, 1, generator=g)
    clean = (2 * math.pi / WIDTH * (kind + 1).unsqueeze(1) * time + phase).sin()
    return clean + 0.7 * torch.randn(count, WIDTH, generator=g), kind


def accuracy(hidden: nn.Module, rate: float, steps: int = 500) -> float:
    """On held-out tones, of one hidden layer trained on 4000 others at a rate of its own."""
    torch.manual_seed(1)
    model = nn.Sequential(hidden, nn.ReLU(), nn.Linear(WIDTH, WIDTH // 2 - 1))
    x, kind = tones(4000, 0)
    groups = [{"params": hidden.parameters(), "lr": rate}, {"params": model[2].parameters(), "lr": 5e-3}]
    optimiser = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    g = torch.Generator().manual_seed(2)
    for _ in range(steps):
        at = torch.randint(len(x), (200,), generator=g)
        optimiser.zero_grad()
        F.cross_entropy(model(x[at]), kind[at]).backward()
        optimiser.step()
        schedule.step()
    x, kind = tones(4000, 3)
    with torch.no_grad():
        return float((model(x).argmax(1) == kind).double().mean())


@pytest.mark.evidence
def test_a_compressed_hidden_layer_beats_low_rank():
    """A hidden layer of a quarter of the numbers, as in the paper's task, against as many of low rank.

    The paper's gain over dense layers is not seen on this task: a dense one gets 87 %, of four times the numbers.
    """
    torch.manual_seed(0)
    butterfly = ButterflyLinear(WIDTH, WIDTH)
    numbers = butterfly.twiddle.numel()
    assert numbers <= WIDTH * WIDTH / 4
    got = accuracy(butterfly, 0.05)
    low_rank = max(accuracy(LowRank(WIDTH, WIDTH, numbers), rate) for rate in (0.005, 0.02))
    assert got > low_rank + 0.1, (got, low_rank)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Butterfly(12), "n must be a power of two, at least 2, got 12"),
        (lambda: Butterfly(8, depth=0), "depth must be an integer >= 1, got 0"),
        (lambda: Butterfly(8, numbers="integers"), "numbers must be one of 'real', 'complex', 'real part'"),
        (
            lambda: Butterfly(8, permutation="random"),
            "permutation must be 'identity', 'bit-reversed' or 'cosine'",
        ),
        (lambda: Butterfly(8)(torch.randn(2, 4)), r"x must be \[..., 8\], got \[2, 4\]"),
        (lambda: Butterfly(8)(torch.randn(8) + 0j), "x must be real for numbers='real'"),
        (lambda: Permutation(8, torch.zeros(2, 3) > 0), r"choices must be bool \[3, 3\] for n = 8"),
        (lambda: exact("wavelet", 8), "name must be 'dft'"),
        (lambda: exact("circulant", 8), r"kernel must be \[8\] for 'circulant'"),
        (lambda: exact("dft", 8, torch.randn(8)), "is for nothing else"),
        (lambda: ButterflyLinear(0, 4), "in_features must be an integer >= 1, got 0"),
        (
            lambda: ButterflyLinear(4, 4, permutation="cosine"),
            "permutation must be 'bit-reversed' or 'identity'",
        ),
        (lambda: ButterflyLinear(4, 4)(torch.randn(3)), r"x must be \[..., 4\], got \[3\]"),
        (lambda: learn_butterfly(torch.randn(3, 4)), "target must be a square matrix"),
        (lambda: learn_butterfly(torch.randn(4, 4), numbers="complex"), "target must be complex"),
        (lambda: learn_butterfly(torch.randn(4, 4), starts=0), "starts must be an integer >= 1, got 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
