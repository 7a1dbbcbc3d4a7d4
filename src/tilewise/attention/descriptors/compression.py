"""How the tokens of frames become descriptors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tilewise.attention.descriptors.frames import cluster_frames

KINDS = ("bilinear", "nearest", "mean")


@dataclass(frozen=True, eq=False)
class Described:
    """The tokens that serve as keys and values, those of whole frames first.

    Attributes:
        tokens: `[B, K, C]`.
        places: int64 `[B|1, K, 2]`, row and column from 1; 0, 0 for special tokens.
        frame: int64 `[B|1, K]`, the frame each belongs to.
        staying: int64 `[R]`, numbers of those that stay in memory after their chunk.
        count: float32 `[K]`, how many tokens of its frame each stands for.
    """

    tokens: Tensor
    places: Tensor
    frame: Tensor
    staying: Tensor
    count: Tensor


@dataclass(frozen=True)
class Compression:
    """From frames of `special + H * W` tokens to descriptors (FlashVGGT; Wang and Xu, 2025, arXiv 2512.01540).

    Every frame gives its special tokens as they are and its `H x W` patch tokens resampled to
    `H // ratio x W // ratio`. A few frames give all their patch tokens besides: the first, which fixes the frame of
    reference, and key frames.

    Args:
        special: tokens at the start of each frame that are no patches (VGGT: one camera and four registers).
        ratio: of the resampling, per side; 1 leaves frames as they are.
        kind: "bilinear" (the paper's, without antialiasing: at even ratios the mean of the four patches in the
            middle of a cell), "nearest", or "mean" over cells, which the paper compares.
        reference: whether the first frame is kept whole.
        every: frames per key frame, found by clustering the frames' mean tokens; None has none. As in the authors'
            code fewer than two clusters are not worth clustering.
        retain: of every `retain` frames one stays in memory for later chunks.
        weigh: count each descriptor as many times as there are patches in its cell, by the log of their number
            added to its scores. Not in the paper, which trains with descriptors. Without rotation and with no frame
            kept whole, attention over frames that are constant within cells is then exact.

    Raises ValueError for settings out of range.
    """

    special: int = 5
    ratio: int = 4
    kind: str = "bilinear"
    reference: bool = True
    every: int | None = 200
    retain: int = 5
    weigh: bool = False

    def __post_init__(self) -> None:
        least = {"special": 0, "ratio": 1, "retain": 1}
        for name, low in least.items():
            if not isinstance(getattr(self, name), int) or getattr(self, name) < low:
                raise ValueError(f"{name} must be an integer >= {low}, got {getattr(self, name)!r}")
        if self.every is not None and (not isinstance(self.every, int) or self.every < 1):
            raise ValueError(f"every must be None or an integer >= 1, got {self.every!r}")
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")

    def coarse(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of a frame's descriptors; raises ValueError where `grid` has none."""
        if len(grid) != 2 or not all(isinstance(side, int) and side >= self.ratio for side in grid):
            raise ValueError(f"grid must be (H, W), both integers >= ratio {self.ratio}, got {grid!r}")
        return grid[0] // self.ratio, grid[1] // self.ratio

    def per_frame(self, grid: tuple[int, int]) -> int:
        """Keys that a frame gives when it is not kept whole."""
        rows, columns = self.coarse(grid)
        return self.special + rows * columns

    def retained(self, frames: int) -> int:
        """How many of so many frames stay in memory."""
        return -(-frames // self.retain)

    def scores(self, frames: int, grid: tuple[int, int], *, chunk: int | None = None, whole: int = 0) -> int:
        """Scores computed per head for so many frames, at once or in chunks; full attention has (S P)^2.

        `whole` counts key frames besides the reference, all of them there from the start.
        """
        patches = grid[0] * grid[1]
        per, full = self.per_frame(grid), (whole + self.reference) * patches
        total = 0
        for start in range(0, frames, chunk or max(frames, 1)):
            here = min(chunk or frames, frames - start)
            total += here * (self.special + patches) * (full + (self.retained(start) + here) * per)
        return total

    def resample(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """`[..., H * W, C]` to `[..., h * w, C]`, computed in float32 (float64 stays so)."""
        size = self.coarse(grid)
        if self.ratio == 1:
            return patches
        flat = patches.reshape(-1, *grid, patches.shape[-1]).permute(0, 3, 1, 2)
        wide = flat if flat.dtype == torch.float64 else flat.float()
        if not len(wide):
            return patches.new_zeros(*patches.shape[:-2], size[0] * size[1], patches.shape[-1])
        if self.kind == "mean":
            small = F.adaptive_avg_pool2d(wide, size)
        else:
            smooth = {"align_corners": False} if self.kind == "bilinear" else {}
            small = F.interpolate(wide, size, mode=self.kind, **smooth)
        return small.permute(0, 2, 3, 1).reshape(*patches.shape[:-2], size[0] * size[1], -1).to(patches.dtype)

    def places(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Row and column, from 1, of a frame's patches `[H * W, 2]` and of its descriptors `[h * w, 2]`.

        A descriptor's place is that of the nearest-neighbour resampling, as in the authors' code: the first patch
        of its cell.
        """
        fine = [torch.arange(side, device=device) for side in grid]
        coarse = [torch.arange(n, device=device) * side // n for n, side in zip(self.coarse(grid), grid)]
        return (torch.cartesian_prod(*fine) + 1, torch.cartesian_prod(*coarse) + 1)

    def describe(self, x: Tensor, grid: tuple[int, int], whole: Tensor, *, first: int = 0) -> Described:
        """Descriptors of `x [B, S, special + H * W, C]`, whose first frame is number `first` of the sequence.

        `whole` int64 `[B|1, n]` names the frames of `x` that give all their patches besides.
        """
        b, s, _, c = x.shape
        device, n = x.device, whole.shape[1]
        fine, coarse = self.places(grid, device)
        rows = torch.arange(b, device=device).unsqueeze(1)
        full = x[rows, whole.expand(b, -1), self.special :].flatten(1, 2)  # [B, n H W, C]
        small = torch.cat([x[:, :, : self.special], self.resample(x[:, :, self.special :], grid)], 2)
        each = torch.cat([coarse.new_zeros(self.special, 2), coarse])
        cells = (grid[0] * grid[1]) / len(coarse)
        counts = torch.cat(
            [torch.ones(self.special, device=device), torch.full((len(coarse),), cells, device=device)]
        )
        frame = torch.arange(s, device=device).repeat_interleave(len(each))
        of_whole = whole.repeat_interleave(len(fine), 1)
        ahead = of_whole.shape[1]
        starts = ahead + len(each) * torch.arange(s, device=device)[-first % self.retain :: self.retain]
        stays = starts.unsqueeze(1) + torch.arange(len(each), device=device)
        return Described(
            tokens=torch.cat([full, small.flatten(1, 2)], 1),
            places=torch.cat([fine.repeat(n, 1), each.repeat(s, 1)]).unsqueeze(0),
            frame=torch.cat([of_whole, frame.expand(len(whole), -1)], 1) + first,
            staying=torch.cat([torch.arange(ahead, device=device), stays.flatten()]),
            count=torch.cat([torch.ones(n * len(fine), device=device), counts.repeat(s)]),
        )

    def whole_frames(self, x: Tensor, first: int, keyframes: Tensor | None, cluster: bool) -> Tensor:
        """Frames of `x [B, S, P, C]` to keep whole, int64 `[B|1, n]`: the reference if it is there, and key frames.

        Raises ValueError or TypeError for key frames that are not distinct frames of `x`.
        """
        b, s = x.shape[:2]
        reference = torch.zeros(
            1, int(self.reference and first == 0 and s > 0), dtype=torch.int64, device=x.device
        )
        if keyframes is None:
            clusters = s // self.every if cluster and self.every is not None else 0
            if clusters <= 1:
                return reference
            keyframes = cluster_frames(x.mean(2), min(clusters, s - 1))
            return torch.cat([reference.expand(b, -1), keyframes], 1)
        keyframes = _check(keyframes, b, s).to(x.device)
        if reference.shape[1]:
            again = keyframes == 0
            if len(again.sum(1).unique()) > 1:
                raise ValueError(
                    "keyframes must name frame 0 in every batch entry or in none: it is kept in any case"
                )
            keyframes = keyframes[~again].view(len(keyframes), keyframes.shape[1] - int(again[:1].sum()))
        return torch.cat([reference.expand(len(keyframes), -1), keyframes], 1)


def _check(keyframes: Tensor, b: int, s: int) -> Tensor:
    """Key frames as `[B|1, n]`."""
    if not isinstance(keyframes, Tensor) or keyframes.dtype != torch.int64 or keyframes.ndim not in (1, 2):
        raise TypeError("keyframes must be None or an int64 tensor [n] or [B, n]")
    keyframes = keyframes.unsqueeze(0) if keyframes.ndim == 1 else keyframes
    if len(keyframes) not in (1, b):
        raise ValueError(f"keyframes must be [n] or [{b}, n], got {list(keyframes.shape)}")
    ordered = keyframes.sort(1).values
    inside = not ordered.numel() or (int(ordered.min()) >= 0 and int(ordered.max()) < s)
    if not inside or bool((ordered.diff(dim=1) == 0).any()):
        raise ValueError(f"keyframes must be distinct numbers in 0..{s - 1}, got {keyframes.tolist()}")
    return keyframes
