"""Attention engines against PyTorch's own kernels: dense, and given tiles at several densities.

    python benchmarks/attention.py [--quick]

Contenders of a setting compute the same thing where the setting says so; "given tiles" computes less, which is
what it is for, so its ratio should come near 1 / density. Compilation of FlexAttention is not timed.
"""

from __future__ import annotations

import argparse
import sys

import harness
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import tilewise
from tilewise.attention import MoBA, XAttention, attend_tiles
from tilewise.tiles import TileMap

HEADS, KV_HEADS, D, TILE = 8, 8, 64, 128


def settings(n: int, flex: bool) -> list[harness.Row]:
    """All rows of one length."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, D) for heads in (HEADS, KV_HEADS, KV_HEADS))
    scores = HEADS * n * n
    full = 4 * scores * D  # multiply-adds of both products
    causal = {"sdpa": full / 2, "torch engine": full / 2 * (1 + TILE / n)}
    rows = harness.race(
        f"dense causal, N={n}",
        {
            "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
            "torch engine": lambda: tilewise.attend(q, k, v, mask="causal", engine="torch"),
        },
        causal,
    )
    for density in (0.125, 0.25):
        tiles = n // TILE
        keep = torch.zeros(1, HEADS, tiles, tiles, dtype=torch.bool)
        chosen = torch.rand(1, HEADS, tiles, tiles).topk(max(1, int(density * tiles)), -1).indices
        tile_map = TileMap.from_mask(keep.scatter_(3, chosen, True), (TILE, TILE))
        share = float(tile_map.keep.float().mean())
        contenders = {
            "sdpa, all tiles": lambda: scaled_dot_product_attention(q, k, v),
            "torch engine": lambda tile_map=tile_map: attend_tiles(q, k, v, tile_map, engine="torch"),
        }
        work = {"sdpa, all tiles": full, "torch engine": full * share, "flex, compiled": full * share}
        if flex:
            block_mask = _block_mask(tile_map, n)
            compiled = torch.compile(flex_attention, dynamic=False)
            contenders["flex, compiled"] = lambda f=compiled, m=block_mask: f(q, k, v, block_mask=m)
        rows += harness.race(f"given tiles {share:.1%}, no mask, N={n}", contenders, work)
    rows += harness.race(
        f"choosing and attending, causal, random q and k, N={n}",
        {
            "dense (sdpa)": lambda: tilewise.attend(q, k, v, mask="causal"),
            "moba, 8 of 128": lambda: tilewise.attend(q, k, v, MoBA(), mask="causal"),
            "xattention, mass 0.5": lambda: tilewise.attend(
                q, k, v, XAttention(threshold=0.5), mask="causal"
            ),
        },
        {},
    )
    return rows


def _block_mask(tile_map: TileMap, n: int) -> BlockMask:
    """FlexAttention's form of a tile map whose tiles are all visible in full."""
    keep = tile_map.keep
    count = keep.sum(-1, dtype=torch.int32)
    order = keep.int().argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return BlockMask.from_kv_blocks(
        torch.zeros_like(count), torch.zeros_like(order), count, order, BLOCK_SIZE=TILE, seq_lengths=(n, n)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short length, without FlexAttention")
    options = parser.parse_args()
    if not harness.tests_pass("tests/kernels", "tests/attention/test_api.py"):
        print("the engines' tests fail; nothing is timed")
        return 1
    with torch.inference_mode():
        rows = settings(1024, flex=False) if options.quick else settings(4096, True) + settings(8192, True)
    if not options.quick:
        harness.save("attention", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
