"""Distillation: a student that learns to answer as a frozen teacher does, and to do so inside as well."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tilewise.descent import Descent, cosine


class Pair(NamedTuple):
    """What a part of the teacher gave, without a graph, and what the student's part gave, with one."""

    teacher: Tensor
    student: Tensor


Pairs = dict[str, Pair]
Loss = Callable[[Pairs, Any], Tensor]


def distil(
    teacher: nn.Module,
    student: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    parts: Mapping[str, str] | Iterable[str] = (),
    inputs: Callable[[Any], tuple] | None = None,
    forced: bool = False,
    rate: float = 1e-3,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    clip: float | None = 1.0,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 100,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `student` on what `teacher` does with each batch, one step a batch.

    Args:
        teacher: never trained, run in evaluation mode without gradients and left as it was.
        student: its parameters that require gradients are trained; the rest and the buffers stay.
        batches: whatever `inputs` understands. A resumed run must be given the same batches again: those of
            steps already done are passed over. With a length, the rate falls along a cosine to 0 at its end.
        loss: `loss(pairs, batch)`, a scalar. `pairs[""]` are the models' outputs, `pairs[name]` a part's.
        parts: names of the teacher's submodules whose outputs are captured, as in `named_modules`, mapped to
            the student's; an iterable where both bear the same name. Of a tuple the first entry counts.
        inputs: the positional arguments of a batch; None: a tuple's entries, or the batch as the only one.
        forced: give each part of the student the very inputs that the teacher's part had, and do not run the
            student as a whole: parts learn side by side, none on another's mistakes. There is no `pairs[""]`.
        rate: of AdamW without decay. optimizer: made from the trained parameters, in its place.
        clip: largest norm of the gradient; None leaves it.
        seed: of what is random inside (dropout): step i runs under `seed + i`; the caller's generator stays.
        checkpoint: a file. When it exists training goes on from it; it is written every `every` steps and at
            the end.
        progress: called with each step's number, from 1, and its loss.

    Returns:
        The loss of every step, those before a resumption included.

    Raises:
        ValueError: names that do not exist, pairs of different shapes, a loss that is no scalar, a student
            with nothing to train or whose trained parameters are the teacher's own, a checkpoint of another
            student.
        FloatingPointError: a loss that is not finite; the student is then as after the last good step.
        TypeError: a part that gives no tensor.
    """
    named = dict(parts) if isinstance(parts, Mapping) else {name: name for name in parts}
    trained = _check(teacher, student, named, forced, rate, every)
    made = optimizer(trained) if optimizer else torch.optim.AdamW(trained, rate, weight_decay=0.0)
    descent = Descent(student, made, clip)
    _resume(checkpoint, descent)
    total = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    devices = sorted({p.device.index or 0 for p in trained if p.device.type == "cuda"})
    with _modes(teacher, student), torch.random.fork_rng(devices):
        done = len(descent.losses)
        for step, batch in enumerate(islice(iter(batches), done, None), done):
            torch.manual_seed(seed + step)
            arguments = _arguments(batch, inputs)
            value = loss(_found(teacher, student, named, arguments, forced), batch)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise ValueError(
                    f"loss must give a scalar, got {getattr(value, 'shape', type(value).__name__)}"
                )
            found = descent.step(value, cosine(step / total) if total else 1.0)
            if progress is not None:
                progress(step + 1, found)
            if checkpoint is not None and (step + 1) % every == 0:
                _save(checkpoint, descent)
        made.zero_grad(set_to_none=True)
    if checkpoint is not None and len(descent.losses) > done:
        _save(checkpoint, descent)
    return descent.losses


def _check(
    teacher: nn.Module, student: nn.Module, named: dict[str, str], forced: bool, rate: float, every: int
) -> list[nn.Parameter]:
    """The parameters that are trained."""
    for role, model, names in (("teacher", teacher, named), ("student", student, named.values())):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{role} must be a torch.nn.Module, got {type(model).__name__}")
        have = dict(model.named_modules())
        for name in names:
            if name not in have or not name:
                raise ValueError(f"parts names {name!r}, which the {role} does not have")
    if forced and not named:
        raise ValueError("forced needs parts: without them nothing of the student is run")
    if not rate > 0:
        raise ValueError(f"rate must be above 0, got {rate!r}")
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every must be an integer >= 1, got {every!r}")
    trained = [p for p in student.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("student has no parameter that requires gradients")
    own = {p.data_ptr() for p in teacher.parameters()}
    shared = [name for name, p in student.named_parameters() if p.requires_grad and p.data_ptr() in own]
    if shared:
        raise ValueError(f"student would train the teacher's own {shared[0]!r}; copy it or freeze it")
    return trained


def _arguments(batch: Any, inputs: Callable[[Any], tuple] | None) -> tuple:
    if inputs is not None:
        return inputs(batch)
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def _found(
    teacher: nn.Module, student: nn.Module, named: dict[str, str], arguments: tuple, forced: bool
) -> Pairs:
    """The pairs of one batch."""
    calls: dict[str, tuple[tuple, dict]] = {}
    with torch.no_grad(), _captured(teacher, named, calls) as told:
        told[""] = _first(teacher(*arguments), "the teacher")
    answers: dict[str, Tensor] = {}
    if forced:
        for name, other in named.items():
            given, options = calls[name]
            answers[name] = _first(student.get_submodule(other)(*given, **options), other)
        told.pop("")
    else:
        back = {other: name for name, other in named.items()}
        with _captured(student, back, {}) as heard:
            answers[""] = _first(student(*arguments), "the student")
        answers |= {back[other]: x for other, x in heard.items()}
    for name, x in told.items():
        if x.shape != answers[name].shape:
            where = f"part {name!r}" if name else "the output"
            raise ValueError(
                f"{where} must have one shape, got {list(x.shape)} of the teacher and"
                f" {list(answers[name].shape)} of the student"
            )
    return {name: Pair(x, answers[name]) for name, x in told.items()}


@contextmanager
def _captured(
    model: nn.Module, names: Iterable[str], calls: dict[str, tuple[tuple, dict]]
) -> Iterator[dict[str, Tensor]]:
    """Outputs of submodules, by name, and what they were called with; of two calls the last counts."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable:
        def keep(_: nn.Module, given: tuple, options: dict, out: Any) -> None:
            seen[name], calls[name] = _first(out, name), (given, options)

        return keep

    handles = [
        model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _first(out: Any, name: str) -> Tensor:
    out = out[0] if isinstance(out, (tuple, list)) and out else out
    if not isinstance(out, Tensor):
        raise TypeError(
            f"{name} must give a tensor or a tuple that begins with one, got {type(out).__name__}"
        )
    return out


@contextmanager
def _modes(teacher: nn.Module, student: nn.Module) -> Iterator[None]:
    """The teacher evaluates and the student trains; both are afterwards as they were."""
    before = [(m, m.training) for model in (teacher, student) for m in model.modules()]
    try:
        student.train()
        teacher.eval()
        yield
    finally:
        for m, mode in before:
            m.training = mode


def _resume(checkpoint: str | os.PathLike[str] | None, descent: Descent) -> None:
    if checkpoint is None or not Path(checkpoint).exists():
        return
    saved = torch.load(checkpoint, weights_only=True)
    have = {name: p.shape for name, p in descent.module.state_dict().items()}
    if {name: p.shape for name, p in saved["module"].items()} != have:
        raise ValueError(f"checkpoint {str(checkpoint)!r} is of another student: names or shapes differ")
    descent.load_state_dict(saved)


def _save(checkpoint: str | os.PathLike[str], descent: Descent) -> None:
    path = Path(checkpoint)
    part = path.with_name(path.name + ".part")  # whole or not at all
    torch.save(descent.state_dict(), part)
    os.replace(part, path)
