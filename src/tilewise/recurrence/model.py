"""Small language models from any mixers: one block, one config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.mixer import Mixer
from tilewise.recurrence.state import Carried
from tilewise.recurrence.ternary import BitLinear

LINEARS: dict[str, Callable[..., nn.Linear]] = {"dense": nn.Linear, "ternary": BitLinear}
MIXERS: dict[str, Callable[..., Mixer]] = {}  # by name; a mixer's module adds itself


def mixer(name: str) -> Callable:
    """Class decorator that makes a mixer known to `ModelConfig` by `name`."""

    def known(kind: Callable[..., Mixer]) -> Callable[..., Mixer]:
        MIXERS[name] = kind
        return kind

    return known


@dataclass(frozen=True)
class ModelConfig:
    """What a small language model is made of.

    Args:
        vocabulary: tokens known. width: of the residual stream.
        layers: a mixer's name for each layer, so hybrids are sequences such as ("kda", "kda", "kda",
            "attention"); or a name with settings of that layer alone, such as ("attention", {"window": 64}).
        options: settings of each named mixer, such as {"gla": {"heads": 4}}; a layer's own go before them.
        hidden: of the channel mixer (SwiGLU); None is 8/3 of the width, 0 leaves channel mixers out.
        tied: whether the output layer shares the embedding's weights.
        linear: "dense", or "ternary" for `BitLinear` in channel mixers and in the output layer, which is then not
            tied. Mixers have settings of their own.
        logit_cap: keeps logits smoothly within this size, `cap * tanh(logits / cap)`; None leaves them.

    Raises ValueError for unknown mixers and sizes below 1.
    """

    vocabulary: int
    width: int
    layers: tuple[str | tuple[str, Mapping[str, Any]], ...]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    hidden: int | None = None
    tied: bool = True
    linear: str = "dense"
    logit_cap: float | None = None

    def __post_init__(self) -> None:
        for name in ("vocabulary", "width"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        unknown = [
            name for name in (*(name for name, _ in self.parts()), *self.options) if name not in MIXERS
        ]
        if unknown or not self.layers:
            raise ValueError(f"layers must be of {', '.join(sorted(MIXERS))}, got {unknown or 'none'}")
        if self.linear not in LINEARS:
            raise ValueError(f"linear must be one of {', '.join(map(repr, LINEARS))}, got {self.linear!r}")
        if self.linear == "ternary" and self.tied:
            raise ValueError("a ternary output layer cannot share the embedding's weights: give tied=False")
        if self.logit_cap is not None and not self.logit_cap > 0:
            raise ValueError(f"logit_cap must be None or above 0, got {self.logit_cap!r}")

    def parts(self) -> list[tuple[str, dict[str, Any]]]:
        """The mixer's name and its settings, for each layer."""
        given = [(layer, {}) if isinstance(layer, str) else layer for layer in self.layers]
        return [(name, {**self.options.get(name, {}), **own}) for name, own in given]


class SwiGLU(nn.Module):
    """Channel mixer: `down(silu(gate(x)) * up(x))`, with linear layers of a kind of `LINEARS`."""

    def __init__(self, width: int, hidden: int, linear: str = "dense") -> None:
        super().__init__()
        made = LINEARS[linear]
        self.gate, self.up = made(width, hidden, bias=False), made(width, hidden, bias=False)
        self.down = made(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x + mixer(norm(x)), then x + channel(norm(x)); `channel` may be None."""

    def __init__(self, width: int, mixer: Mixer, channel: nn.Module | None) -> None:
        super().__init__()
        self.norm, self.mixer = nn.RMSNorm(width, eps=1e-5), mixer
        self.channel_norm = None if channel is None else nn.RMSNorm(width, eps=1e-5)
        self.channel = channel

    def forward(self, x: Tensor, state: Carried | None, **packing) -> tuple[Tensor, Carried]:
        mixed, state = self.mixer(self.norm(x), state, **packing)
        x = x + mixed
        if self.channel is not None and self.channel_norm is not None:
            x = x + self.channel(self.channel_norm(x))
        return x, state


class SequenceModel(nn.Module):
    """A language model of any mixers, with one state for each layer.

    `forward` takes tokens int64 `[B, N]`, the states of an earlier call or None, `mask` and `cu_seqlens` as
    mixers do, and gives logits `[B, N, vocabulary]` and the states. Split a sequence anywhere and hand the
    states on.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden = round(8 * config.width / 3) if config.hidden is None else config.hidden
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList()
        for name, settings in config.parts():
            made = MIXERS[name](config.width, **settings)
            channel = SwiGLU(config.width, hidden, config.linear) if hidden else None
            self.blocks.append(Block(config.width, made, channel))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.head = LINEARS[config.linear](config.width, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        states: Sequence[Carried | None] | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, list[Carried]]:
        if states is None:
            states = [None] * len(self.blocks)
        if len(states) != len(self.blocks):
            raise ValueError(f"states must be one for each of {len(self.blocks)} layers, got {len(states)}")
        x, after = self.embedding(tokens), []
        for block, state in zip(self.blocks, states):
            x, state = block(x, state, mask=mask, cu_seqlens=cu_seqlens)
            after.append(state)
        logits, cap = self.head(self.norm(x)), self.config.logit_cap
        return (logits if cap is None else cap * torch.tanh(logits / cap)), after

    def generate(
        self,
        tokens: Tensor,
        count: int,
        *,
        mask: Tensor | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Tensor:
        """The next `count` tokens of each row, int64 `[B, count]`: the likeliest, or drawn at a temperature
        above 0. `mask` is False for padding of the prompts, on either side."""
        return generated(self, tokens, count, mask=mask, temperature=temperature, seed=seed)


@torch.no_grad()
def generated(
    model: nn.Module,
    tokens: Tensor,
    count: int,
    *,
    mask: Tensor | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Tokens int64 `[B, count]` that continue each row of `tokens [B, N]`, one call of the model for each.

    `model(tokens, state, mask=...)` gives logits and the state, as `SequenceModel` does. Raises ValueError
    for a prompt without a token.
    """
    if not tokens.shape[1] or (mask is not None and not bool(mask.any(1).all())):
        raise ValueError("tokens must hold a token in each row to continue, got a row of none")
    generator = torch.Generator(tokens.device).manual_seed(seed)
    logits, state = model(tokens, mask=mask)
    last = logits[:, -1]
    if mask is not None:
        place = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        last = logits[torch.arange(len(logits), device=mask.device), place]
    made = []
    for _ in range(count):
        if temperature > 0:
            weights = (last.float() / temperature).softmax(-1)
            chosen = torch.multinomial(weights, 1, generator=generator)
        else:
            chosen = last.float().argmax(-1, keepdim=True)
        made.append(chosen)
        if len(made) < count:
            logits, state = model(chosen, state)
            last = logits[:, -1]
    return torch.cat(made, 1) if made else tokens[:, :0]
