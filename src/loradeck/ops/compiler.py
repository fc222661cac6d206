"""C of this package, compiled once for a machine and kept in the user's cache folder. Knows no kernel.

Kept under the digest of what it was made from and how; whoever can write there can already run code as this user.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from loradeck.disk import cache_folder, write_file

PATIENCE = 60  # seconds for the compiler
FEATURES = {  # what torch has found the CPU to be able to do -> flags of GCC
    "AVX512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma",
    "AVX2": "-mavx2 -mfma",
}
FLAGS = "-std=gnu11 -O3 -fPIC -w -fopenmp"


def loaded(source: Path) -> ctypes.CDLL:
    """Return the library of a C file, compiled now if it has not been on this machine.

    The compiler is `$CC`, gcc or cc, and must be GCC, whose OpenMP is torch's on Linux: the library is linked with none
    of its own, because two would keep two teams of threads, which wait for each other.

    Raises:
        OSError: there is no compiler, it fails, or the library finds no OpenMP in this process.
    """
    compiler = _compiler()
    flags = [*FLAGS.split(), *FEATURES.get(torch.backends.cpu.get_cpu_capability(), "").split()]
    made_from = [source.read_bytes(), " ".join([*compiler, *flags]).encode(), platform.platform().encode()]
    name = f"{source.stem}-{hashlib.sha256(bytes(0).join(made_from)).hexdigest()[:16]}.so"
    with TemporaryDirectory() as folder:
        kept = _kept(name)
        if kept is None or not kept.is_file():
            fresh = _compile(compiler, flags, source, Path(folder))
            kept = _keep(kept, fresh)
        try:
            return ctypes.CDLL(str(kept))  # a file that is gone afterwards stays open
        except OSError as error:
            kept.unlink(missing_ok=True)  # the next process tries again
            raise OSError(str(error).removeprefix(f"{kept}: ")) from error


def _compiler() -> list[str]:
    own = shlex.split(os.environ.get("CC", ""))
    found = own or next(([name] for name in ("gcc", "cc") if shutil.which(name)), None)
    if not found:
        raise OSError("there is no GCC; install it, or name it in $CC")
    return found


def _compile(compiler: list[str], flags: list[str], source: Path, folder: Path) -> Path:
    made, library = folder / f"{source.stem}.o", folder / f"{source.stem}.so"
    for command in ([*flags, "-c", str(source), "-o", str(made)], ["-shared", str(made), "-o", str(library)]):
        try:
            ran = subprocess.run([*compiler, *command], capture_output=True, text=True, timeout=PATIENCE, check=False)
        except subprocess.TimeoutExpired as error:
            raise OSError(f"{compiler[0]} took more than {PATIENCE} seconds") from error
        if ran.returncode:
            said = next((line for line in ran.stderr.splitlines() if "error" in line), ran.stderr.strip())
            raise OSError(f"{compiler[0]} failed: {said}")
    return library


def _kept(name: str) -> Path | None:
    """Return where a library is kept, None where no such folder can be made."""
    folder = cache_folder() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder / name


def _keep(kept: Path | None, fresh: Path) -> Path:
    """Keep a library, and return it where it lies then; where it was made, if there is no room."""
    if kept is None:
        return fresh
    try:
        write_file(kept, fresh.read_bytes())
    except OSError:
        return fresh
    return kept
