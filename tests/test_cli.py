"""The command: what it prints, its exit codes, and one line for every error that is the user's."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tilewise
from tilewise import cli, doctor, kernels, machine
from tilewise.errors import UserError
from tilewise.kernels.gated_rnn import ENGINES as GATED_ENGINES
from tilewise.kernels.scan import ENGINES as SCAN_ENGINES

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process: exit code, stdout, stderr."""

    def run_command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, out, err

    return run_command


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for the comparison; what it holds under "does" is called with the settings."""

    @dataclass
    class Settings:
        model: str | None = None
        text: Path | None = None
        tokens: int = 1000
        methods: tuple[str, ...] = ("dense",)
        device: str = "cpu"
        dtype: str = "float32"
        tasks: tuple[str, ...] = ()
        out: Path = Path("report.html")
        json: Path | None = None
        seed: int = 0

    behaviour: dict[str, Any] = {"does": lambda settings: behaviour.update(settings=settings)}
    module = types.ModuleType("tilewise.compare")
    module.Settings = Settings  # type: ignore[attr-defined]
    module.run_compare = lambda settings: behaviour["does"](settings)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tilewise.compare", module)
    return behaviour


def test_version_and_help(run: Run) -> None:
    assert run("--version") == (0, f"tilewise {tilewise.__version__}\n", "")
    code, out, _ = run("--help")
    assert code == 0
    assert all(word in out for word in ("compare", "papers", "doctor"))
    code, out, err = run()
    assert (code, err) == (2, "")
    assert "compare" in out


def test_module_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "tilewise", "--version"], text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, f"tilewise {tilewise.__version__}\n")


def test_papers_are_listed_with_their_evidence(run: Run) -> None:
    code, out, _ = run("papers")
    assert code == 0
    assert "tilewise.attention.MoBA" in out
    assert "tests/attention/test_pbs.py::" in out
    code, out, _ = run("papers", "antidiagonal")
    assert "XAttention" in out
    assert "MoBA" not in out
    assert "1 of " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["papers", "no", "such"], "no paper matches 'no such'"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["compare", "--tokens", "many"], "--tokens"),
        (["papers", "--frob"], "No such option: --frob"),
    ],
)
def test_bad_arguments_give_one_line_and_2(run: Run, arguments: list[str], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("tilewise: ")
    assert err.count("\n") == 1
    assert message in err


def test_compare_passes_on_what_was_given(run: Run, compare: dict[str, Any]) -> None:
    options = "--text t.txt --tokens 64 --methods dense,moba --device cuda:1 --dtype bfloat16 --tasks recall"
    code, _, err = run(
        "compare", "a/model", *options.split(), "--out", "r.html", "--json", "r.json", "--seed", "7"
    )
    assert (code, err) == (0, "")
    given = compare["settings"]
    assert (given.model, given.text, given.tokens, given.seed) == ("a/model", Path("t.txt"), 64, 7)
    assert (given.methods, given.tasks) == (("dense", "moba"), ("recall",))
    assert (given.device, given.dtype, given.out, given.json) == (
        "cuda:1",
        "bfloat16",
        Path("r.html"),
        Path("r.json"),
    )


def test_compare_leaves_the_rest_to_the_settings(run: Run, compare: dict[str, Any]) -> None:
    assert run("compare")[0] == 0
    assert compare["settings"] == type(compare["settings"])()


def test_user_error_is_one_line_and_2(run: Run, compare: dict[str, Any]) -> None:
    def refuse(settings: Any) -> None:
        raise UserError("no method 'moab';\n nearest: moba")

    compare["does"] = refuse
    assert run("compare") == (2, "", "tilewise: no method 'moab'; nearest: moba\n")


def test_interruption_is_130(run: Run, compare: dict[str, Any]) -> None:
    def interrupt(settings: Any) -> None:
        raise KeyboardInterrupt

    compare["does"] = interrupt
    assert run("compare") == (130, "", "tilewise: interrupted\n")


def test_other_errors_are_not_hidden(compare: dict[str, Any]) -> None:
    def fail(settings: Any) -> None:
        raise ZeroDivisionError

    compare["does"] = fail
    with pytest.raises(ZeroDivisionError):
        cli.main(["compare"])


@pytest.mark.parametrize("package", ["typer", "safetensors"])
def test_missing_extra_is_named(package: str) -> None:
    script = (
        "import importlib.machinery, sys\n"
        "class Missing(importlib.machinery.PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        f"        return None if name == {package!r} else super().find_spec(name, path, target)\n"
        "sys.meta_path = [f for f in sys.meta_path if f is not importlib.machinery.PathFinder] + [Missing]\n"
        "from tilewise.cli import main\n"
        "main(['compare'])"
    )
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert package in done.stderr
    assert 'pip install "tilewise[compare]"' in done.stderr


def test_doctor_shows_the_machine_and_passes(run: Run) -> None:
    run("build")  # what is compiled for the first time says so
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert torch.__version__ in out
    lines = {line.partition(":")[0]: line for line in out.splitlines()}
    for engine in kernels.engines():
        line = lines[f"attention, {engine}"]
        if engine == "triton" and not torch.cuda.is_available():
            assert "not here" in line and "runs on GPUs" in line
            continue
        assert ": works, error" in line
        assert float(line.split()[-2]) > 0 and line.endswith("GFLOP/s")
    for engine in SCAN_ENGINES:
        here = engine != "triton" or torch.cuda.is_available()
        assert (": works, error" if here else "runs on GPUs") in lines[f"recurrence, {engine}"]
    for engine in GATED_ENGINES:
        assert ": works, error" in lines[f"gated networks, {engine}"]


def test_build_says_where_the_library_lies(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("build")
    assert code == 0
    built = dict(line.split(": ", 1) for line in out.splitlines())
    assert list(built) == list(kernels.natives())
    assert all(Path(path).is_file() and Path(path).suffix == ".so" for path in built.values())
    folders = {path.parent.name for path in Path(kernels.__file__).parent.glob("*/native.py")}
    assert set(kernels.NATIVE) == folders, "a native engine that `tilewise build` does not know"
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, out, err = run("build")
    assert (code, out) == (2, "") and "no C++ compiler was found" in err and "Traceback" not in err


def test_doctor_fails_on_a_wrong_engine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = tilewise.attend
    wrong: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "zeros": torch.zeros_like,
        "shifted": lambda out: out.roll(1, dims=2),
        "nan": lambda out: out * float("nan"),
        "raises": lambda out: out.view(-1, 7, 7, 7),
    }

    def attend(*args: Any, engine: str, **kwargs: Any) -> torch.Tensor:
        if engine == "refuses":
            raise kernels.EngineRefused("needs a CUDA device")
        out = right(*args, engine="definition", **kwargs)
        assert isinstance(out, torch.Tensor)
        return wrong[engine](out) if engine in wrong else out

    monkeypatch.setattr(tilewise, "attend", attend)
    monkeypatch.setattr(kernels, "engines", lambda: ["definition", "refuses"])
    assert run("doctor")[0] == 0
    monkeypatch.setattr(kernels, "engines", lambda: ["definition", "refuses", *wrong])
    code, out, _ = run("doctor")
    assert code == 1
    assert "definition: works" in out
    assert "refuses: not here, needs a CUDA device" in out
    for name in wrong:
        assert f"attention, {name}: FAILED" in out


def test_compiler_follows_cxx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert machine.compiler() is None
    assert doctor.facts()["C++ compiler"] == "missing"
    monkeypatch.setenv("CXX", sys.executable)
    assert machine.compiler() == sys.executable
