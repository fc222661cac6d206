"""Waiting threads sleep soon, in our own processes only, and never against the user's settings."""

import os
import re
import subprocess
import sys

import pytest

from loradeck.base.openmp import SPINS, VARIABLES, limit_spinning

gnu = pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP runtime on Linux only")

# Every way into a process of ours that computes; a verb's error is as good as its success.
COMMANDS = {
    "command": [sys.executable, "-m", "loradeck", "doctor"],
    "library": [sys.executable, "-c", "import torch, loradeck; loradeck.Bank(torch.nn.Linear(2, 2))"],
    "call": [
        sys.executable,
        "-c",
        "from loradeck.base.openmp import limit_spinning; assert limit_spinning(); import torch",
    ],
}


def spin_count(how: str, **environment: str) -> int:
    """Return the number of spins that GNU's OpenMP runtime reports when it starts."""
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    result = subprocess.run(
        COMMANDS[how], env=clean | {"OMP_DISPLAY_ENV": "verbose"} | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (count,) = re.findall(r"GOMP_SPINCOUNT = '(\w+)'", result.stderr)
    return sys.maxsize if count == "INFINITY" else int(count)


@gnu
def test_the_command_and_the_call_limit_spinning_and_a_library_does_not() -> None:
    assert spin_count("command") == SPINS
    assert spin_count("call") == SPINS
    assert spin_count("library") > 10 * SPINS


@gnu
@pytest.mark.parametrize(("name", "value", "count"), [("GOMP_SPINCOUNT", "77", 77), ("OMP_WAIT_POLICY", "passive", 0)])
def test_the_users_variables_take_precedence(name: str, value: str, count: int) -> None:
    assert spin_count("command", **{name: value}) == count


def test_it_is_too_late_once_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert "torch" in sys.modules
    assert not limit_spinning()
    assert "GOMP_SPINCOUNT" not in os.environ
