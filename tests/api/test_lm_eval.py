"""lm-eval through an adapter: its scores and answers are those of the model.

lm-eval runs as a program, with this Python or the one that LM_EVAL_PYTHON names.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from loradeck import AdapterStore, Bank, Base, generate

from .conftest import LocalServer

PYTHON = os.environ.get("LM_EVAL_PYTHON", sys.executable)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "LM_EVAL_PYTHON" not in os.environ and find_spec("lm_eval") is None,
        reason="needs pip install 'lm-eval[api]' transformers, or LM_EVAL_PYTHON: a Python that has them",
    ),
]

QUESTIONS = [
    {"question": "The sea is", "choices": ["salty", "swëet", "dry"], "answer": 0},
    {"question": "Rabbits eat", "choices": ["hay", "stones"], "answer": 1},
    {"question": "Ü", "choices": ["a", "b", "c", "d"], "answer": 3},
]
CHOOSE = """\
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
GO_ON = """\
task: go_on
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\0"], max_gen_toks: 6, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


def evaluate(folder: Path, url: str, **arguments: object) -> dict[str, list[dict]]:
    """Run both tasks on `poet`; return each one's samples, in the order of the questions."""
    file = folder / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, text in (("choose", CHOOSE), ("go_on", GO_ON)):
        (folder / f"{name}.yaml").write_text(text.format(file=file))
    settings = {"model": "poet", "base_url": f"{url}/v1/completions", "max_length": 256, **arguments}
    command = [PYTHON, "-m", "lm_eval", "run", "--model", "local-completions", "--tasks", "choose,go_on"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in settings.items())]
    command += ["--include_path", str(folder), "--output_path", str(folder / "out"), "--log_samples"]
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    samples = {}
    for name in ("choose", "go_on"):
        (log,) = (folder / "out").rglob(f"samples_{name}_*.jsonl")
        samples[name] = sorted(map(json.loads, log.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return samples


def logprob(base: Base, question: str, answer: str) -> float:
    """The log-probability of an answer, by the model itself."""
    before, ids = (base.tokenizer(text)["input_ids"] for text in (question, f"{question} {answer}"))
    logprobs = base.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logprobs[at - 1, ids[at]].item() for at in range(len(before), len(ids)))


@pytest.mark.parametrize("backend", ["remote", "huggingface"])
def test_lm_eval_agrees_with_the_model(
    server: LocalServer, base: Base, store: AdapterStore, tiny_folder: Path, tmp_path: Path, backend: str
) -> None:
    settings = {"tokenizer_backend": backend} | ({"tokenizer": tiny_folder} if backend == "huggingface" else {})
    with server.listening() as (url, _):
        samples = evaluate(tmp_path, url, num_concurrent=2, **settings)
    bank = Bank(base.model)
    bank.load(store.find("poet").path, "poet")
    with torch.inference_mode(), bank.route("poet"):
        for sample, question in zip(samples["choose"], QUESTIONS, strict=True):
            expected = [logprob(base, question["question"], choice) for choice in question["choices"]]
            assert [float(resp[0][0]) for resp in sample["resps"]] == pytest.approx(expected, abs=1e-3)
            assert sample["acc"] == float(expected.index(max(expected)) == question["answer"])
    prompts = [base.tokenizer(question["question"])["input_ids"] for question in QUESTIONS]
    answers = generate(base, bank, prompts, "poet", max_new_tokens=6)
    assert [sample["resps"][0][0] for sample in samples["go_on"]] == answers
