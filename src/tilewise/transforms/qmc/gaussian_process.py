"""Gaussian-process regression on lattices and digital nets in O(n log n) a step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tilewise.transforms.qmc.gram import Basis, first_features
from tilewise.transforms.qmc.kernels import ProductKernel
from tilewise.transforms.qmc.lattice import Lattice
from tilewise.transforms.qmc.nets import DigitalNet
from tilewise.transforms.qmc.sequence import whole_number

CHUNK = 1 << 22  # features held at a time when the process is evaluated elsewhere


class FastGP(nn.Module):
    """A Gaussian process `f = mean + GP(0, scale k)` seen with noise at the first n points of a sequence.

    Weights of the coordinates and the noise, relative to the scale, are fitted by marginal likelihood; the
    mean and the scale that are best given those have closed forms and are put in. Each step costs n values
    of the kernel and one transform, O(n (d + log n)), where a dense Cholesky factor costs O(n^3).

    Args:
        kernel: gives smoothness and first weights; its scale is not used.
        sequence: that fits the kernel (see `Gram`), without replications.
        n: a power of two.
        noise: the first variance of the noise over the scale, at least `least_noise`.
        least_noise: keeps the matrix regular; the smallest that float64 can resolve is about 1e-15 n.

    The application of the fast kernel methods of QMCPy (Sorokin, 2025, arXiv 2502.14256).
    """

    def __init__(
        self,
        kernel: ProductKernel,
        sequence: Lattice | DigitalNet,
        n: int,
        *,
        noise: float = 1e-6,
        least_noise: float = 1e-9,
    ) -> None:
        super().__init__()
        if sequence.replications is not None:
            raise ValueError(f"sequence must have no replications for a process, got {sequence.replications}")
        if not 0 < least_noise <= noise:
            raise ValueError(f"noise must be at least least_noise > 0, got {noise} and {least_noise}")
        self.kernel, self.sequence, self.n, self.least_noise = kernel, sequence, n, least_noise
        self._features = first_features(kernel, sequence, n)
        self._basis = Basis(sequence)
        self.log_weights = nn.Parameter(kernel.weights.detach().log().to(sequence.device))
        above = torch.tensor(max(noise - least_noise, least_noise), dtype=torch.float64)
        self.log_noise = nn.Parameter(above.log().to(sequence.device))
        self._given: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """Of the coordinates, `[dim]`."""
        return self.log_weights.exp()

    @property
    def noise(self) -> Tensor:
        """The noise's variance over the scale."""
        return self.log_noise.exp() + self.least_noise

    @property
    def x(self) -> Tensor:
        """The points at which the function is to be given, `[n, dim]`."""
        return self.sequence.points(self.n)

    def log_likelihood(self, y: Tensor) -> Tensor:
        """The marginal likelihood's logarithm at the best mean and scale."""
        scale, logs = self._terms(self._checked(y))
        return -0.5 * (self.n * (scale.log() + math.log(2 * math.pi) + 1) + logs)

    def fit(self, y: Tensor, *, steps: int = 50) -> FastGP:
        """Fit weights and noise to values `[n]` at `x` by L-BFGS, and keep the values."""
        whole_number("steps", steps, 0)
        y = self._checked(y)
        search = torch.optim.LBFGS(
            self.parameters(), max_iter=max(1, steps), line_search_fn="strong_wolfe", tolerance_change=1e-12
        )

        def loss() -> Tensor:
            search.zero_grad()
            found = -self.log_likelihood(y) / self.n
            found.backward()
            return found

        if steps:
            search.step(loss)
        self._given = y
        return self

    @torch.no_grad()
    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances `[q]` of f at points `[q, dim]` in [0, 1).

        Each mean costs O(n dim), its variance a transform more.
        """
        y, spectrum = self._fitted(), self._spectrum()
        scale = self._terms(y)[0]
        coefficients = self._basis.backward(self._basis.forward(y - y.mean()) / spectrum, self.n)
        means, variances = [], []
        for part in x.split(max(1, CHUNK // (self.n * self.kernel.dim))):
            cross = self._combine(self._cross(part))  # [chunk, n]
            seen = self._basis.forward(cross)
            weights = 1 / spectrum
            inner = (seen.abs().square() * weights * self._twice(seen)).sum(-1)
            means.append(y.mean() + cross @ coefficients)
            variances.append(scale * (self._combine(self._features[:1]) - inner).clamp(min=0))
        return torch.cat(means), torch.cat(variances)

    @torch.no_grad()
    def integral(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the integral of f over the unit cube: Bayesian cubature.

        The kernel integrates to 1, so the mean is that of the values; the variance is `scale (1 - n / l)`,
        with l the eigenvalue of the constant vector, of which l - n is summed so that nothing cancels.
        """
        y = self._fitted()
        less_one = torch.zeros(self.n, dtype=torch.float64, device=y.device)
        for j in range(self.kernel.dim):  # of the product of 1 + w f, without the 1
            gain = self.weights[j] * self._features[:, j]
            less_one = less_one + gain + less_one * gain
        over = less_one.sum().clamp(min=0) + self.noise
        return y.mean(), self._terms(y)[0] * over / (self.n + over)

    def _cross(self, x: Tensor) -> Tensor:
        """Features between points `[q, dim]` and those of the sequence, `[q, n, dim]`."""
        self.kernel._check_points("x", x)
        return self.kernel.features(self.kernel.difference(x.double().unsqueeze(1), self.x.double()))

    def _combine(self, features: Tensor) -> Tensor:
        return (1 + self.weights * features).prod(-1)

    def _spectrum(self) -> Tensor:
        return self._basis.eigenvalues(self._combine(self._features)) + self.noise

    def _twice(self, spectrum: Tensor) -> Tensor:
        """How often each coordinate of `Basis.forward` stands among all n."""
        counts = torch.ones(spectrum.shape[-1], dtype=torch.float64, device=spectrum.device)
        if not self._basis.digital:
            counts[1 : (self.n + 1) // 2] = 2
        return counts

    def _terms(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The best scale, and the logarithm of the determinant of the matrix without it."""
        spectrum = self._spectrum()
        inside = self._basis.forward(y - y.mean())
        counts = self._twice(inside)
        scale = (inside.abs().square() / spectrum * counts).sum() / self.n
        return scale.clamp(min=1e-300), (spectrum.log() * counts).sum()

    def _checked(self, y: Tensor) -> Tensor:
        if y.shape != (self.n,) or not y.is_floating_point():
            raise ValueError(f"y must be {self.n} floating-point values, got {tuple(y.shape)} of {y.dtype}")
        return y.double()

    def _fitted(self) -> Tensor:
        if self._given is None:
            raise ValueError("the process has no values yet: call fit(y) first")
        return self._given
