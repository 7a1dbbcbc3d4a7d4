"""ScatterFormer: linear attention within windows of any number of voxels, all windows as one sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.checks import check_offsets
from tilewise.recurrence.mixer import check_width, wide
from tilewise.recurrence.voxel_conv import SubmanifoldConv3d, on_features
from tilewise.recurrence.voxel_windows import Lineup, windows
from tilewise.recurrence.voxels import Voxels


def scattered_attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *, chunk: int = 32) -> Tensor:
    """Linear attention of tokens within their own window, windows of any lengths one behind the other.

        o_i = sum_j (q_i . k_j) v_j / sum_j q_i . k_j,  over all j of i's window (not only those before it)

    Every window's sums of `k v^T` and of k are gathered from chunks of its tokens, and each chunk of queries
    reads its own window's. A chunk belongs to one window, so a window is padded to a multiple of `chunk`, not
    to the longest. Time and memory go with tokens plus windows.

    Args:
        q, k: `[M, H, D]`, not negative, of one floating dtype; v: `[M, H, E]`. Sorted by window.
        offsets: int `[W + 1]`: window w is tokens offsets[w] to offsets[w + 1] - 1. Empty ones are legal.
        chunk: tokens of a chunk.

    Returns:
        `[M, H, E]` in v's dtype, accumulated in float32 (float64 for float64). Where the denominator is 0 so
        is the result.

    Raises ValueError and TypeError for shapes, dtypes and offsets that do not fit.
    """
    if not (q.ndim == v.ndim == 3 and q.shape == k.shape and q.shape[:2] == v.shape[:2]):
        raise ValueError(
            "q, k [M, H, D] and v [M, H, E] do not fit:"
            f" got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
        raise ValueError(f"chunk must be an integer >= 1, got {chunk!r}")
    bounds = check_offsets(offsets, None, q.transpose(0, 1).unsqueeze(0))
    if bounds is None:
        raise TypeError("offsets must be an integer tensor [W + 1], got None")
    owner, places, real = _chunks(bounds, chunk)
    keys, queries = _cut(wide(k), places, real), _cut(wide(q), places, real)  # [c, h, t, d]
    values = _cut(F.pad(wide(v), (0, 1), value=1.0), places, real)  # a 1 behind each, which sums the keys
    sums = keys.new_zeros(len(bounds) - 1, keys.shape[1], keys.shape[3], values.shape[3])
    sums = sums.index_add(0, owner, keys.mT @ values)
    read = (queries @ sums.index_select(0, owner)).transpose(1, 2)[real]  # [m, h, e + 1]
    below = read[..., -1:]
    nothing = below == 0
    return (read[..., :-1] / below.masked_fill(nothing, 1)).masked_fill(nothing, 0).to(v.dtype)


def _chunks(bounds: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The window of each of C chunks; int64 `[C, chunk]` tokens, and which of them are the window's own."""
    lengths = bounds[1:] - bounds[:-1]
    count = (lengths + chunk - 1).div(chunk, rounding_mode="floor")
    owner = torch.arange(len(lengths), device=bounds.device).repeat_interleave(count)
    first = (count.cumsum(0) - count)[owner]
    start = bounds[owner] + chunk * (torch.arange(len(owner), device=bounds.device) - first)
    places = start.unsqueeze(1) + torch.arange(chunk, device=bounds.device)
    return owner, places, places < bounds[owner + 1].unsqueeze(1)


def _cut(x: Tensor, places: Tensor, real: Tensor) -> Tensor:
    """`[M, H, D]` as `[C, H, chunk, D]`, zeros where a window has no token left."""
    if not len(x):
        return x.new_zeros(0, x.shape[1], places.shape[1], x.shape[2])
    found = x.index_select(0, places.clamp(max=len(x) - 1).flatten()).unflatten(0, places.shape)
    return found.masked_fill(~real.view(*real.shape, 1, 1), 0).transpose(1, 2)


class ScatteredLinearAttention(nn.Module):
    """Scattered Linear Attention, of ScatterFormer (He et al., 2023, arXiv 2401.00912).

    Queries and keys are `relu` of projections of each voxel; every head is linear attention within the
    voxel's window (`scattered_attention`), all windows at once, however unlike in length.

    Args:
        width: of the features. heads: their number. chunk: voxels of a chunk, 32 in the authors' kernels.

    `forward` takes voxels' features `[M, width]` and the `Lineup` that sorts them by window
    (`tilewise.recurrence.windows`), and gives `[M, width]`, in the voxels' own order.

    Differs from the authors' code in the denominator, to which they add 1e-6.

    Raises ValueError for sizes that do not divide.
    """

    def __init__(self, width: int, heads: int = 4, chunk: int = 32) -> None:
        super().__init__()
        check_width(width, heads)
        self.heads, self.chunk = heads, chunk
        self.parts = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, lineup: Lineup) -> Tensor:
        lined = lineup.line_up(self.parts(x)).unflatten(1, (3, self.heads, -1))
        q, k, v = lined.unbind(1)
        read = scattered_attention(F.relu(q), F.relu(k), v, lineup.offsets, chunk=self.chunk)
        return self.out(lineup.put_back(read.flatten(1)))


class CrossWindow(nn.Module):
    """Cross-window interaction: long thin depthwise convolutions that reach into the next windows, then an
    MLP.

    A quarter of the channels is convolved over 3 x 3 x 3 cells, one along x and one along y over a window's
    length and one cell (made odd), one is left. Voxels of windows that touch so meet without the windows
    being shifted.

    Args:
        width: of the features, a multiple of 4. window: (z, y, x) cells of a window.
        across: False replaces the three convolutions by scales of each voxel's own channels: the control.

    Differs from the authors' code in layer norms for batch norms.

    Raises ValueError for other widths.
    """

    def __init__(self, width: int, window: tuple[int, int, int], across: bool = True) -> None:
        super().__init__()
        check_width(width, 4)
        part, (_, tall, long) = width // 4, window
        kernels = ((3, 3, 3), (1, 1, long // 2 * 2 + 1), (1, tall // 2 * 2 + 1, 1))
        self.convs = nn.ModuleList(
            SubmanifoldConv3d(part, part, kernel if across else (1, 1, 1), depthwise=True)
            for kernel in kernels
        )
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, voxels: Voxels) -> Voxels:
        x = self.norm(voxels.features)
        *parts, rest = x.chunk(4, 1)
        seen = [conv(voxels.with_features(part)).features for conv, part in zip(self.convs, parts)]
        x = x + torch.cat((*seen, rest), 1)
        return voxels.with_features(x + self.mlp(self.mlp_norm(x)))


class ScatterFormer(nn.Module):
    """A stage of ScatterFormer: layers of attention within windows and interaction across them.

    Args:
        width: of the features. layers, heads: their numbers. window: (z, y, x) cells; the authors' windows
            are 12 x 12 cells and as high as the grid. across: False leaves out what crosses windows: the
            control.

    `forward` takes and gives `Voxels` of `width` features. Windows are sorted once for all layers and never
    shifted.
    """

    def __init__(
        self,
        width: int,
        layers: int = 3,
        heads: int = 4,
        window: tuple[int, int, int] = (32, 12, 12),
        across: bool = True,
    ) -> None:
        super().__init__()
        self.window = window
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.attentions = nn.ModuleList(ScatteredLinearAttention(width, heads) for _ in range(layers))
        self.crossings = nn.ModuleList(CrossWindow(width, window, across) for _ in range(layers))
        self.last = nn.LayerNorm(width)

    def forward(self, voxels: Voxels) -> Voxels:
        lineup = windows(voxels, self.window)
        for norm, attention, crossing in zip(self.norms, self.attentions, self.crossings):
            x = voxels.features
            voxels = crossing(voxels.with_features(x + attention(norm(x), lineup)))
        return on_features(self.last, voxels)
