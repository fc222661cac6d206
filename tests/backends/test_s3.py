"""A store on a real S3 server: publishing by many, faults of the network and of the server, kill -9."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.backends.conftest import BUCKET
from tests.backends.s3_server import Fault, Faults
from tests.test_store import adapter

from loradeck.backends import answers, place
from loradeck.errors import AdapterError, StoreUnreachableError
from loradeck.store import AdapterStore

URL = f"s3://{BUCKET}/adapters"
TENSORS = r"^GET .*/adapter_model\.safetensors"


@pytest.fixture
def store(s3: Faults) -> AdapterStore:
    return AdapterStore(URL)


def empty(cache: Path) -> None:
    """Take all out of the cache."""
    for folder in (cache / "adapters").glob("*-*"):
        folder.rename(cache / f"old-{folder.name}")


def folders(cache: Path) -> list[str]:
    return [path.name for path in (cache / "adapters").iterdir() if path.name != ".lock"]


def test_it_is_a_store(store: AdapterStore, s3: Faults, cache: Path) -> None:
    first = store.publish("poet", adapter(2)).sha256()
    assert store.publish("poet", adapter(3)).spec == "poet@2"
    store.publish("pirate", adapter(2))
    empty(cache)
    other = AdapterStore(URL)
    s3.requests.clear()
    assert [stored.spec for stored in other.latest()] == ["pirate@1", "poet@2"]
    assert not [request for request in s3.requests if "safetensors" in request]
    assert other.find("poet@1").sha256() == first
    assert other.remove("poet") == [1, 2]
    assert AdapterStore(URL).names() == ["pirate"]
    assert other.publish("poet", adapter(2)).version == 3


def test_a_large_file_comes_in_parts(store: AdapterStore, s3: Faults, cache: Path, monkeypatch) -> None:
    published = store.publish("poet", adapter(2))
    sha256, size = published.sha256(), (published.path / "adapter_model.safetensors").stat().st_size
    empty(cache)
    monkeypatch.setattr(place, "PART", 1000)
    s3.requests.clear()
    assert AdapterStore(URL).find("poet").sha256() == sha256
    parts = [request for request in s3.requests if request.startswith("GET") and "safetensors" in request]
    assert len(parts) == -(-size // 1000)


# ---- faults


@pytest.mark.parametrize("kind", ["busy", "cut", "wrong", "lost"])
def test_a_fault_that_passes_is_not_noticed(store: AdapterStore, s3: Faults, cache: Path, kind) -> None:
    sha256 = store.publish("poet", adapter(2)).sha256()
    empty(cache)
    pattern = TENSORS if kind == "wrong" else r"^GET"  # what is wrong in a listing cannot be known
    fault = s3.add(Fault(kind, pattern, times=1 if kind == "wrong" else 3))
    stored = AdapterStore(URL).find("poet")
    assert fault.seen == fault.times
    assert stored.sha256() == sha256
    assert (stored.path / "adapter_model.safetensors").read_bytes() == (
        next(cache.glob("old-*")) / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("busy", StoreUnreachableError, "does not answer, or fails"),
        ("cut", StoreUnreachableError, "does not answer, or fails"),
        ("wrong", AdapterError, r"adapter_model.safetensors is not what was published: its sha256 is \w+, not"),
        ("denied", AdapterError, r"does not permit it: Access Denied\nCheck the credentials"),
    ],
)
def test_a_fault_that_stays_is_one_error_and_leaves_nothing(
    store: AdapterStore, s3: Faults, cache: Path, kind, error: type[Exception], message: str
) -> None:
    store.publish("poet", adapter(2))
    empty(cache)
    fault = s3.add(Fault(kind, TENSORS))
    with pytest.raises(error, match=message):
        AdapterStore(URL).find("poet")
    assert fault.seen == {"busy": 5, "cut": 5, "wrong": 2, "denied": 1}[kind]
    assert folders(cache) == []
    s3.faults.clear()
    assert AdapterStore(URL).find("poet").version == 1


def test_slow_answers_are_waited_for(store: AdapterStore, s3: Faults, cache: Path) -> None:
    store.publish("poet", adapter(2))
    empty(cache)
    s3.add(Fault("slow", r"^GET", seconds=0.5))
    assert AdapterStore(URL).find("poet").version == 1


def test_what_is_known_is_not_held_up_by_a_place_that_hangs(store: AdapterStore, s3: Faults, monkeypatch) -> None:
    published = store.publish("poet", adapter(2))
    assert store.find("poet") == published
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 2 * answers.REFRESH)
    monkeypatch.setattr(answers, "time", later)
    fault = s3.add(Fault("hang", "."))
    versions = [store.find("poet") for _ in range(100)]
    assert (fault.seen, fault.gate.is_set()) == (1, False)  # one request asks, and still waits
    assert versions == [published] * 100
    fault.gate.set()


def test_a_wrong_clock_is_told(store: AdapterStore, s3: Faults) -> None:
    s3.add(Fault("skewed", "."))
    with pytest.raises(AdapterError, match=r"this machine's clock is wrong.*\nSet the clock"):
        store.names()
    with pytest.raises(AdapterError, match="this machine's clock is wrong"):
        store.publish("poet", adapter(2))


def test_no_permission_to_list_or_to_write(store: AdapterStore, s3: Faults) -> None:
    s3.add(Fault("denied", "^PUT"))
    with pytest.raises(AdapterError, match=r"s3://bucket/adapters does not permit it"):
        store.publish("poet", adapter(2))
    assert store.names() == []
    s3.add(Fault("denied", "^GET"))
    with pytest.raises(AdapterError, match=r"does not permit it"):
        AdapterStore(URL).find("poet")


def test_no_such_bucket(s3: Faults) -> None:
    store = AdapterStore("s3://nobody/adapters")
    for call in (store.names, lambda: store.find("poet"), lambda: store.publish("poet", adapter(2))):
        with pytest.raises(AdapterError, match=r"s3://nobody/adapters is not there: The specified bucket"):
            call()


def test_no_credentials(s3: Faults, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(AdapterError, match=r"cannot be asked: Unable to locate credentials"):
        AdapterStore(URL).names()


def test_nobody_answers(s3: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreUnreachableError, match="does not answer"):
        AdapterStore(URL).names()


def test_a_publish_whose_last_answer_is_lost_is_one_version(store: AdapterStore, s3: Faults) -> None:
    fault = s3.add(Fault("lost", r"^PUT .*/\.versions/", times=1))
    assert store.publish("poet", adapter(2)).version == 1
    assert fault.seen == 1
    assert AdapterStore(URL).versions("poet") == [1]


# ---- many processes

PUBLISH = """
import sys
from tests.test_store import adapter
from loradeck.store import AdapterStore
store = AdapterStore(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(*(store.publish("poet", adapter(int(sys.argv[2]))).version for _ in range(5)))
"""


def process(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "error"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.slow
def test_two_processes_never_take_one_number(store: AdapterStore, s3: Faults) -> None:
    publishers = [process(PUBLISH, URL, str(r)) for r in (2, 3)]
    for each in publishers:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    outputs = []
    for each in publishers:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    outputs = [each.communicate()[0] for each in publishers]
    numbers = [[int(number) for number in output.split()] for output in outputs]
    assert sorted(numbers[0] + numbers[1]) == [*range(1, 11)]
    for own, r in zip(numbers, (2, 3), strict=True):
        assert {store.find(f"poet@{number}").facts.r for number in own} == {r}


def test_a_number_that_is_taken_meanwhile_is_not_taken_again(store: AdapterStore, s3: Faults, monkeypatch) -> None:
    """The server refuses the second (If-None-Match), however the two publishers interleave."""
    other = AdapterStore(URL)
    create = store._backend.place.create

    def after_another(path: str, content: bytes) -> bool:
        monkeypatch.setattr(store._backend.place, "create", create)
        assert other.publish("poet", adapter(3)).version == 1
        return create(path, content)

    monkeypatch.setattr(store._backend.place, "create", after_another)
    assert store.publish("poet", adapter(2)).version == 2
    assert [store.find(f"poet@{number}").facts.r for number in (1, 2)] == [3, 2]


@pytest.mark.slow
@pytest.mark.parametrize("step", [r"^PUT .*adapter_config", r"^PUT .*safetensors", r"^PUT .*/\.versions/"])
def test_killed_while_it_publishes_there_is_no_half_version(store: AdapterStore, s3: Faults, step: str) -> None:
    store.publish("poet", adapter(2))
    fault = s3.add(Fault("slow", step, seconds=5))
    publisher = process(PUBLISH, URL, "3")
    assert publisher.stdin is not None
    publisher.stdin.write("go\n")
    publisher.stdin.flush()
    while not fault.seen and publisher.poll() is None:
        time.sleep(0.01)
    publisher.send_signal(signal.SIGKILL)
    publisher.communicate()
    other = AdapterStore(URL)
    for number in other.versions("poet"):  # the last step may have been done by the server: then it is whole
        assert other.find(f"poet@{number}").sha256()
    assert other.problems() == {}
    s3.faults.clear()
    latest = other.publish("poet", adapter(4))
    assert other.find("poet") == latest
