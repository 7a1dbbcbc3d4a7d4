"""Compiling native code: once, privately, safely; and what happens where it cannot be had."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tilewise.kernels import building

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny source, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "tiny.cpp"
    path.write_text(SOURCE)
    return path


def _libraries() -> list[Path]:
    return sorted(building.folder().glob("*.so"))


def test_built_once_with_a_line_that_says_so(source, capsys):
    assert building.load("tiny", [source]).answer() == 42
    said = capsys.readouterr().err
    assert "compiling the native tiny engine" in said and "compiled in" in said
    (made,) = _libraries()
    before = made.stat().st_mtime_ns
    assert isinstance(building.load("tiny", [source]), ctypes.CDLL)
    assert capsys.readouterr().err == ""
    assert _libraries() == [made] and made.stat().st_mtime_ns == before


def test_other_sources_flags_or_headers_are_other_builds(source, monkeypatch):
    building.load("tiny", [source])
    header = source.with_suffix(".h")
    header.write_text("// first")
    building.load("tiny", [source, header])
    header.write_text("// second")
    building.load("tiny", [source, header])
    monkeypatch.setattr(building, "_COMMON", [*building._COMMON, "-DOTHER"])
    building.load("tiny", [source, header])
    assert len(_libraries()) == 4


@pytest.mark.parametrize("damage", ["other bytes", "no checksum", "empty"])
def test_a_damaged_cache_is_built_again_and_said_once(source, damage, capsys):
    building.load("tiny", [source])
    (made,) = _libraries()
    whole = made.read_bytes()
    made.unlink()  # a library that is mapped must not be written over
    made.write_bytes(
        b"" if damage == "empty" else whole[:-8] + b"12345678" if damage == "other bytes" else whole
    )
    if damage == "no checksum":
        made.with_suffix(".sha256").unlink()
    capsys.readouterr()
    assert building.load("tiny", [source]).answer() == 42
    assert capsys.readouterr().err.count("is damaged; it is built again") == 1
    building.load("tiny", [source])
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system has no file modes")
def test_nothing_is_loaded_from_a_folder_that_others_can_write(source):
    building.load("tiny", [source])
    building.folder().chmod(0o777)
    try:
        with pytest.raises(building.BuildFailed, match="belongs to or can be written by others"):
            building.load("tiny", [source])
    finally:
        (Path(os.environ["XDG_CACHE_HOME"]) / "tilewise/native").chmod(0o700)
    assert building.folder().stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_made_is_named(source, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(building.BuildFailed, match="the cache folder .*file.* cannot be used"):
        building.load("tiny", [source])


def test_what_the_compiler_says_is_told_and_nothing_is_left(source):
    source.write_text("int broken( {")
    with pytest.raises(building.BuildFailed, match=r"the compiler .* failed: .*tiny.cpp:1:.*error"):
        building.load("tiny", [source])
    assert _libraries() == []


def test_no_compiler(source, monkeypatch):
    monkeypatch.setattr(building, "compiler", lambda: None)
    with pytest.raises(building.BuildFailed, match="no C\\+\\+ compiler was found .*set CXX"):
        building.load("tiny", [source])


def test_two_processes_build_at_once(source):
    """One builds, the other waits for it; both get the library."""
    script = (
        "import sys; from pathlib import Path; from tilewise.kernels import building;"
        " print(building.load('tiny', [Path(sys.argv[1])]).answer())"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(source)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    done = [run.communicate(timeout=120) for run in runs]
    assert [out.strip() for out, _ in done] == ["42", "42"]
    assert sum("compiling" in err for _, err in done) == 1
    assert len(_libraries()) == 1


def test_a_lock_that_is_held_is_waited_for(source):
    fcntl = pytest.importorskip("fcntl")
    lock = building.folder() / "some.lock"
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        script = (
            "import sys; from pathlib import Path; from tilewise.kernels import building\n"
            "with building._lock(Path(sys.argv[1])): print('in', flush=True)"
        )
        waiting = subprocess.Popen(
            [sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE, text=True
        )
        time.sleep(0.2)
        assert waiting.poll() is None
    assert waiting.communicate(timeout=60)[0].strip() == "in"


WITHOUT = """
import warnings, torch, tilewise
q = torch.randn(1, 2, 40, 8)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        tilewise.attend(q, q, q, mask="causal", softcap=5.0)
    print(tilewise.explain(q, q, q, mask="causal", softcap=5.0))
print(sum("runs without its native engine" in str(w.message) for w in seen), "warning")
try:
    tilewise.attend(q, q, q, engine="native")
except ValueError as refusal:
    print(refusal)
"""


def test_without_a_compiler_auto_says_so_once_and_uses_torch(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        env={**os.environ, "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "pass 1 runs on torch" in done.stdout and "1 warning" in done.stdout
    assert "not native: no C++ compiler was found" in done.stdout
    assert "engine 'native' cannot run this call: no C++ compiler was found" in done.stdout
