"""`loradeck studio` as a process: it makes the folder of adapters, trains, and opens the page."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow

TIMEOUT = 600.0  # seconds; only a deadlock takes as long


def test_it_serves_the_page_and_opens_it(tmp_path: Path, tiny_folder: Path) -> None:
    opened, browser = tmp_path / "opened.txt", tmp_path / "browser.sh"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {opened}.new && mv {opened}.new {opened}\n')
    browser.chmod(0o755)
    command = [sys.executable, "-W", "error", "-m", "loradeck", "studio", str(tiny_folder), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "BROWSER": f"{browser} %s"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as process:
        try:
            assert process.stdout is not None
            ready, _, page = [process.stdout.readline().strip() for _ in range(3)]
            url = ready.split(" on ")[1].split(",")[0]
            assert page == f"or open {url} in a browser"
            assert "<title>loradeck</title>" in httpx.get(url, timeout=TIMEOUT).text
            rights = httpx.get(f"{url}/v1/key", timeout=TIMEOUT).json()
            assert (rights["train"], rights["store"], rights["control"]) == (True, True, True)
            assert (tmp_path / "adapters").is_dir()
            deadline = time.monotonic() + TIMEOUT
            while not opened.exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert opened.read_text() == url
        finally:
            process.kill()


def test_a_file_is_no_folder_of_adapters(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "adapters").touch()
    ran = run("studio", "tiny", "--adapters", tmp_path / "adapters", "--no-browser")
    assert ran.code == 2
    assert f"{tmp_path / 'adapters'} is a file, not a folder of adapters" in ran.err


def test_what_fails_leaves_no_folder(run: Callable[..., Any], tmp_path: Path) -> None:
    ran = run("studio", "no-such-base", "--adapters", tmp_path / "new", "--no-browser", "--port", 0)
    assert ran.code == 2
    assert "no-such-base" in ran.err
    assert not (tmp_path / "new").exists()
