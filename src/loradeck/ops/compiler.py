"""The package's C code as libraries: compiled once per machine, or prebuilt where there is no compiler.

What is compiled lies in the user's cache folder, by a digest of the source, the compiler's command and the platform.
Whoever can write to that folder can already run code as this user. Prebuilt libraries lie in `PREBUILT` if the package
was installed from a wheel for this platform.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from loradeck.disk import cache_folder, write_file

log = logging.getLogger(__name__)
TIMEOUT = 120  # seconds
COMPILERS = ("gcc", "clang", "cc")
PREBUILT = Path(__file__).with_name("prebuilt")
FEATURES = {  # the CPU capability that torch reports, after it has looked for all of these -> flags
    "AVX512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma",
    "AVX2": "-mavx2 -mfma",
}
FLAGS = "-std=gnu11 -O3 -fPIC -w"
# Linked with no OpenMP runtime: the code finds torch's in this process. A second one would keep a second team of
# threads, and the two would wait for each other. Linux leaves symbols open by default, macOS only when asked.
LINK_FLAGS = "-shared" + (" -undefined dynamic_lookup" if sys.platform == "darwin" else "")


def load(source: Path, options: str = "") -> ctypes.CDLL:
    """Return the library of a C file and the headers beside it, for this CPU.

    It is compiled now unless it is in the cache. Where that fails, it is the prebuilt one, if there is one that was
    compiled from the same files by the same flags. `options` are flags of the compiler, besides those for this CPU.

    The compiler is `$CC`, or the first of gcc, clang and cc that is installed.

    Raises:
        OSError: there is no prebuilt library, and no compiler, or it fails.
    """
    flags = _flags(torch.backends.cpu.get_cpu_capability(), options)
    try:
        return _load_compiled(source, flags)
    except OSError as error:
        library = PREBUILT / _name(source, *flags)
        if not library.is_file():
            raise
        log.info("the prebuilt library of %s is used: %s", source.name, error)
        return ctypes.CDLL(str(library))


def origin(library: ctypes.CDLL) -> str:
    """Return where a library comes from, in words."""
    return "prebuilt" if Path(library._name).parent == PREBUILT else "compiled on this machine"


def prebuild(source: Path, options: str, capability: str, folder: Path) -> Path:
    """Compile a C file for CPUs of a capability into a folder. In `PREBUILT`, `load` finds the library by its name.

    Raises:
        OSError: there is no compiler, or it fails.
    """
    flags = _flags(capability, options)
    return _compile(_compiler(), flags, source, folder).rename(folder / _name(source, *flags))


def _flags(capability: str, options: str) -> list[str]:
    return [*FLAGS.split(), *FEATURES.get(capability, "").split(), *options.split()]


def _name(source: Path, *settings: str) -> str:
    files = [source, *sorted(source.parent.glob("*.h"))]
    key = hashlib.sha256(bytes(0).join([*(file.read_bytes() for file in files), " ".join(settings).encode()]))
    return f"{source.stem}-{key.hexdigest()[:16]}.so"


def _load_compiled(source: Path, flags: list[str]) -> ctypes.CDLL:
    compiler = _compiler()
    name = _name(source, *compiler, *flags, LINK_FLAGS, platform.platform())
    with TemporaryDirectory() as folder:
        library = _cache_path(name)
        if library is None or not library.is_file():
            library = _store(_compile(compiler, flags, source, Path(folder)), library)
        try:
            return ctypes.CDLL(str(library))  # stays usable after its file is deleted
        except OSError as error:
            library.unlink(missing_ok=True)  # the next process tries again
            raise OSError(str(error).removeprefix(f"{library}: ")) from error


def _compiler() -> list[str]:
    command = shlex.split(os.environ.get("CC", ""))
    command = command or next(([name] for name in COMPILERS if shutil.which(name)), [])
    if not command:
        raise OSError("no C compiler; install gcc or clang, or set $CC")
    return command


def _compile(compiler: list[str], flags: list[str], source: Path, folder: Path) -> Path:
    code, library = folder / f"{source.stem}.o", folder / f"{source.stem}.so"
    for command in (
        [*flags, "-c", str(source), "-o", str(code)],
        [*LINK_FLAGS.split(), str(code), "-lm", "-o", str(library)],
    ):
        try:
            done = subprocess.run([*compiler, *command], capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except subprocess.TimeoutExpired as error:
            raise OSError(f"{Path(compiler[0]).name} took more than {TIMEOUT} seconds") from error
        if done.returncode:
            message = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
            raise OSError(f"{Path(compiler[0]).name} failed: {message or f'exit code {done.returncode}'}")
    return library


def _cache_path(name: str) -> Path | None:
    """Return the path of a library in the cache, None if the folder cannot be created."""
    folder = cache_folder() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder / name


def _store(library: Path, path: Path | None) -> Path:
    """Copy a library to its path in the cache and return that path; where it cannot be written, the library's own."""
    if path is None:
        return library
    try:
        write_file(path, library.read_bytes())
    except OSError:
        return library
    return path
