"""Hybrids: mostly a fixed state, and here and there attention."""

from __future__ import annotations

from typing import Any

from tilewise.recurrence.model import ModelConfig


def kimi_linear(
    vocabulary: int, width: int, blocks: int = 1, heads: int = 4, latent: int | None = None
) -> ModelConfig:
    """The layers of Kimi Linear: three of KDA and one of MLA, again and again (Kimi Team, 2025, arXiv 2510.26692).

    MLA has no positions; what is told of order comes from KDA. Only the MLA layers keep a cache that grows, a
    quarter of what MLA alone would keep.

    Args:
        vocabulary, width: of the model. blocks: of four layers. heads: of both mixers. latent: width of MLA's
            latent; None is twice the size of a head.

    Differs from the paper's model in its channel mixers, which are SwiGLU and not experts, and in the size of
    everything. Give it to `SequenceModel`. Raises ValueError for a number of blocks below 1.
    """
    options: dict[str, dict[str, Any]] = {
        "kda": {"heads": heads},
        "mla": {"heads": heads, "latent": latent, "rope_dim": 0},
    }
    return ModelConfig(vocabulary, width, ("kda", "kda", "kda", "mla") * _positive(blocks), options)


def infinite_vl(
    vocabulary: int,
    width: int,
    blocks: int = 1,
    heads: int = 4,
    kv_heads: int | None = None,
    window: int = 8192,
) -> ModelConfig:
    """The decoder of InfiniteVL: one sliding-window layer and three of Gated DeltaNet, again and again (Tao et al.,
    2025, arXiv 2512.08829).

    Windows read what is near exactly, states carry what is far, and memory is constant however long the stream.

    Args:
        vocabulary, width: of the model. blocks: of four layers, 9 in the paper. heads: of both mixers. kv_heads:
            of the windows' keys and values; None is as many. window: tokens seen by the windows, 8,192 in the
            paper's code.

    Differs from the paper's model in having no vision encoder: images and frames are whatever the caller embeds.
    Positions are those of text, not by axis. Give it to `SequenceModel`. Raises ValueError for a number of blocks
    below 1.
    """
    options: dict[str, dict[str, Any]] = {
        "sliding-window": {"heads": heads, "kv_heads": kv_heads, "window": window},
        "gated-delta-net": {"heads": heads},
    }
    layers = ("sliding-window", "gated-delta-net", "gated-delta-net", "gated-delta-net")
    return ModelConfig(vocabulary, width, layers * _positive(blocks), options)


def _positive(blocks: int) -> int:
    if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 1:
        raise ValueError(f"blocks must be an integer >= 1, got {blocks!r}")
    return blocks
