"""A kill -9 while an adapter is saved over another: the folder holds one of the two, whole."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.digest import digest

from loradeck import Adapter, LoraConfig
from loradeck.lora.manifest import read_folder

ROUNDS = 10

# For each line it reads, forks a process that saves two adapters in turn over one folder, and tells of each save.
# Only the child is killed, so that torch is imported once.
SAVE = """
import os, sys
from loradeck import Adapter
folder, *two = sys.argv[1:]
two = [Adapter.load(one) for one in two]
for line in sys.stdin:
    turn = int(line)
    child = os.fork()
    if child == 0:
        print(f"child {os.getpid()}", flush=True)
        while True:
            two[turn % 2].save(folder)
            print(f"saved {turn % 2}", flush=True)
            turn += 1
    _, status = os.waitpid(child, 0)
    print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)
"""


def adapter(r: int, modules: int) -> Adapter:
    generator = torch.Generator().manual_seed(r)
    pairs = {
        f"layers.{i}.linear": (torch.randn(r, 1024, generator=generator), torch.randn(1024, r, generator=generator))
        for i in range(modules)
    }
    return Adapter.of(LoraConfig(r=r, lora_alpha=3 * r), pairs)


@pytest.mark.slow
def test_kill_while_saving_over_another(tmp_path: Path) -> None:
    sources, folder = [tmp_path / "one", tmp_path / "two"], tmp_path / "here" / "it"
    for made, source in zip((adapter(8, 30), adapter(24, 40)), sources, strict=True):
        made.save(source)
    hashes = {digest(Adapter.load(source)): read_folder(source) for source in sources}
    assert len(hashes) == 2
    folder.mkdir(parents=True)
    (folder / "notes").write_text("mine")
    chance = random.Random(0)
    found: list[str] = []
    torn, deadline = 0, time.monotonic() + 300
    command = [sys.executable, "-c", SAVE, str(folder), *map(str, sources)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            # As many rounds as it takes to meet both adapters, and a save that is under way.
            for turn in itertools.count():
                if turn >= ROUNDS and torn and set(found) == set(hashes):
                    break
                assert time.monotonic() < deadline, f"after {turn} kills: met {len(set(found))} of 2, {torn} torn"
                process.stdin.write(f"{turn}\n")
                process.stdin.flush()
                kind, pid = process.stdout.readline().split()
                assert kind == "child"
                assert process.stdout.readline() == f"saved {turn % 2}\n"
                time.sleep(chance.uniform(0, 0.1))
                os.kill(int(pid), signal.SIGKILL)
                while (line := process.stdout.readline().split())[0] == "saved":
                    pass
                assert line == ["ended", str(-signal.SIGKILL)]

                loaded, listing = Adapter.load(folder), read_folder(folder)
                found.append(digest(loaded))
                wanted = hashes[found[-1]]  # one of the two, and its own config with it
                assert (listing.config, listing.sites) == (wanted.config, wanted.sites)
                assert (folder / "notes").read_text() == "mine"
                torn += any(path != folder for path in folder.parent.iterdir())
        finally:
            process.kill()
