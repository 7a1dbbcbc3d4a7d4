"""The small Block Transformer of the evidence, and what it is measured against; `training/train_blocks.py`
trains them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.recurrence.decays import BYTES, WEIGHTS
from tilewise.recurrence import BlockTransformer, ModelConfig, SequenceModel, attention_mixer

WIDTH, BLOCK = 40, 4


def block(cut: bool = False) -> BlockTransformer:
    """Two layers below and two above; `cut`: without the block decoder's word, so that each block stands
    alone."""
    model = BlockTransformer(BYTES, WIDTH, (2, 2), block=BLOCK, prefix=2, hidden=2 * WIDTH)
    if cut:
        for part in model.expand.parameters():
            part.detach().zero_()
            part.requires_grad_(False)
    return model


def vanilla(layers: int, hidden: int, **options) -> SequenceModel:
    """A Transformer of as wide layers."""
    return SequenceModel(ModelConfig(BYTES, WIDTH, ("attention",) * layers, {"attention": options}, hidden))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "block": block,
    "block-cut": lambda: block(cut=True),
    "block-vanilla": lambda: vanilla(4, 2 * WIDTH),  # as many layers of one size
    # As many parameters, and no fewer bytes read from caches: one key and value of two numbers in each of 3 layers.
    "block-equal": lambda: vanilla(3, 4 * WIDTH, heads=20, kv_heads=1),
}


def load(name: str) -> nn.Module:
    """The trained model."""
    from safetensors.torch import load_file

    model = MODELS[name]()
    found = {key: x.float() for key, x in load_file(Path(WEIGHTS) / f"{name}.safetensors").items()}
    model.load_state_dict({"head.weight": found["embedding.weight"]} | found)
    return model.eval()


class Counted:
    """Bytes of keys and values read by attention while it is entered, from caches and anew."""

    def __init__(self) -> None:
        self.bytes = 0

    def __enter__(self) -> Counted:
        self.attend = attention_mixer.attend

        def counted(q: Tensor, k: Tensor, v: Tensor, **options):
            self.bytes += sum(x.numel() * x.element_size() for x in (k, v))
            return self.attend(q, k, v, **options)

        attention_mixer.attend = counted
        return self

    def __exit__(self, *_) -> None:
        attention_mixer.attend = self.attend


@torch.no_grad()
def read_per_token(model: nn.Module, context: int, count: int = 4 * BLOCK) -> float:
    """Bytes of keys and values that a token reads, of one sequence, mean over `count` behind `context`
    others."""
    tokens = torch.randint(BYTES, (1, context + count), generator=torch.Generator().manual_seed(0))
    _, state = model(tokens[:, :context])
    with Counted() as counted:
        for i in range(count):
            _, state = model(tokens[:, context + i : context + i + 1], state)
    return counted.bytes / count


def loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean over all targets, those in the first block too."""
    return F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())
