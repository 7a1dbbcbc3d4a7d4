"""Fourier transforms of meshes: against analytic ones and quadrature, where phases coincide, and in
training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.convolution import meshes
from tilewise.convolution import SimplexNUFT, divided_exp, simplex_nuft

EPS = torch.finfo(torch.float64).eps


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def quadrature(corners: Tensor, k: Tensor, count: int = 24) -> Tensor:
    """Integral of exp(-i k x) over one simplex `[J + 1, D]`: Gauss's rule on a cube, folded onto the
    simplex."""
    steps = torch.arange(1, count, dtype=torch.float64)
    off = steps / (4 * steps * steps - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    nodes, weights = (nodes + 1) / 2, vectors[0] ** 2
    order = len(corners) - 1
    places = torch.cartesian_prod(*[nodes] * order).reshape(-1, order)
    scale = torch.cartesian_prod(*[weights] * order).reshape(-1, order).prod(1)
    left, shares = torch.ones(len(places), dtype=torch.float64), []
    for i in range(order):
        shares.append(left * places[:, i])
        left = left * (1 - places[:, i])
        scale = scale * (1 - places[:, i]) ** (order - 1 - i)
    points = torch.stack([left, *shares], 1) @ corners
    edges = corners[1:] - corners[0]
    volume = torch.linalg.det(edges @ edges.mT).sqrt()
    return volume * (torch.polar(torch.ones_like(scale), -(points @ k)) * scale).sum()


def plainly(nodes: Tensor) -> Tensor:
    """The sum of quotients that a divided difference is where nodes differ."""
    total = torch.zeros(nodes.shape[:-1], dtype=nodes.dtype.to_complex())
    for t in range(nodes.shape[-1]):
        others = [other for other in range(nodes.shape[-1]) if other != t]
        below = (nodes[..., t : t + 1] - nodes[..., others]).prod(-1)
        total = total + torch.polar(torch.ones_like(below), -nodes[..., t]) / below
    return total


@pytest.mark.evidence
def test_boxes_and_segments_have_their_analytic_transforms():
    """In 1, 2 and 3 dimensions, a frequency of 0 and ones across edges among them (all phases of an edge
    alike), to a few roundings. Control: the sum of quotients gives no number there, and is wrong nearby."""
    for dim in (1, 2, 3):
        low, high = -torch.rand(dim).double(), torch.rand(dim).double() + 0.2
        k = torch.cat((torch.zeros(1, dim), torch.eye(dim) * 7, 1e-9 * torch.ones(1, dim))).double()
        k = torch.cat((k, 10 * draw(200, dim), k.roll(1, 1) + 1e-7))
        vertices, simplices = meshes.box(low, high)
        got, want = simplex_nuft(vertices, simplices, k), meshes.box_transform(low, high, k)
        assert (got - want).abs().max() < 100 * EPS * want.abs().max(), dim
        phases = torch.einsum("kd,njd->knj", k, vertices[simplices])
        wrong = plainly(phases).sum(1) * (high - low).prod() * 1j**dim
        assert not (wrong - want).abs().max() < 1e-3 * want.abs().max(), dim
    ends = draw(2, 3)
    k = 5 * draw(50, 3)
    k[0] = torch.linalg.cross(ends[1] - ends[0], draw(3))  # across the segment
    a, b = (k @ ends.mT).unbind(1)
    want = (
        (ends[1] - ends[0]).norm()
        * torch.sinc((b - a) / 2 / math.pi)
        * torch.polar(torch.ones(50).double(), -(a + b) / 2)
    )
    got = simplex_nuft(ends, torch.tensor([[0, 1]]), k)
    assert (got - want).abs().max() < 100 * EPS * want.abs().max()


@pytest.mark.evidence
@pytest.mark.parametrize(("order", "dim"), [(1, 2), (1, 3), (2, 2), (2, 3), (3, 3)])
def test_every_simplex_is_its_integral(order, dim):
    """Lines, triangles and tetrahedra, flat ones too, in 2 and 3 dimensions: Gauss's rule with 24 points a
    side."""
    for scale in (1e-6, 0.3, 3.0):
        corners, k = draw(order + 1, dim), scale * draw(dim)
        got = simplex_nuft(corners, torch.arange(order + 1).unsqueeze(0), k)
        want = quadrature(corners, k)
        assert (got - want).abs() < 1e-12 * want.abs() + 1e-13, (scale, got, want)


@pytest.mark.evidence
def test_points_are_their_sum_and_a_ball_is_approached_as_its_mesh_is():
    """Points: the sum itself, and of 20,000 drawn from a Gaussian its characteristic function to within
    sampling. A ball: the mesh inside it, and by quarters less wrong with each halving of its edges, as its
    volume is."""
    k = draw(40, 3)
    points = 0.7 * draw(20_000, 3)
    got = simplex_nuft(points, torch.arange(20_000).unsqueeze(1), k) / 20_000
    direct = torch.polar(torch.ones(40, 20_000).double(), -(k @ points.mT)).mean(1)
    assert (got - direct).abs().max() < 1e-12
    assert (got - torch.exp(-0.5 * 0.49 * k.square().sum(1))).abs().max() < 4 / math.sqrt(20_000)
    errors = []
    for splits in (1, 2, 3, 4):
        mesh = meshes.filled(*meshes.sphere(splits, 0.8))
        found, want = simplex_nuft(*mesh, k, signed=True), meshes.ball_transform(0.8, k)
        errors.append(float((found - want).norm() / want.norm()))
    ratios = [a / b for a, b in zip(errors, errors[1:])]
    assert all(3.2 < ratio < 4.8 for ratio in ratios[1:]), errors


@pytest.mark.evidence
def test_a_surface_joined_to_any_origin_is_its_volume():
    """Signed contents: moved away from the origin, a ball is the same ball. Control: contents without
    signs."""
    points, faces = meshes.sphere(2, 0.5)
    k = 4 * draw(30, 3)
    shift = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    here = simplex_nuft(*meshes.filled(points, faces), k, signed=True)
    there = simplex_nuft(*meshes.filled(points + shift, faces), k, signed=True)
    moved = here * torch.polar(torch.ones(30).double(), -(k @ shift))
    torch.testing.assert_close(there, moved, rtol=0, atol=1e-13)
    unsigned = simplex_nuft(*meshes.filled(points + shift, faces), k)
    assert (unsigned - moved).abs().max() > 0.1


@pytest.mark.evidence
def test_rasterising_first_aliases_and_this_does_not():
    """A triangle, a thin sliver and a polygon on grids of 16 to 64: the field's Fourier coefficients are the
    shape's own to rounding; counting pixels whose middles are inside errs by several per cent at all of
    them."""
    for vertices, simplices in (
        (torch.tensor([[0.1, 0.2], [0.8, 0.35], [0.4, 0.9]]).double(), torch.tensor([[0, 1, 2]])),
        (torch.tensor([[0.1, 0.2], [0.9, 0.25], [0.15, 0.24]]).double(), torch.tensor([[0, 1, 2]])),
        meshes.polygon(7, 0.3, torch.tensor([0.45, 0.55], dtype=torch.float64)),
    ):
        for size in (16, 32, 64):
            layer = SimplexNUFT((size, size))
            field = layer(vertices, simplices)
            kept = torch.fft.rfft2(field, norm="forward")[: size // 2, : size // 2]
            waves = layer.waves(vertices)[: size // 2, : size // 2]
            want = sum(quadrature(vertices[corners], 2 * math.pi * waves[1, 2], 40) for corners in simplices)
            exact = simplex_nuft(vertices, simplices, 2 * math.pi * waves)
            assert (exact[1, 2] - want).abs() < 1e-12
            assert (kept - exact).abs().max() < 1e-13
            centres = (torch.arange(size, dtype=torch.float64) + 0.5) / size
            places = torch.cartesian_prod(centres, centres)
            inside = sum(_inside(places, vertices[corners]) for corners in simplices).clamp(max=1.0)
            drawn = torch.fft.rfft2(inside.view(size, size), norm="forward")[: size // 2, : size // 2]
            drawn = drawn * torch.polar(torch.ones_like(waves[..., 0]), -math.pi * waves.sum(-1) / size)
            missed = (drawn - exact).norm() / exact.norm()
            assert missed > 0.05, (size, missed)


def _inside(places: Tensor, corners: Tensor) -> Tensor:
    a, b, c = corners
    shares = torch.linalg.solve(torch.stack((b - a, c - a), 1), (places - a).mT)
    return ((shares >= 0).all(0) & (shares.sum(0) <= 1)).double()


def test_divided_differences_of_near_and_equal_nodes():
    """Against 60-digit arithmetic in place of the oracle: a run that shrinks to one node passes through the
    switch to the series without a jump, in value and in gradient."""
    for order in (1, 2, 3):
        middle, apart = draw(1), draw(order + 1)
        apart = (apart - apart.min()) / (apart.max() - apart.min())
        widths = torch.tensor(
            [0.0, 1e-12, 1e-6, 1e-3, 0.5, 1 - 1e-12, 1.0, 1 + 1e-12, 3.0], dtype=torch.float64
        )
        nodes = middle + widths.unsqueeze(1) * apart
        got = divided_exp(nodes)
        limit = torch.polar(torch.ones(1).double(), -middle) * (-1j) ** order / math.factorial(order)
        assert (got[0] - limit).abs() < 5 * EPS
        assert (got[1] - got[0]).abs() < 1e-11 and (got[7] - got[5]).abs() < 1e-11
        assert (got[-1] - plainly(nodes[-1])).abs() < 50 * EPS
        exact = [_exactly(row.tolist()) for row in nodes]
        assert max(abs(complex(a) - b) for a, b in zip(got.tolist(), exact)) < 10 * EPS
        float32 = divided_exp(nodes.float())
        again = torch.tensor([_exactly(row.tolist()) for row in nodes.float()])
        assert (float32 - again).abs().max() < 10 * torch.finfo(torch.float32).eps


def _exactly(nodes: list[float]) -> complex:
    """sum over k of (-i)^k / k! h_(k - J)(nodes) in fractions: a divided difference of every power of s."""
    from fractions import Fraction

    shift = [Fraction(x) for x in nodes]
    symmetric = [Fraction(1)] + [Fraction(0)] * 70
    for node in shift:
        for k in range(1, len(symmetric)):
            symmetric[k] += node * symmetric[k - 1]
    order, parts = len(nodes) - 1, [Fraction(0), Fraction(0), Fraction(0), Fraction(0)]
    for k, h in enumerate(symmetric):
        parts[(k + order) % 4] += h / math.factorial(k + order)
    return complex(float(parts[0] - parts[2]), float(parts[3] - parts[1]))


@pytest.mark.evidence
def test_gradients_are_right_where_phases_coincide():
    """Checked by differences, for every kind of simplex, at frequencies across edges and at 0, twice for
    triangles; and chunks of simplices change nothing. Moving a polygon by its transform's gradient finds
    another polygon."""
    k = torch.tensor(
        [[0.0, 0.0, 0.0], [0.0, 0.0, 5.0], [1.0, 2.0, -3.0], [0.9, 0.0, 0.0]], dtype=torch.float64
    )
    vertices = torch.tensor(
        [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.3, 0.8], [0.5, 0.1, 0.2]],
        dtype=torch.float64,
    ).requires_grad_()
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    for order in range(4):
        simplices = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4], [4, 0, 1, 3]])[:, : order + 1]
        run = lambda v, w, s=simplices: torch.view_as_real(simplex_nuft(v, s, k, w))  # noqa: E731
        assert torch.autograd.gradcheck(run, (vertices, weights))
    start, simplices = meshes.polygon(6, 0.2, torch.tensor([0.5, 0.5], dtype=torch.float64))
    goal = torch.cat((start[:-1] * 1.2 - 0.06, start[-1:]))
    layer = SimplexNUFT((16, 16), smooth=1.0)
    want, moved = layer(goal, simplices), start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([moved], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        missed = (layer(moved, simplices) - want).square().sum()
        missed.backward()
        return missed

    optimizer.step(loss)
    rim = (moved[:-1].detach() - goal[:-1]).norm(dim=1).max()
    assert rim < 1e-3 < (start - goal).norm(dim=1).max() / 10, rim


def test_chunks_change_nothing(monkeypatch):
    vertices, simplices = meshes.filled(*meshes.sphere(1, 0.4))
    k = 6 * draw(11, 3)
    whole = simplex_nuft(vertices, simplices, k)
    monkeypatch.setattr("tilewise.convolution.spectral.meshes.HELD", 11 * 4 * 5)
    torch.testing.assert_close(simplex_nuft(vertices, simplices, k), whole, rtol=0, atol=1e-14)
    leaf = vertices.clone().requires_grad_()
    simplex_nuft(leaf, simplices, k).abs().sum().backward()
    monkeypatch.undo()
    other = vertices.clone().requires_grad_()
    simplex_nuft(other, simplices, k).abs().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=0, atol=1e-13)


def test_fields_shapes_and_precision():
    """Channels, three dimensions, float32 against float64, an empty mesh, mass as the field's mean."""
    vertices, simplices = meshes.box(*(torch.full((3,), x, dtype=torch.float64) for x in (0.25, 0.7)))
    weights = torch.rand(6, 2, dtype=torch.float64)
    layer = SimplexNUFT((6, 5, 8))
    field = layer(vertices, simplices, weights)
    assert field.shape == (2, 6, 5, 8)
    torch.testing.assert_close(field.mean((1, 2, 3)), weights.mean(0) * 0.45**3, rtol=1e-12, atol=0)
    torch.testing.assert_close(layer(vertices, simplices, weights[:, 0]), field[0])
    narrow = layer(vertices.float(), simplices, weights.float())
    assert (narrow - field).abs().max() < 1e-5 * field.abs().max()
    assert not layer(vertices, simplices[:0]).any()
    blurred = SimplexNUFT((6, 5, 8), smooth=1.0)(vertices, simplices)
    assert blurred.std() < layer(vertices, simplices).std()
    far = SimplexNUFT((6, 5, 8), period=2.0)(2 * vertices, simplices)
    torch.testing.assert_close(far, layer(vertices, simplices))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"vertices": torch.ones(4, 4)},
            ValueError,
            r"vertices must be \[V, D\] with D from 1 to 3, got \[4, 4\]",
        ),
        (
            {"vertices": torch.ones(4, 2).half()},
            TypeError,
            "vertices must be float32 or float64, got torch.float16",
        ),
        (
            {"simplices": torch.zeros(3, 4).long()},
            ValueError,
            r"simplices must be \[N, J \+ 1\] with J from 0 to 2",
        ),
        ({"simplices": torch.zeros(3, 3).int()}, TypeError, "simplices must be int64, got torch.int32"),
        ({"simplices": torch.tensor([[0, 1, 4]])}, ValueError, "name vertices 0 to 3, got 0 to 4"),
        ({"simplices": torch.tensor([[0, 1, -1]])}, ValueError, "name vertices 0 to 3, got -1 to 1"),
        (
            {"frequencies": torch.ones(5, 3)},
            ValueError,
            r"frequencies must be \[..., 2\] torch.float32, got \[5, 3\]",
        ),
        ({"frequencies": torch.ones(5, 2).double()}, ValueError, "got .* torch.float64"),
        ({"weights": torch.ones(2)}, ValueError, r"weights must be \[1\] or \[1, C\], got \[2\]"),
        (
            {"simplices": torch.tensor([[0, 1]]), "signed": True},
            ValueError,
            "signed needs simplices of 3 corners",
        ),
    ],
)
def test_what_does_not_fit_is_said(change, error, message):
    given = {
        "vertices": torch.rand(4, 2),
        "simplices": torch.tensor([[0, 1, 2]]),
        "frequencies": torch.ones(5, 2),
    }
    with pytest.raises(error, match=message):
        simplex_nuft(**(given | change))


def test_settings_that_do_not_fit_are_said():
    with pytest.raises(ValueError, match=r"shape must be 1 to 3 integers >= 1, got \(0, 2\)"):
        SimplexNUFT((0, 2))
    with pytest.raises(ValueError, match="period must be > 0 and smooth >= 0, got 0 and 0.0"):
        SimplexNUFT((4, 4), period=0)
    with pytest.raises(
        ValueError, match=r"vertices must be \[V, 2\] as the grid has 2 dimensions, got \[4, 3\]"
    ):
        SimplexNUFT((4, 4))(torch.rand(4, 3), torch.tensor([[0, 1, 2]]))
    with pytest.raises(ValueError, match="at least one node"):
        divided_exp(torch.ones(3, 0))
    with pytest.raises(TypeError, match="nodes must be float32 or float64, got torch.int64"):
        divided_exp(torch.ones(3).long())
