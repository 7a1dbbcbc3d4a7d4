"""`distil`: what is captured, what is trained and what is left alone, resuming, and what it refuses."""

from __future__ import annotations

import copy
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from tilewise.recurrence import Pair, distil


class Two(nn.Module):
    """Two layers; the first gives a tuple, as mixers do, and takes a keyword."""

    class First(nn.Linear):
        def forward(self, x: Tensor, *, scale: float = 1.0):
            return super().forward(x) * scale, "state"

    def __init__(self, width: int = 6, seed: int = 0, drop: float = 0.0, out: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.drop, self.last = self.First(width, width), nn.Dropout(drop), nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.tanh(self.first(x, scale=2.0)[0])))


def batches(count: int = 30, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(count, 8, 6, generator=torch.Generator().manual_seed(seed)))


def square(pairs: dict[str, Pair], batch: Tensor) -> Tensor:
    return torch.stack([(pair.student - pair.teacher).square().mean() for pair in pairs.values()]).sum()


def test_a_student_learns_the_teachers_answers():
    teacher, student = Two(seed=1), Two(seed=2)
    losses = distil(teacher, student, batches(300), square, rate=0.02)
    assert len(losses) == 300 and sum(losses[-20:]) < 0.1 * sum(losses[:20])
    fresh = batches(1, seed=9)[0]
    assert (teacher(fresh) - student(fresh)).square().mean() < 0.05 * teacher(fresh).var()


def test_pairs_are_outputs_of_the_named_parts():
    """Of the same batch, by formula; the student's have a graph and the teacher's none."""
    teacher, student = Two(seed=1), Two(seed=2)
    x = batches(1)[0]
    seen: list = []

    def loss(pairs, batch):
        seen.append((pairs, batch))
        return pairs[""].student.sum()

    want = {
        role: m.first(x, scale=2.0)[0].detach() for role, m in (("teacher", teacher), ("student", student))
    }
    distil(teacher, student, [x], loss, parts=["first"])
    ((pairs, batch),) = seen
    assert batch is x and set(pairs) == {"", "first"}
    assert torch.equal(pairs["first"].teacher, want["teacher"]) and not pairs["first"].teacher.requires_grad
    assert torch.equal(pairs["first"].student, want["student"]) and pairs["first"].student.requires_grad
    assert not teacher.first._forward_hooks and not student.first._forward_hooks


def test_forced_parts_are_given_what_the_teacher_had():
    """Each layer learns on the teacher's inputs, keywords too."""
    teacher, student = Two(seed=1), Two(seed=2)
    x = batches(1)[0]
    inner = torch.tanh(teacher.first(x, scale=2.0)[0]).detach()
    want = student.last(inner).detach()
    seen: list = []

    def loss(pairs, batch):
        seen.append(pairs)
        return square(pairs, batch)

    distil(teacher, student, [x], loss, parts={"last": "last", "first": "first"}, forced=True)
    assert set(seen[0]) == {"last", "first"} and torch.equal(seen[0]["last"].student, want)
    student.first.requires_grad_(False)
    before = student.first.weight.clone()
    losses = distil(teacher, student, batches(300), square, parts=["last"], forced=True, rate=0.02)
    assert losses[-1] < 1e-2 * losses[0] and torch.equal(student.first.weight, before)


def test_the_teacher_and_the_callers_generator_are_left_alone():
    teacher, student = Two(seed=1, drop=0.5).train(), Two(seed=2, drop=0.5).eval()
    before = copy.deepcopy(teacher.state_dict())
    state = torch.get_rng_state()
    distil(teacher, student, batches(3), square)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert teacher.training and teacher.drop.training and not student.training


def test_resumed_is_the_uninterrupted_run_bit_for_bit(tmp_path):
    """With dropout, momentum and a falling rate; the callback hears every step once."""
    teacher, whole, parted = Two(seed=1), Two(seed=2, drop=0.3), Two(seed=2, drop=0.3)
    heard: list = []
    want = distil(teacher, whole, batches(), square, seed=5)

    class Cut(list):
        """As many as all, of which the run is stopped after some."""

        def __iter__(self):
            return islice(super().__iter__(), 13)

    file = tmp_path / "run.pt"
    distil(
        teacher,
        parted,
        Cut(batches()),
        square,
        seed=5,
        checkpoint=file,
        every=4,
        progress=lambda *x: heard.append(x),
    )
    fresh = Two(seed=3, drop=0.3)
    got = distil(
        teacher, fresh, batches(), square, seed=5, checkpoint=file, progress=lambda *x: heard.append(x)
    )
    assert got == want and heard == list(enumerate(want, 1))
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), whole.parameters()))
    still = distil(teacher, Two(seed=2, drop=0.5), batches(1) * 4, square, rate=1e-12)
    assert len(set(still)) == 4  # every step drops others
    other = Two(seed=2, drop=0.3)
    assert distil(teacher, other, batches(), square, seed=6) != want
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.pt"]
    with pytest.raises(ValueError, match="is of another student"):
        distil(teacher, Two(width=6, out=4), batches(), square, checkpoint=file)


def test_inputs_and_optimizer_are_the_callers():
    teacher, student = Two(seed=1), Two(seed=2)
    given = [{"x": x, "target": torch.zeros(8, 3)} for x in batches(4)]
    rates: list = []

    def made(parameters):
        found = torch.optim.SGD(parameters, lr=0.1)
        rates.append(found)
        return found

    losses = distil(
        teacher, student, iter(given),
        lambda pairs, batch: (pairs[""].student - batch["target"]).abs().mean(),
        inputs=lambda batch: (batch["x"],), optimizer=made, clip=None,
    )  # fmt: skip
    assert len(losses) == 4 and rates[0].param_groups[0]["lr"] == 0.1  # no length: the rate stays


def test_what_is_refused():
    teacher, student = Two(seed=1), Two(seed=2)
    one = batches(1)
    with pytest.raises(ValueError, match="parts names 'second', which the teacher does not have"):
        distil(teacher, student, one, square, parts=["second"])
    with pytest.raises(ValueError, match="parts names 'second', which the student does not have"):
        distil(teacher, student, one, square, parts={"first": "second"})
    with pytest.raises(
        ValueError, match=r"the output must have one shape, got \[8, 3\] of the teacher and \[8, 4\]"
    ):
        distil(teacher, Two(out=4), one, square)
    with pytest.raises(ValueError, match=r"part 'last' must have one shape"):
        distil(teacher, student, one, square, parts={"last": "drop"})
    with pytest.raises(ValueError, match="student would train the teacher's own 'first.weight'"):
        distil(teacher, teacher, one, square)
    with pytest.raises(ValueError, match="student has no parameter that requires gradients"):
        distil(teacher, copy.deepcopy(student).requires_grad_(False), one, square)
    with pytest.raises(ValueError, match=r"loss must give a scalar, got torch.Size\(\[8, 3\]\)"):
        distil(teacher, student, one, lambda pairs, _: pairs[""].student)
    with pytest.raises(FloatingPointError, match="the loss of step 0 is nan"):
        distil(teacher, student, one, lambda pairs, _: pairs[""].student.sum() * float("nan"))
    with pytest.raises(ValueError, match="forced needs parts"):
        distil(teacher, student, one, square, forced=True)
    with pytest.raises(ValueError, match="rate must be above 0, got 0"):
        distil(teacher, student, one, square, rate=0)
    with pytest.raises(TypeError, match="teacher must be a torch.nn.Module, got str"):
        distil("teacher", student, one, square)
    with pytest.raises(TypeError, match="the teacher must give a tensor or a tuple that begins with one"):
        distil(nn.Sequential(Wrapped()), student, one, square)


class Wrapped(nn.Module):
    def forward(self, x: Tensor):
        return {"answer": x}
