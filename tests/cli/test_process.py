import os
import subprocess
import sys

import pytest

from loradeck.cli import process

# Print glibc's report of its arenas after eight threads have allocated and freed memory.
COUNT = """
import ctypes, re, threading
from loradeck.cli import process
if {shared}: assert process.cap_allocator()
together = threading.Barrier(8)
def use():
    libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p; libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(5000) for _ in range(100)]
    together.wait()
    for each in blocks: libc.free(each)
threads = [threading.Thread(target=use) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p; libc.fopen.argtypes = [ctypes.c_char_p] * 2
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]; libc.fclose.argtypes = [ctypes.c_void_p]
file = libc.fopen(b"/dev/stdout", b"w"); libc.malloc_info(0, file); libc.fclose(file)
"""


@pytest.mark.skipif(not hasattr(process.ctypes.CDLL(None), "malloc_info"), reason="needs glibc")
@pytest.mark.parametrize(("shared", "most"), [(True, 2), (False, 99)])
def test_threads_share_arenas(shared: bool, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    report = subprocess.run([sys.executable, "-c", COUNT.format(shared=shared)], capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    arenas = report.stdout.count("<heap nr=")
    assert arenas <= most
    assert shared or arenas > 2


def test_the_users_variables_take_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    assert not process.cap_allocator()
