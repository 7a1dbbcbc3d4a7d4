"""Builds the wheel as a user would get it, looks inside, and runs it in an empty environment.

The wheel is built from the source archive, so both are shown to be complete. The environment is new and gets
torch and the `compare` extra installed like any other; nothing of the project's own `.venv` is visible in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src/tilewise"


def sources() -> set[str]:
    """Every file of the package as git has it or would take it: modules, models, texts, C++ sources."""
    listed = run(
        "git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", str(SOURCE), quiet=True
    )
    return {
        Path(name).relative_to("src").as_posix()
        for name in listed.split("\0")
        if name and (ROOT / name).exists()
    }


def run(*command: str, cwd: Path = ROOT, quiet: bool = False) -> str:
    """Run a command; its output is shown when it fails, and the check ends there."""
    # PYTHONPATH and the like would let the project's own tree into the empty environment.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env=clean, text=True, stdin=subprocess.DEVNULL, capture_output=True
    )
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nfailed ({done.returncode}): {' '.join(command)}")
    if not quiet:
        print(done.stdout, end="")
    return done.stdout


def check_contents(wheel: Path) -> None:
    """Pure Python, every file of the package, and nothing else but the metadata."""
    if not wheel.name.endswith("-py3-none-any.whl"):
        sys.exit(f"{wheel.name}: should be a pure Python wheel, py3-none-any")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    if missing := sources() - inside:
        sys.exit(f"{wheel.name} lacks {sorted(missing)}; pyproject.toml lists the package data")
    if extra := inside - sources():
        sys.exit(f"{wheel.name} should not have {sorted(extra)}")
    print(f"{wheel.name}: {len(inside)} files, {wheel.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    """Build, look inside, install, run."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        run(sys.executable, "-m", "build", "--outdir", str(home), quiet=True)
        (wheel,) = home.glob("*.whl")
        check_contents(wheel)
        print("installing the wheel into an empty environment", flush=True)
        venv.create(home / "venv", with_pip=True)
        binaries = home / "venv" / ("Scripts" if os.name == "nt" else "bin")
        constraints = str(ROOT / "constraints.txt")
        pip = [str(binaries / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        run(*pip, "-c", constraints, f"{wheel}[compare]", cwd=home)
        for command in ("papers", "doctor"):
            run(str(binaries / "tilewise"), command, cwd=home)


if __name__ == "__main__":
    main()
