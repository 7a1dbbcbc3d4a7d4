"""The small trained models of the evidence on decays, their data and their measures.

`training/train_decays.py` makes the weights; the tests load them and measure on data drawn anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence import (
    TNL,
    MLSTMSig,
    ModelConfig,
    SequenceModel,
    TransNormer,
    scan,
)
from tilewise.recurrence.mixer import MixerState, from_heads, to_heads, wide

WEIGHTS = Path(__file__).parent / "weights"
SAMPLE = Path(__file__).parents[2] / "src/tilewise/data/sample.txt"
BYTES = 128  # the sample is nearly all ASCII; what is beyond is taken for the last byte
KEYS, VALUES = 8, 4  # of the dictionary that resets
SYMBOLS = 8  # of the ciphers


class MLSTMExp(MLSTMSig):
    """The same mixer with exponential input gates, a normaliser and a running maximum: what MLSTMSig replaces."""

    def forward(self, x, state=None, *, mask=None, cu_seqlens=None):
        q, k, v = (to_heads(part(x), self.heads) for part in (self.query, self.key, self.value))
        out, after = scan(
            q, k, v, decay=F.logsigmoid(wide(self.forget(x))).mT, log_beta=wide(self.input(x)).mT,
            normalize="bounded", state=None if state is None else state.scan, mask=mask, cu_seqlens=cu_seqlens,
            return_state=True,
        )  # fmt: skip
        return self.out(from_heads(self.norm(out)) * self.gate(x).sigmoid()), MixerState(after)


class Ungated(MLSTMSig):
    """The same mixer with gates that do not depend on the token and forget nothing."""

    def forward(self, x, state=None, *, mask=None, cu_seqlens=None):
        q, k, v = (to_heads(part(x), self.heads) for part in (self.query, self.key, self.value))
        out, after = scan(
            q, k, v, state=None if state is None else state.scan, mask=mask, cu_seqlens=cu_seqlens,
            return_state=True,
        )  # fmt: skip
        return self.out(from_heads(self.norm(out)) * self.gate(x).sigmoid()), MixerState(after)


def _mlstm(kind: Callable[..., nn.Module]) -> SequenceModel:
    model = SequenceModel(ModelConfig(BYTES, 48, ("mlstm-sig", "mlstm-sig"), hidden=96))
    for block in model.blocks:
        block.mixer = kind(48)
    return model


def _norm(layers: int, denominator: bool) -> SequenceModel:
    options = {"norm-attention": {"denominator": denominator}}
    return SequenceModel(ModelConfig(BYTES, 40, ("norm-attention",) * layers, options, 80))


def gla(vocabulary: int, fixed: bool = False, temper: float = 16.0, tied: bool = True) -> SequenceModel:
    """`fixed`: each channel learns a decay that is the same at every token."""
    options = {"gla": {"heads": 2, "rank": 8, "temper": temper}}
    model = SequenceModel(ModelConfig(vocabulary, 32, ("gla",) * 2, options, 64, tied))
    if fixed:
        for block in model.blocks:
            block.mixer.decay[0].weight.detach().zero_()
            block.mixer.decay[0].weight.requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], SequenceModel]] = {
    "tnl": lambda: TNL(BYTES, 40, 3, hidden=96),
    "tnl-no-decay": lambda: TNL(BYTES, 40, 3, hidden=96, decay=False),
    "transnormer": lambda: TransNormer(BYTES, 40, 4, block=32, hidden=80),
    "transnormer-global": lambda: _norm(4, denominator=False),
    "transnormer-denominator": lambda: _norm(4, denominator=True),
    "mlstm-sig": lambda: _mlstm(MLSTMSig),
    "mlstm-exp": lambda: _mlstm(MLSTMExp),
    "mlstm-ungated": lambda: _mlstm(Ungated),
    "gla-resets": lambda: gla(1 + KEYS * VALUES + KEYS, temper=2.0),
    "gla-resets-fixed": lambda: gla(1 + KEYS * VALUES + KEYS, temper=2.0, fixed=True),
    "gla-cipher": lambda: gla(SYMBOLS * SYMBOLS + SYMBOLS, tied=False),
}


def text(held_out: bool) -> Tensor:
    """Bytes of the bundled sample: the last eighth of it is held out."""
    data = torch.frombuffer(bytearray(SAMPLE.read_bytes()), dtype=torch.uint8).long().clamp(max=BYTES - 1)
    border = len(data) * 7 // 8
    return data[border:] if held_out else data[:border]


def excerpts(data: Tensor, count: int, length: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and the tokens after them, `[count, length]`."""
    starts = torch.randint(len(data) - length - 1, (count, 1), generator=gen)
    cut = data[starts + torch.arange(length + 1)]
    return cut[:, :-1], cut[:, 1:]


@torch.no_grad()
def bits_per_byte(model: SequenceModel, length: int = 512) -> float:
    """On the held-out text, cut into pieces of `length`."""
    data = text(held_out=True)
    count = (len(data) - 1) // length
    tokens, targets = data[: count * length].view(count, -1), data[1 : count * length + 1].view(count, -1)
    return float(F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())) / math.log(2)


def resets(count: int, length: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """A dictionary that is emptied at resets: tokens and targets `[count, length]`, -100 where nothing is asked.

    Token 0 empties it; 1 .. 32 write a value under a key, each key once between resets; the last 8 ask for a key,
    and the target is its value, or 4 if nothing was written under it since the last reset.
    """
    tokens, targets = torch.zeros(count, length, dtype=torch.int64), torch.full((count, length), -100)
    draws = torch.rand(count, length, 3, generator=gen).tolist()
    for b in range(count):
        held: dict[int, int] = {}
        for t in range(length):
            kind, x, y = draws[b][t]
            free = [key for key in range(KEYS) if key not in held]
            if kind < 0.06:
                held = {}
            elif kind < 0.5 and free:
                key, value = free[int(x * len(free))], int(y * VALUES)
                held[key] = value
                tokens[b, t] = 1 + key * VALUES + value
            else:
                key = int(x * KEYS)
                tokens[b, t], targets[b, t] = 1 + KEYS * VALUES + key, held.get(key, VALUES)
    return tokens, targets


def voices(count: int, gen: torch.Generator) -> Tensor:
    """Ciphers: what each symbol is turned into, any of 8^8 mappings, int64 `[count, SYMBOLS]`."""
    return torch.randint(SYMBOLS, (count, SYMBOLS), generator=gen)


def spoken(ciphers: Tensor, length: int, gen: torch.Generator, shown: int = 0) -> tuple[Tensor, Tensor]:
    """Sequences in the given voices `[B, SYMBOLS]`: tokens and targets `[B, shown + length]`.

    Each of the first `shown` tokens shows a symbol and its cipher, and nothing is asked (the target is -100); the
    others are symbols whose cipher is asked for.
    """
    count, n = len(ciphers), shown + length
    plain = torch.randint(SYMBOLS, (count, n), generator=gen)
    made = ciphers.gather(1, plain)
    show = (torch.arange(n) < shown).expand(count, n)
    tokens = torch.where(show, plain * SYMBOLS + made, SYMBOLS * SYMBOLS + plain)
    return tokens, made.masked_fill(show, -100)


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Of the tokens at which something is asked."""
    asked = targets >= 0
    return float((logits.argmax(-1) == targets)[asked].double().mean())


def load(name: str) -> SequenceModel:
    """The trained model."""
    from safetensors.torch import load_file

    model = MODELS[name]()
    found = {key: x.float() for key, x in load_file(WEIGHTS / f"{name}.safetensors").items()}
    model.load_state_dict({"head.weight": found["embedding.weight"]} | found)
    return model.eval()
