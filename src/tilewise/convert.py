"""Converting a pretrained model: its softmax attention replaced by a recurrence that learns from it.

The model's own weights stay as they are. For each layer a small part is trained in two stages: by what the layer's
attention gives for what it sees (attention transfer), then all together by the model's next-token distribution.
What is written is a file of these parts, which `tilewise compare --methods FILE` and `tilewise.patch` take.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from tilewise import papers
from tilewise.attention import attend
from tilewise.attention.gates import Gates
from tilewise.compare import Settings as CompareSettings
from tilewise.compare import material, quality
from tilewise.compare.material import Material
from tilewise.compare.settings import check_writable
from tilewise.data import tasks
from tilewise.descent import Descent, cosine
from tilewise.errors import UserError
from tilewise.models import capture, gated, load_gates, patch, save_gates

KINDS = ("lawcat",)  # as the register knows them
EVERY = 25  # steps between two savings
ASKED = 10  # pass keys at each length of the report
LONGER = (1, 2, 4, 8)  # lengths of the report, in those of the training


@dataclass(frozen=True)
class Settings:
    """What to convert, and how.

    Args:
        model: a directory, a hub id, or None for the bundled model. to: of KINDS. text: a file, or None for the
            bundled sample; its middle half is learnt from, and its last quarter measured.
        tokens: of a sequence of the training. batch: sequences of a step. steps: of both stages together.
        rate: of the first step of each stage. out: the file to write. device: where. seed: of all that is drawn.
        options: of the layers, such as `features`; by name.

    Raises UserError for values outside these.
    """

    model: str | None = None
    to: str = "lawcat"
    text: Path | None = None
    tokens: int = 512
    batch: int = 4
    steps: int = 400
    rate: float = 1e-2
    out: Path = Path("lawcat.safetensors")
    device: str = "cpu"
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.to not in KINDS:
            raise UserError(f"to must be one of {', '.join(KINDS)}, got {self.to!r}")
        for name, least in (("tokens", 128), ("batch", 1), ("steps", 2)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.rate < math.inf:
            raise UserError(f"rate must be a number > 0, got {self.rate:g}")
        check_writable(Path(self.out))

    @property
    def part(self) -> Path:
        """Where an interrupted conversion is kept."""
        return Path(self.out).with_name(Path(self.out).name + ".part")


class Conversion:
    """The training of converted layers; can be interrupted, saved and resumed.

    A step of the first stage takes the mean squared error of each layer's output, relative to the variance of dense
    attention's. One of the second takes the Kullback-Leibler divergence of the next token's distribution from the
    dense model's; where pass keys are asked for, their answers weigh as much as all the rest.

    Args:
        on: the model, and the text to learn from. layers: one for each of the model's. settings: as above.
    """

    def __init__(self, on: Material, layers: Gates, settings: Settings) -> None:
        self.on, self.layers, self.settings = on, layers, settings
        self.first = max(1, settings.steps // 4)
        self.losses: list[float] = []
        self._start(settings.rate)

    def _start(self, rate: float) -> None:
        """Begin a stage: its optimiser remembers nothing of the one before."""
        learned = [p for p in self.layers.parameters() if p.requires_grad]
        self.descent = Descent(self.layers, torch.optim.Adam(learned, lr=rate, betas=(0.9, 0.98)), clip=1.0)
        self.descent.losses = self.losses

    def run(
        self, until: int | None = None, progress: Callable[[int, float], None] | None = None
    ) -> list[float]:
        """Take steps up to the number `until`, by default all; `progress(step, loss)` is called after each.

        Returns the losses of all steps so far. Raises FloatingPointError when a loss is not finite; layers are then
        as after the last good step.
        """
        for step in range(len(self.losses), self.settings.steps if until is None else until):
            if step == self.first:
                self._start(0.3 * self.settings.rate)
            second = step >= self.first
            tokens, weights = self.batch(step)
            loss = self.divergence(tokens, weights) if second else self.transfer(tokens)
            begun, length = (self.first, self.settings.steps - self.first) if second else (0, self.first)
            warm = min(1.0, (step - begun + 1) / 10)
            found = self.descent.step(loss, warm * cosine((step - begun) / max(1, length)))
            if progress is not None:
                progress(step, found)
        return self.losses

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Sequences of a step, int64 `[batch, tokens]`, and how much their predictions weigh, `[batch, tokens -
        1]`.

        Every other sequence has a pass key hidden in it.
        """
        settings = self.settings
        rng = random.Random(f"{settings.seed} {step}")
        rows, weights = [], []
        for number in range(settings.batch):
            if (step * settings.batch + number) % 2:
                rows.append(self._asking(rng))
            else:
                ids = self.on.tokens[0]
                start = rng.randrange(max(1, len(ids) - settings.tokens))
                rows.append((ids[start : start + settings.tokens], ()))
        for row, answers in rows:
            weight = torch.ones(settings.tokens - 1, device=row.device)
            for first, last in answers:
                weight[first - 1 : last - 1] = (settings.tokens - 1) / (last - first)
            weights.append(weight)
        return torch.stack([row for row, _ in rows]), torch.stack(weights)

    def _asking(self, rng: random.Random) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
        """A pass key in a text of the right length: its tokens and where the answer stands."""
        wanted, on = self.settings.tokens, self.on
        size = int(wanted * (1.0 if on.bytes_per_token == 1 else 0.8 * on.bytes_per_token))
        example = tasks.passkey(max(128, size), rng.randrange(1 << 30), filler=on.filler)
        question = quality.question(on, "passkey", wanted, example, example.spans)
        ids = torch.tensor(question.tokens, device=on.device)
        cut = max(0, len(ids) - wanted)  # what stands at the very beginning is filler
        spans = tuple((first - cut, last - cut) for first, last in question.answers)
        ids = ids[cut:]
        missing = wanted - len(ids)
        if missing:  # more filler before
            ids = torch.cat((on.tokens[0, :missing], ids))
            spans = tuple((first + missing, last + missing) for first, last in spans)
        return ids, spans

    def transfer(self, tokens: Tensor) -> Tensor:
        """Mean over layers of the relative squared error."""
        seen = capture(self.on.model, tokens, layers=self.layers.layers)
        losses = []
        for layer, (q, k, v) in seen.items():
            with torch.no_grad():
                want = attend(q, k, v, mask="causal")
            got = attend(q, k, v, self.layers[layer].method(), mask="causal")
            losses.append((got - want).square().mean() / want.var())  # type: ignore[operator,union-attr]
        return torch.stack(losses).mean()

    def divergence(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Mean Kullback-Leibler divergence from the dense model, weighted."""
        with torch.no_grad():
            want = _log_probabilities(self.on.model, tokens)
        with patch(self.on.model, gated(self.layers), check=False):
            got = _log_probabilities(self.on.model, tokens)
        each = (want.exp() * (want - got)).sum(-1)
        return (each * weights).sum() / weights.sum()

    def state_dict(self) -> dict[str, Any]:
        """With it a new `Conversion` of the same arguments goes on bit for bit."""
        return self.descent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises RuntimeError for layers of other sizes."""
        if len(state["losses"]) > self.first:
            self._start(0.3 * self.settings.rate)
        self.descent.load_state_dict(state)


def _log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)


def new_layers(model: Any, settings: Settings) -> Gates:
    """Untrained layers for each of a model's. Raises UserError for options that they do not take."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    given, kind = {"rotary": rotary, **settings.options}, cast(Any, papers.resolve(papers.find(settings.to)))
    try:
        made = {
            layer: kind(heads, kv_heads, head_dim, seed=settings.seed + layer, **given)
            for layer in range(config.num_hidden_layers)
        }
    except (TypeError, ValueError) as error:
        raise UserError(f"options do not suit {settings.to}: {error}") from error
    return Gates(made).to(model.device)


def run_convert(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Convert, write the file, and show what was recovered; returns what was measured.

    An interrupted run goes on where it was when started again with the same arguments. Raises UserError for
    anything the caller got wrong, before training; a KeyboardInterrupt is raised again once the state is kept.
    """
    console = console or Console()
    learn, held = _parts(whole := _whole(settings), settings)
    conversion = Conversion(learn, new_layers(whole.model, settings), settings)
    if settings.part.is_file():
        _resume(conversion, settings.part)
        console.print(f"goes on at step {len(conversion.losses)}", highlight=False)
    frozen = [p for p in whole.model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with _progress(console) as progress:
            task = progress.add_task(
                "converting", total=settings.steps, completed=len(conversion.losses), loss=""
            )
            shown = lambda step, loss: progress.update(task, advance=1, loss=f"{loss:.3f}")  # noqa: E731
            while len(conversion.losses) < settings.steps:
                conversion.run(min(settings.steps, len(conversion.losses) + EVERY), shown)
                torch.save(conversion.state_dict(), settings.part)
    except KeyboardInterrupt:
        if conversion.losses:
            torch.save(conversion.state_dict(), settings.part)
            console.print(f"kept step {len(conversion.losses)} in {settings.part}", highlight=False)
        raise
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    save_gates(conversion.layers, settings.out)
    settings.part.unlink(missing_ok=True)
    console.print(f"wrote {settings.out}", markup=False, highlight=False, soft_wrap=True)
    found = recovery(held, load_gates(settings.out, model=whole.model), settings)
    _show(found, console)
    return found


def measured_on(settings: Settings) -> Material:
    """The model and the part of the text that conversions are measured on."""
    return _parts(_whole(settings), settings)[1]


def _whole(settings: Settings) -> Material:
    return material.prepare(
        CompareSettings(
            model=settings.model, text=settings.text, tokens=None, device=settings.device, methods=("dense",)
        )
    )


def _resume(conversion: Conversion, path: Path) -> None:
    try:
        conversion.load_state_dict(torch.load(path, weights_only=True))
    except (RuntimeError, KeyError, ValueError, EOFError) as error:
        raise UserError(
            f"{str(path)!r} is not of this conversion ({str(error).splitlines()[0]}); remove it to begin anew"
        ) from error


def _parts(whole: Material, settings: Settings) -> tuple[Material, Material]:
    """The middle half of the text to learn from, the last quarter to measure on."""
    text = material.read_text(settings.text)
    ids = whole.tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"]
    n = ids.shape[1]
    if n < 8 * settings.tokens:
        raise UserError(f"the text has {n} tokens, {8 * settings.tokens} are needed: eight sequences")
    if settings.tokens > whole.context:
        raise UserError(f"tokens is {settings.tokens}, but the model's context is {whole.context}")
    made = []
    for first, last in ((n // 4, 3 * n // 4), (3 * n // 4, n)):
        share = slice(len(whole.filler) * first // n, len(whole.filler) * last // n)
        made.append(
            Material(
                whole.model, whole.tokenizer, ids[:, first:last].to(whole.device), "", whole.context,
                whole.bytes_per_token, whole.filler[share],
            )
        )  # fmt: skip
    return made[0], made[1]


@torch.inference_mode()
def recovery(on: Material, layers: Gates, settings: Settings) -> dict[str, Any]:
    """Bits per byte and pass keys found by the dense and the converted model, at growing lengths.

    Returns {"lengths": [...], "dense": [{"bits_per_byte", "passkey"}, ...], "converted": [...]}: one entry for each
    length that the model's context and the text allow.
    """
    lengths = [
        settings.tokens * by for by in LONGER if settings.tokens * by <= min(on.context, on.tokens.shape[1])
    ]
    rows: dict[str, Any] = {"lengths": lengths, "dense": [], "converted": []}
    for name, method in (("dense", "dense"), ("converted", gated(layers))):
        with patch(on.model, method, check=name != "dense"):
            for length in lengths:
                right = [all(quality.answer(on, question)) for question in questions(on, length)]
                rows[name].append(
                    {"bits_per_byte": bits_per_byte(on, length), "passkey": sum(right) / max(1, len(right))}
                )
    return rows


def questions(on: Material, length: int) -> Iterator[quality.Question]:
    """Pass keys in so many tokens of text, at all depths."""
    size = int(length * (1.0 if on.bytes_per_token == 1 else 0.8 * on.bytes_per_token))
    for number in range(ASKED):
        example = tasks.passkey(size, 1000 + number, number / max(1, ASKED - 1), filler=on.filler)
        question = quality.question(on, "passkey", length, example, example.spans)
        if len(question.tokens) <= on.context and question.answers:
            yield question


def bits_per_byte(on: Material, length: int) -> float:
    """Bits per byte of the first `length` tokens."""
    tokens = on.tokens[:, :length]
    logits = _log_probabilities(on.model, tokens)
    found = -logits.gather(2, tokens[:, 1:].unsqueeze(2)).mean().item()
    return found / math.log(2) / on.bytes_per_token


def _show(found: dict[str, Any], console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("tokens", "bits/byte dense", "converted", "pass keys dense", "converted"):
        table.add_column(column, justify="right")
    for length, dense, converted in zip(found["lengths"], found["dense"], found["converted"]):
        bits = [f"{row['bits_per_byte']:.3f}" for row in (dense, converted)]
        keys = [f"{row['passkey']:.0%}" for row in (dense, converted)]
        table.add_row(f"{length:,}", *bits, *keys)
    console.print(table)


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
    )  # fmt: skip
    return Progress(*columns, console=console, transient=True)
