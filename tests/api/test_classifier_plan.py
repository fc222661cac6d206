"""Checks and plans on a base that classifies."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.classifiers import make
from transformers import PreTrainedTokenizerFast

from loradeck import AdapterStore, Base
from loradeck.api.metrics import Metrics
from loradeck.base.fingerprint import fingerprint
from loradeck.live.live_training import LiveTraining
from loradeck.serve.config import EngineConfig
from loradeck.serve.pooling_engine import PoolingEngine

from .conftest import LocalServer
from .test_file_check import CHAT, PAIR, check, lines
from .test_job_plan import JOBS, PLAN, plan

LABELLED = lines(*({"text": f"text {n}", "label": "good" if n % 3 else "bad"} for n in range(9)))


@pytest.fixture
def classifier(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, one_thread: None) -> Iterator[LocalServer]:
    model = make("bert", "classify", 2, 1).eval().requires_grad_(False)
    base = Base(model, tiny_tokenizer, "tiny", "org/tiny", fingerprint(model), task="classify")
    metrics = Metrics("tiny")
    (tmp_path / "store").mkdir()
    with (
        PoolingEngine(base, AdapterStore(tmp_path / "store"), EngineConfig(), observer=metrics) as engine,
        LiveTraining(engine, tmp_path / "live") as training,
    ):
        yield LocalServer(engine, metrics, {"training": training})


def test_labels_are_counted(classifier: LocalServer) -> None:
    result = check(classifier, LABELLED)
    assert (result["form"], result["method"], result["problems"]) == ("text and label", "supervised", [])
    assert result["splits"]["train"]["labels"] == {"good": 6, "bad": 3}
    assert result["first"][0]["spans"]


@pytest.mark.parametrize("content", [lines(CHAT), lines(PAIR)])
def test_records_for_another_task_are_a_problem(classifier: LocalServer, content: bytes) -> None:
    (problem,) = check(classifier, content)["problems"]
    assert "unknown form" in problem["message"]
    assert problem["hint"] == "These records are for another task."


def test_a_plan(classifier: LocalServer) -> None:
    response = plan(classifier, LABELLED, lora={"r": 2})
    assert response.status_code == 200, response.text
    result = response.json()
    assert (result["examples"], result["form"], result["supervised"]) == (9, "text and label", 9)
    assert result["adapter_bytes"] == 4 * result["trainable"]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"lora": {"samples": 1}}, "lora", "samples are answers of bases that generate"),
        ({"method": {"type": "dpo"}}, "lora", "the method dpo is for bases that generate"),
    ],
)
def test_what_only_bases_that_generate_have(
    classifier: LocalServer, body: dict[str, Any], param: str, says: str
) -> None:
    for path in (PLAN, JOBS):
        response = plan(classifier, LABELLED, path, **body)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param
        assert says in error["message"]
