"""Windows of an image weighed by frequency, and attention within them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.mixer import check_width
from tilewise.transforms import dct


def check_grid(x: Tensor, width: int) -> Tensor:
    """ValueError unless x is `[B, H, W, width]`."""
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[3] != width:
        given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be [B, H, W, {width}], got {given}")
    return x


def to_windows(x: Tensor, side: int) -> Tensor:
    """`[B, H, W, C]` as windows `[B, H / side, W / side, side, side, C]`, repeating the last row and column where
    a side does not divide."""
    down, right = -x.shape[1] % side, -x.shape[2] % side
    if down or right:
        rows = torch.arange(x.shape[1] + down, device=x.device).clamp(max=x.shape[1] - 1)
        columns = torch.arange(x.shape[2] + right, device=x.device).clamp(max=x.shape[2] - 1)
        x = x[:, rows][:, :, columns]
    x = x.unflatten(2, (x.shape[2] // side, side)).unflatten(1, (x.shape[1] // side, side))
    return x.transpose(2, 3)


def from_windows(windows: Tensor, height: int, width: int) -> Tensor:
    """The way back of `to_windows`, without what it repeated."""
    return windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]


class AFMM(nn.Module):
    """Adaptive frequency modulation (Pan et al., 2025, arXiv 2511.20151).

    Windows pass a cosine transform; every frequency is multiplied by a weight from 0 to 2, which is a channel's
    own plus what a small net makes of the window's spectrum; the inverse transform and a linear layer follow.
    Weights begin at 1, where the module is its linear layer alone.

    `forward` takes `[B, H, W, width]` to its shape, any H and W (a window at the border repeats the last row).

    Args: width: channels. window: side of windows. hidden: of the net. adaptive: False leaves its answer out.

    Raises ValueError for sizes below 1. Differs from the paper in sizes, and in that the net sees the mean
    magnitude over channels.
    """

    basis: Tensor

    def __init__(self, width: int, window: int = 8, hidden: int = 16, adaptive: bool = True) -> None:
        super().__init__()
        for name, value in (("width", width), ("window", window), ("hidden", hidden)):
            check_width(value, 1, name)
        self.width, self.window, self.adaptive = width, window, adaptive
        # Both axes as one matrix: at such sizes far faster than by FFT.
        one = dct(torch.eye(window, dtype=torch.float64), 0)
        self.register_buffer("basis", torch.kron(one, one), persistent=False)
        self.weights = nn.Parameter(torch.zeros(window * window, width))
        last = nn.Linear(hidden, window**2)
        self.net = nn.Sequential(nn.Linear(window**2, hidden), nn.SiLU(), last)
        for part in last.parameters():
            nn.init.zeros_(part)
        self.out = nn.Linear(width, width)

    def spectrum(self, x: Tensor) -> Tensor:
        """The cosine transform of every window, `[B, h, w, window ** 2, width]`, the vertical frequency slowest."""
        windows = to_windows(check_grid(x, self.width), self.window)
        return self.basis.to(x.dtype) @ windows.flatten(3, 4)

    def image(self, spectrum: Tensor, height: int, width: int) -> Tensor:
        """What `spectrum` made it of, `[B, height, width, width]`."""
        found = (self.basis.mT.to(spectrum.dtype) @ spectrum).unflatten(3, (self.window, self.window))
        return from_windows(found, height, width)

    def modulation(self, spectrum: Tensor) -> Tensor:
        """The weights of a spectrum, broadcastable to it."""
        own = self.weights
        if self.adaptive:
            own = own + self.net(spectrum.abs().mean(4).log1p()).unsqueeze(4)
        return 2 * own.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        spectrum = self.spectrum(x)
        return self.out(self.image(spectrum * self.modulation(spectrum), *x.shape[1:3]))


class WindowAttention(nn.Module):
    """Softmax attention within windows, shifted by half of one or not, after Swin (arXiv 2103.14030).

    `forward` takes `[B, H, W, width]` to its shape. Positions are a bias for every difference of places. Windows
    that a shift wraps around the border attend within each part.
    """

    def __init__(self, width: int, heads: int, window: int, shifted: bool = False) -> None:
        super().__init__()
        check_width(width, heads)
        check_width(window, 1, "window")
        self.heads, self.window, self.shift = heads, window, window // 2 if shifted else 0
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(heads, (2 * window - 1) ** 2))

    def forward(self, x: Tensor) -> Tensor:
        side, (height, width) = self.window, x.shape[1:3]
        areas = torch.zeros(1, -(-height // side) * side, -(-width // side) * side, 1, device=x.device)
        areas[:, height:], areas[:, :, width:] = 1, 1  # padding is seen by padding alone
        x = F.pad(x, (0, 0, 0, areas.shape[2] - width, 0, areas.shape[1] - height))
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
            areas[:, : self.shift] += 2
            areas[:, :, : self.shift] += 4
            areas = areas.roll((-self.shift, -self.shift), (1, 2))
        tokens, area = (
            to_windows(x, side),
            to_windows(areas, side).flatten(3),
        )  # [b, h, w, s, s, c], [1, h, w, n]
        q, k, v = (
            self.qkv(tokens.flatten(3, 4)).unflatten(-1, (3, self.heads, -1)).permute(4, 0, 1, 2, 5, 3, 6)
        )
        same = area.unsqueeze(3) == area.unsqueeze(4)  # [1, h, w, n, n]
        bias = self.bias[:, self._differences(x.device)]  # [heads, n, n]
        mask = torch.where(same.unsqueeze(3), bias, -torch.inf).to(q.dtype)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(3, 4).flatten(4)
        made = from_windows(self.out(found).unflatten(3, (side, side)), *x.shape[1:3])
        if self.shift:
            made = made.roll((self.shift, self.shift), (1, 2))
        return made[:, :height, :width]

    def _differences(self, device) -> Tensor:
        """Which of the biases a pair of places has, `[n, n]`."""
        place = torch.arange(self.window, device=device)
        apart = place.unsqueeze(1) - place + self.window - 1  # [s, s]
        wide = apart[:, None, :, None] * (2 * self.window - 1) + apart[None, :, None, :]
        return wide.flatten(2).flatten(0, 1)


class FSTAM(nn.Module):
    """Attention within windows, then modulation of their frequencies, then a perceptron (arXiv 2511.20151).

    `forward` takes `[B, H, W, width]` to its shape. Args: width, heads, window, shifted: as of `WindowAttention`;
    hidden: of the perceptron, as a multiple of the width.
    """

    def __init__(
        self, width: int, heads: int = 2, window: int = 4, shifted: bool = False, hidden: int = 2
    ) -> None:
        super().__init__()
        self.attention = WindowAttention(width, heads, window, shifted)
        self.frequencies = AFMM(width, window)
        self.perceptron = nn.Sequential(
            nn.Linear(width, hidden * width), nn.GELU(), nn.Linear(hidden * width, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for norm, part in zip(self.norms, (self.attention, self.frequencies, self.perceptron)):
            x = x + part(norm(x))
        return x
