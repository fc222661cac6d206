import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loradeck.cli.writers import Kind, metric_writer
from loradeck.errors import LoradeckError
from loradeck.train.events import AnyEvent, End, Evaluation, Sample, Step, encode


def step(job: str, step: int, **more: float) -> Step:
    return Step(
        job=job,
        step=step,
        seconds=2.0 * step,
        took=2.0,
        steps=4,
        loss=4.0 / step,
        learning_rate=0.5**step,
        grad_norm=3.0,
        tokens=100 * step,
        supervised=10,
        memory=1,
        accuracy=more.get("accuracy"),
    )


EVENTS: list[AnyEvent] = [
    step("poet", 1),
    step("judge", 1, accuracy=0.5),
    step("poet", 2),
    Evaluation(job="poet", step=2, seconds=4.5, loss=1.5, tokens=7, best=True),
    Sample(job="poet", step=2, seconds=5.0, prompt="Hi", expected="Ahoy\n![x](y)", answer="Aye"),
    End(job="poet", step=2, seconds=6.0, reason="early stop", kept=2),
]


WRITE = """
import sys
from pathlib import Path
from loradeck.train.events import decode
from loradeck.cli.writers import metric_writer

folder = Path(sys.argv[1])
with metric_writer("trackio", folder / "out") as listen:
    for line in (folder / "metrics.jsonl").read_bytes().splitlines():
        listen(decode(line))
"""


def test_tensorboard_reads_the_events(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with metric_writer("tensorboard", tmp_path) as listen:
        for event in EVENTS:
            listen(event)
    read = EventAccumulator(str(tmp_path)).Reload()
    scalars = {tag: [(e.step, pytest.approx(e.value)) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert scalars == {
        "poet/loss": [(1, 4.0), (2, 2.0)],
        "poet/learning_rate": [(1, 0.5), (2, 0.25)],
        "poet/grad_norm": [(1, 3.0), (2, 3.0)],
        "poet/tokens_per_second": [(2, 50.0)],
        "poet/validation_loss": [(2, 1.5)],
        "judge/loss": [(1, 4.0)],
        "judge/accuracy": [(1, 0.5)],
        "judge/learning_rate": [(1, 0.5)],
        "judge/grad_norm": [(1, 3.0)],
    }
    (text,) = read.Tensors("poet/sample/text_summary")
    (words,) = text.tensor_proto.string_val
    assert text.step == 2
    assert words.decode() == "prompt:\n\n    Hi\n\nexpected:\n\n    Ahoy\n    ![x](y)\n\nanswer:\n\n    Aye"


def test_events_are_written_after_an_error(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def fail() -> None:
        with metric_writer("tensorboard", tmp_path) as listen:
            listen(EVENTS[0])
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert [each.value for each in EventAccumulator(str(tmp_path)).Reload().Scalars("poet/loss")] == [4.0]


def test_trackio_reads_the_events(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    environment = {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": ":".join(sys.path)}  # read at import

    def python(code: str, *arguments: str) -> str:
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def read(what: str, *arguments: str) -> dict[str, Any]:
        get = ("get", what, "--project", "loradeck", "--run", "out", "--json")
        return json.loads(python("from trackio.cli import main; main()", *get, *arguments))

    (tmp_path / "metrics.jsonl").write_bytes(b"".join(map(encode, EVENTS)))
    python(WRITE, str(tmp_path))
    for metric, expected in {
        "poet/loss": [(1, 4.0), (2, 2.0)],
        "poet/tokens_per_second": [(2, 50.0)],
        "poet/validation_loss": [(2, 1.5)],
        "judge/accuracy": [(1, 0.5)],
    }.items():
        values = read("metric", "--metric", metric)["values"]
        assert [(each["step"], each["value"]) for each in values] == expected
    assert "![x](y)" in json.dumps(read("report", "--report", "poet/sample"))


@pytest.mark.parametrize(("kind", "module"), [("tensorboard", "torch.utils.tensorboard"), ("trackio", "trackio")])
def test_a_package_that_is_missing_is_named(
    kind: Kind, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LoradeckError, match=rf"pip install 'loradeck\[{kind}\]'"), metric_writer(kind, tmp_path):
        pass
