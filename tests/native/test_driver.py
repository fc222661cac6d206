"""The driver outside Python: the same numbers on another kind of machine, where it can be emulated."""

import shutil
import subprocess
from pathlib import Path

import pytest

from loradeck.native.library import SOURCE

DRIVER = Path(__file__).with_name("driver.c")
FLAGS = f"-std=gnu11 -O1 -w -ffp-contract=off -I{SOURCE.parent} {DRIVER}".split()


def numbers(program: Path, *before: str) -> list[float]:
    """Return what the driver prints; it fails where a sequence has other bits beside others."""
    done = subprocess.run([*before, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [float(number) for number in done.stdout.split()]


@pytest.mark.slow
def test_neon_computes_the_same(tmp_path) -> None:
    tools = ("gcc", "aarch64-linux-gnu-gcc", "qemu-aarch64")
    if missing := [tool for tool in tools if not shutil.which(tool)]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    subprocess.run(["gcc", *FLAGS, "-o", str(tmp_path / "here"), "-lm", "-pthread"], check=True)
    subprocess.run(
        ["aarch64-linux-gnu-gcc", "-static", *FLAGS, "-o", str(tmp_path / "arm"), "-lm", "-pthread"], check=True
    )
    there, here = numbers(tmp_path / "arm", "qemu-aarch64"), numbers(tmp_path / "here")
    assert there == pytest.approx(here, abs=1e-2)  # int8 activations at a tie may be rounded the other way
    assert sum(abs(one - other) > 1e-3 for one, other in zip(there, here, strict=True)) <= 3
