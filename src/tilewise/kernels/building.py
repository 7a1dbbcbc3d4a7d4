"""Compiles the C++ of native engines once per machine and loads it.

The result lies in the user's private cache folder, named by what it was made from: sources, flags, compiler and
torch. Nothing is loaded from a folder that others can write, nor a file that is not the one that was built.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch

from tilewise.machine import compiler

_COMMON = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
# Vector instructions by what PyTorch says it uses, so that its switch for lowering them holds here too.
_VECTORS = {
    "AVX512": [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "cd")] + ["-mprefer-vector-width=512"],
    "AVX2": [],
}


class BuildFailed(RuntimeError):
    """A native library cannot be had on this machine; the message is one sentence that says why."""


def load(name: str, sources: Sequence[Path]) -> ctypes.CDLL:
    """The library made from `sources`, built if need be (see `library`). Raises BuildFailed as that does."""
    try:
        return ctypes.CDLL(str(library(name, sources)))
    except OSError as error:
        raise BuildFailed(f"the compiled {name} does not load: {error}") from error


def library(name: str, sources: Sequence[Path]) -> Path:
    """Path of the library made from `sources`, built if need be: `.cpp` files are compiled, all of them name it.

    Raises BuildFailed, with the reason, where there is no compiler, it fails, or there is no safe place to keep
    the result.
    """
    command, libraries = _command()
    names = [source.name for source in sources]
    key = hashlib.sha256(
        "\n".join([*command, *libraries, *names, torch.__version__, _version(command[0])]).encode()
    )
    for source in sources:
        key.update(source.read_bytes())
    path = folder() / f"{name}-{key.hexdigest()[:20]}.so"
    if not _is_whole(path):
        with _lock(path.with_suffix(".lock")):
            if not _is_whole(path):  # another process may have built it meanwhile
                _build(
                    name, command, libraries, [source for source in sources if source.suffix == ".cpp"], path
                )
    return path


def folder() -> Path:
    """The folder of compiled libraries, made if need be; nobody but the user may write to it."""
    if sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = base / "tilewise" / "native"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = path.stat()
    except OSError as error:
        raise BuildFailed(f"the cache folder {path} cannot be used: {error.strerror}") from error
    if hasattr(os, "getuid") and (
        about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        raise BuildFailed(f"the cache folder {path} belongs to or can be written by others")
    return path


def _command() -> tuple[list[str], list[str]]:
    """The compiler with its flags, and what is linked."""
    found = compiler()
    if found is None:
        raise BuildFailed("no C++ compiler was found (install g++ or clang++, or set CXX)")
    torch_folder = Path(torch.__file__).parent
    flags = list(_COMMON)
    if platform.machine().lower() in ("x86_64", "amd64"):
        capability = torch.backends.cpu.get_cpu_capability()
        for level, vectors in _VECTORS.items():
            if capability.startswith(level):
                flags += ["-mavx2", "-mfma", "-mf16c", *vectors]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))  # as other builds do
    # torch brings an OpenMP of its own; a second one in the process would mean a second pool of threads.
    own = sorted((torch_folder / "lib").glob("libgomp*.so*"))
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", *(f"-l:{lib.name}" for lib in own[:1])]
    return [found, *flags, f"-I{torch_folder / 'include'}"], libraries


@lru_cache
def _version(command: str) -> str:
    try:
        return subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"the compiler {command} does not start: {error}") from error


def _is_whole(path: Path) -> bool:
    """Whether `path` is there and is what was built; says so when it is something else."""
    try:
        about = path.stat()
        expected = path.with_suffix(".sha256").read_text().strip()
        if hasattr(os, "getuid") and about.st_uid != os.getuid():
            return False
        if hashlib.sha256(path.read_bytes()).hexdigest() == expected:
            return True
    except OSError:
        if not path.exists():
            return False
    _say(f"{path.name} in the cache is damaged; it is built again")
    path.unlink(missing_ok=True)
    return False


def _build(name: str, command: list[str], libraries: list[str], sources: list[Path], path: Path) -> None:
    _say(f"compiling the native {name} engine, once for this machine (about 15 s) ...")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = [f"{folder}/{source.stem}.o" for source in sources]
        made = Path(folder) / path.name
        try:
            jobs = [[*command, "-c", str(source), "-o", to] for source, to in zip(sources, objects)]
            with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
                list(pool.map(_compile, jobs))
            _compile([*command, "-shared", *objects, *libraries, "-o", str(made)])
            path.with_suffix(".sha256").write_text(hashlib.sha256(made.read_bytes()).hexdigest() + "\n")
            os.replace(made, path)
        except OSError as error:
            raise BuildFailed(f"the compiled {name} engine cannot be kept: {error}") from error
    _say(f"compiled in {time.perf_counter() - start:.0f} s")


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(f"the compiler {command[0]} took longer than ten minutes") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise BuildFailed(f"the compiler {command[0]} failed: {first.strip()}")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold `path` as a lock between processes, where the system has such locks."""
    with open(path, "w") as file:
        try:
            import fcntl
        except ImportError:  # builds are then safe but may be done twice: files are replaced whole
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(f"tilewise: {text}", file=sys.stderr, flush=True)
