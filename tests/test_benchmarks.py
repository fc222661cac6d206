"""Benchmarks: every figure is declared, results say what they are of, pages show misses, and suites run."""

import ast
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import __main__, gguf_files, harness, report
from benchmarks.figures import Figure, Suite, Table
from benchmarks.gguf_files import NAMES
from benchmarks.harness import Run, parser
from benchmarks.models import SHAPES
from benchmarks.peers.process import Answer, System
from benchmarks.peers.workload import LONGEST, ROWS, Folder
from benchmarks.processes import take_turns, worker
from benchmarks.servers import first_answer
from benchmarks.suites import four_bits, peers
from benchmarks.systems import Case
from transformers import AutoModelForCausalLM

import gguf

ROOT = Path(__file__).parent.parent
SUITE = Suite("example", "Example", "", (Table("Example", ("part", "{row}"), (Figure("a / b", "ratio", "×", "≥ 2"),)),))


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of results, in a checkout without changes."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "_git", lambda *arguments: "abc1234\n" if arguments[0] == "rev-parse" else "")
    return tmp_path


def run(results: Path, figures: Mapping[str, Any], *arguments: str) -> dict[str, Any]:
    example = Run(SUITE, parser(SUITE, "", parts=("part", "other")), arguments)
    example.add("part", figures)
    example.end()
    files = [json.loads(path.read_text(encoding="utf-8")) for path in results.iterdir()]
    return files[0] if files else {}


# ---- figures


@pytest.mark.parametrize("suite", report.SUITES, ids=lambda suite: suite.name)
def test_every_figure_is_declared_and_every_declared_figure_is_measured(suite: Suite) -> None:
    for record in report.read_records(suite):
        for table, rows in suite.cells(record.figures).items():  # fails for a figure that is in no table
            declared = {figure.key for figure in table.figures}
            columns = {column for cells in rows.values() for column in cells}
            assert declared <= rows.keys() | columns
            assert {row for row in rows if " / " in row} <= declared, "a ratio needs a label that says of what"


@pytest.mark.parametrize("suite", report.SUITES, ids=lambda suite: suite.name)
def test_targets_are_comparisons_and_columns_of_units(suite: Suite) -> None:
    for table in suite.tables:
        for figure in table.figures:
            assert figure.met(0.0) in (None, True, False)
            assert not figure.target or table.figure(figure.key).label


def test_a_figure_in_no_table_is_an_error() -> None:
    with pytest.raises(KeyError, match="other > a"):
        SUITE.cells({"other": {"a": 1.0}})


def test_a_missed_target_is_marked() -> None:
    (figure,) = SUITE.tables[0].figures
    assert figure.text(2.5) == "2.5×, met"
    assert figure.text(1.5) == "1.5×, **✗ missed**"
    assert figure.target_text == "≥ 2×"


def test_a_key_brings_its_unit() -> None:
    table = Table("", ("{row}",), unit="µs")
    assert table.figure("decode step (ms)").number(63.507) == "63.5 ms"
    assert table.figure("switch (us)").number(31.6) == "31.6 µs"
    assert table.figure("product").number(1234.5) == "1,234 µs"


def test_what_was_not_measured_is_empty() -> None:
    table = Table("", ("{column}", "{row}"))
    rows = {"one": {"fast": 20.0, "slow": 2.0}, "two": {"slow": 9.0}}
    assert report.grid(table, rows)[2:] == ["| one | 20 | 2 |", "| two |  | 9 |"]


def test_a_faster_peer_is_named() -> None:
    figures = {
        "ratios in float32": {"16 rows / vLLM": 2.0},
        "loradeck": {"1 row (tokens/s)": 20.0, "16 rows (tokens/s)": 100.0},
        "loradeck, int8": {"1 row (tokens/s)": 90.0},
        "fast": {"1 row (tokens/s)": 50.0, "16 rows (tokens/s)": 90.0},
        "slow": {"1 row (tokens/s)": 2.0, "16 rows (tokens/s)": 9.0},
    }
    assert peers.findings(figures) == [
        "- All compute in **float32** but those that are named otherwise.",
        "- **fast** is faster at 1 row (2.50×).",
        "- **slow** is faster nowhere.",
    ]


def test_the_readme_has_seven_headlines_each_with_its_machine() -> None:
    lines = report.headlines({suite: report.read_records(suite) for suite in report.SUITES}).splitlines()[2:-2]
    assert len(lines) == len({line.split("|")[1] for line in lines}) == 7
    assert all("cores" in line.split("|")[-2] for line in lines)


# ---- records


def test_a_result_names_the_cpus_capability(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(harness, "computes_in", lambda dtype, device: True)
    record = run(results, {"a / b": 2.0000001})
    assert [path.name for path in results.iterdir()] == ["example.avx512_bf16.json"]
    assert (record["commit"], record["cpu_capability"], record["bfloat16_arithmetic"]) == ("abc1234", "AVX512", True)
    assert record["figures"] == {"part": {"a / b": 2.0}}


def test_a_run_of_some_parts_adds_to_a_record_of_the_same_commit_only(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(results, {"a / b": 1.0}, "--only", "part") == {}
    run(results, {"a / b": 1.0})
    assert run(results, {"a / b": 2.0}, "--only", "part")["figures"] == {"part": {"a / b": 2.0}}
    monkeypatch.setattr(harness, "_git", lambda *arguments: "def5678\n" if arguments[0] == "rev-parse" else "")
    assert run(results, {"a / b": 3.0}, "--only", "part")["figures"] == {"part": {"a / b": 2.0}}


def test_changes_that_are_not_committed_are_refused(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = " M src/loradeck/store.py\n M benchmarks/results/adapters.avx2.json\n?? docs/benchmarks.md\n"
    monkeypatch.setattr(harness, "_git", lambda *_: status)
    with pytest.raises(SystemExit, match=r"changed: src/loradeck/store\.py\n.*--no-record"):
        run(results, {"a / b": 1.0})
    assert run(results, {"a / b": 1.0}, "--no-record") == {}


def test_results_and_pages_are_no_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    status = " M benchmarks/results/adapters.avx2.json\n?? docs/quality.svg\n M README.md\n"
    monkeypatch.setattr(harness, "_git", lambda *_: status)
    assert harness.why_not_recorded() is None


def test_without_git_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*_: str) -> str:
        raise FileNotFoundError("git")

    monkeypatch.setattr(harness, "_git", no_git)
    assert "no git checkout" in str(harness.why_not_recorded())


# ---- suites


def test_every_suite_has_a_command_and_a_page() -> None:
    assert {suite.name for suite in report.SUITES} == {*__main__.SUITES}


@pytest.mark.parametrize("name", __main__.SUITES)
def test_a_suite_imports_no_other(name: str) -> None:
    tree = ast.parse((ROOT / "benchmarks" / "suites" / f"{name}.py").read_text(encoding="utf-8"))
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any(module.startswith("benchmarks.suites") for module in modules)


@pytest.mark.parametrize("name", __main__.SUITES)
def test_a_suite_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        import_module(f"benchmarks.suites.{name}").main(["--help"])
    out = capsys.readouterr().out
    assert out.startswith(f"usage: python -m benchmarks {name}")
    assert "--no-record" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("adapters", ("load tiny", "decode tiny")),
        ("train", ("train tiny",)),
        ("ops", ("errors tiny", "times tiny")),
        ("native", ("decode float32", "prompts float32", "busy float32")),
        ("serve", ("streams float32", "registered", "crowded", "cold")),
        ("live", ("streams float32", "training float32", "memory float32", "publish float32")),
        ("classify", ("float32 tiny, 16 tokens", "bfloat16 tiny, 64 tokens")),
        ("four_bits", tuple(f"{measure} tiny, Q4_0" for measure in four_bits.MEASURES)),
    ],
)
def test_a_suite_runs_on_random_weights(name: str, parts: tuple[str, ...]) -> None:
    option = "--files" if name == "four_bits" else "--shape"
    command = [sys.executable, "-m", "benchmarks", name, option, "tiny", "--rounds", "1", "--no-record"]
    command += ["--seconds", "2"] if name == "serve" else []
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    for part in parts:
        assert f"\n{part}\n" in process.stdout
    assert "written" not in process.stdout


def test_a_worker_works_in_a_process_of_its_own() -> None:
    with worker(partial, eval) as turn:
        assert turn("6 * 7") == 42
        assert turn("__import__('os').getpid()") != os.getpid()


def test_a_worker_that_fails_shows_why(capfd: pytest.CaptureFixture[str]) -> None:
    with worker(partial, eval) as turn, pytest.raises(EOFError):
        turn("1 / 0")
    assert "ZeroDivisionError" in capfd.readouterr().err
    with pytest.raises(EOFError), worker(eval, "1 / 0"):
        pass


PEER = """
from benchmarks.peers.workload import Answer, Server
def generate(prompts, adapters, steps):
    assert len(set(adapters)) == 1
    return Answer([[prompt[0] + (adapter or 0)] * (1 + steps) for prompt, adapter in zip(prompts, adapters)], 0.5)
Server().run(generate, {"peer": "1"}, mixes=False, score=lambda prompt: [-token / 2 for token in prompt[1:]])
"""


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[System]:
    prompts = [[*range(row * LONGEST, (row + 1) * LONGEST)] for row in range(4)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    system = System.start("peer", [sys.executable, "-c", PEER], Folder(tmp_path))
    assert system
    yield system
    system.stop()


def test_a_peer_that_does_not_mix_adapters_gets_one_after_the_other(peer: System) -> None:
    case = Case(4, 2)
    peer.warm_up(case)
    assert (peer.versions, peer.steps[case]) == ({"peer": "1"}, 6), (
        "1.5 seconds, of which a step of two groups takes 0.25"
    )
    assert peer.measure(case, tries=1) == 4 * 6 / 1.0
    assert peer.tokens[case] == [[row * LONGEST + row % 2] * 7 for row in range(4)]


def test_a_peer_scores_a_prompt(peer: System) -> None:
    assert peer.score(2, 4) == [-LONGEST - 0.5, -LONGEST - 1, -LONGEST - 1.5]


def test_prompts_that_are_timed_are_new(peer: System, monkeypatch: pytest.MonkeyPatch) -> None:
    assert peer.generate(Case(2, prompt=5), 0, first=1).tokens == [[LONGEST], [2 * LONGEST]]
    firsts: list[int] = []
    monkeypatch.setattr(peer, "generate", lambda *given: firsts.append(given[-1]) or Answer(0.0, 2.0, [], 0.0))
    assert [peer.measure_prompts(Case(2, prompt=10), tries=1) for _ in range(2)] == [10.0, 10.0]
    assert firsts == [ROWS - 2, ROWS - 4]


def test_figures_over_llama_cpp_are_declared() -> None:
    systems: dict[str, Any] = {
        name: SimpleNamespace(
            warm_up=lambda case: None,
            measure=lambda case, tries: None,
            measure_prompts=lambda case, tries: None,
            rate=lambda case, rate=rate: rate * case.rows,
            score=lambda window, length, rate=rate: [-rate / 2] * (length - 1),
        )
        for name, rate in {"loradeck": 6.0, "llama.cpp": 3.0}.items()
    }
    for file in ("smollm2", "gemma3", "llama-1b"):
        name = NAMES[file]
        figures = {
            f"decode {name}": four_bits.decode(systems, 1, 1),
            f"perplexity {name}": four_bits.perplexity(systems),
        }
        ratios, rates, perplexity = four_bits.SUITE.cells(figures).items()
        assert [cells[""] for cells in ratios[1].values()] == [2.0] * 4
        assert {figure.key for figure in ratios[0].figures} == ratios[1].keys()
        assert {cells[name] for cells in rates[1].values()} == {3.0, 6.0, 48.0, 96.0}
        assert perplexity[1]["loradeck / llama.cpp"][name] == pytest.approx(math.exp(1.5))


@pytest.mark.parametrize("kind", gguf_files.SCALES)
def test_random_blocks_are_as_large_as_trained_ones(kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    weights = gguf.dequantize(gguf_files.random_blocks(number, 1 << 16, np.random.default_rng(0)), number)
    assert weights.size == 1 << 16
    assert weights.std() == pytest.approx(0.02, rel=0.05)
    assert abs(weights.mean()) < 0.003


def test_a_server_that_ends_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ended with code 3"):
        first_answer([sys.executable, "-c", "raise SystemExit(3)"], "model")


def test_a_peer_that_fails_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert System.start("peer", [sys.executable, "-c", "raise SystemExit('no such package')"], Folder(tmp_path)) is None
    assert capsys.readouterr().out == "left out: peer ended with code 1: ['no such package']\n"


def test_nobody_is_always_the_first_to_take_a_turn() -> None:
    order: list[str] = []
    results = take_turns({name: lambda name=name: order.append(name) or len(order) for name in "abc"}, rounds=3)
    assert order == [*"abc", *"bca", *"cab"]
    assert results == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_one_line() -> None:
    command = [sys.executable, "-m", "benchmarks", "adapters", "--device", "cuda"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == f"benchmarks: torch {torch.__version__} finds no CUDA device; nothing was measured.\n"


@pytest.mark.parametrize(("shape", "count"), [("Llama-3.2-1B", 1_235_814_400), ("Llama-3.1-8B", 8_030_261_248)])
def test_shapes_are_the_real_ones(shape: str, count: int) -> None:
    """As many parameters as the models have on the hub."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[shape]())
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model.config.rope_parameters["rope_type"] == "llama3"
