"""Every example runs as a user would run it, in silence on stderr, and says what it is there to say."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "attend.py": ["XAttention(stride=8", "100%", "runs on native", "not definition"],
    "compose_a_method.py": ["oracle", "rest pooled", "prompt"],
    "patch_model.py": ["of the tiles", "bit for bit as before: True"],
}


@functools.cache
def _printed(name: str) -> str:
    """What an example prints when run from elsewhere, with warnings as errors."""
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [sys.executable, "-W", "error", str(EXAMPLES / name)]
        done = subprocess.run(command, cwd=elsewhere, text=True, capture_output=True, timeout=300)
        assert (done.returncode, done.stderr) == (0, "")
        assert list(Path(elsewhere).iterdir()) == []
    return done.stdout


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", sorted(SAYS))
def test_example_runs(name):
    assert all(words in _printed(name) for words in SAYS[name]), _printed(name)


def test_composed_methods_rank_as_the_example_says():
    """Its table teaches something only while better scores choose better tiles and a pooled rest helps."""
    errors = []
    for line in _printed("compose_a_method.py").splitlines():
        if line.endswith("%"):
            errors.append([float(cell[:-1]) for cell in line.split()[-2:]])
    mean, antidiagonal, _, oracle = errors
    assert oracle < antidiagonal < mean
    assert all(pooled < skipped for skipped, pooled in errors)
