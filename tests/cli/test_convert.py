import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from loradeck.lora.adapter import Adapter


def as_mlx(folder: Path) -> Path:
    """Write an adapter as mlx-lm does."""
    folder.mkdir(parents=True)
    q = "model.layers.0.self_attn.q_proj"
    save_file({f"{q}.lora_a": torch.ones(64, 2), f"{q}.lora_b": torch.ones(2, 64)}, folder / "adapters.safetensors")
    table = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 2, "scale": 10.0, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(table))
    return folder


def test_a_folder_of_mlx_lm_becomes_one_of_peft(run: Callable, tiny_folder: Path) -> None:
    as_mlx(Path("mlx"))
    ran = run("convert", "mlx", "-o", "poet")
    assert ran.code == 0, ran.err
    assert "poet: " in ran.out
    assert "rank 2, 1 modules, alpha 20\ntry: loradeck generate BASE PROMPT --adapter poet\n" in ran.out
    assert run("generate", tiny_folder, "Hello", "--adapter", "poet", "--max-new-tokens", 2).code == 0


@pytest.mark.parametrize(
    ("to", "attempt"),
    [
        ("peft", "try: loradeck generate tiny PROMPT --adapter new"),
        ("mlx", "try: mlx_lm.generate --model tiny --adapter-path new --prompt PROMPT"),
        ("gguf", "try: llama-cli -m BASE.gguf --lora new"),
        ("vllm", "try: vllm serve tiny --enable-lora --max-lora-rank 8 --lora-modules new=new"),
    ],
)
@pytest.mark.usefixtures("adapters", "tiny_folder")
def test_each_format_says_how_it_is_used(run: Callable, to: str, attempt: str) -> None:
    ran = run("convert", "adapters/poet", "-o", "new", "--to", to, "--base", "tiny")
    assert ran.code == 0, ran.err
    assert attempt in ran.out
    assert "error" not in ran.out


def test_export_and_convert_write_the_same_file(run: Callable, tiny_folder: Path, adapters: Path) -> None:
    assert run("export", "adapters/poet", "-o", "one.gguf", "--base", tiny_folder).code == 0
    assert run("convert", "adapters/poet", "-o", "two.gguf", "--base", tiny_folder, "--to", "gguf").code == 0
    assert Path("one.gguf").read_bytes() == Path("two.gguf").read_bytes()


def test_the_error_of_a_lower_rank_is_said(run: Callable, adapters: Path) -> None:
    ran = run("convert", "adapters/poet", "-o", "low", "--rank", 2)
    assert ran.code == 0, ran.err
    (line,) = [line for line in ran.out.splitlines() if line.startswith("error of the update: ")]
    share, worst = (float(part.split("%")[0].split()[-1]) for part in line.split(";"))
    assert 0 < share <= worst < 100
    assert line.rpartition(" of ")[2] in Adapter.load("low").sites


def test_a_pickle_is_converted_by_the_command_that_its_refusal_names(
    run: Callable, tiny_folder: Path, adapters: Path
) -> None:
    tensors = adapters / "poet" / "adapter_model.safetensors"
    torch.save(load_file(tensors), tensors.with_suffix(".bin"))
    tensors.unlink()
    ran = run("generate", tiny_folder, "Hello", "--adapter", "adapters/poet")
    command = ran.err.strip().rpartition("Convert it: loradeck ")[2]
    assert command == "convert adapters/poet/adapter_model.bin -o NEW"
    assert run(*command.split()).code == 0
    assert Adapter.load("NEW").sites


@pytest.mark.parametrize(
    "command",
    [
        ["show", "{}"],
        ["generate", "tiny", "Hello", "--adapter", "{}"],
        ["chat", "tiny", "--adapter", "{}"],
        ["merge", "tiny", "{}", "-o", "merged"],
        ["diff", "{}", "adapters/poet"],
        ["publish", "{}", "store/poet"],
        ["eval", "tiny", "data.jsonl", "--adapter", "{}"],
        ["export", "tiny", "--adapter", "{}", "-o", "model.gguf"],
    ],
    ids=lambda command: command[0],
)
@pytest.mark.usefixtures("tiny_folder", "adapters")
def test_every_command_names_the_one_that_converts(run: Callable, command: list[str]) -> None:
    as_mlx(Path("mlx"))
    Path("data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert run("convert", "adapters/poet", "-o", "poet.gguf", "--base", "tiny", "--to", "gguf").code == 0
    for source, what, base in (
        ("mlx", "is an adapter of mlx-lm, not of PEFT", ""),
        ("poet.gguf", "is a GGUF file, not an adapter's folder", " --base BASE"),
    ):
        ran = run(*[part.format(source) for part in command])
        assert ran.code == 2
        assert f"{source} {what}\nConvert it: loradeck convert {source} -o NEW{base}\n" in ran.err


def test_a_lora_file_is_no_base(run: Callable, tiny_folder: Path, adapters: Path) -> None:
    assert run("convert", "adapters/poet", "-o", "poet.gguf", "--base", tiny_folder, "--to", "gguf").code == 0
    ran = run("generate", "poet.gguf", "Hello")
    assert (ran.code, "poet.gguf is a LoRA file of llama.cpp, not a base\n" in ran.err) == (2, True), ran.err


def test_the_server_names_the_command_too(run: Callable, tiny_folder: Path) -> None:
    ran = run("serve", tiny_folder, "--adapters", as_mlx(Path("mlx")))
    assert (ran.code, "Convert it: loradeck convert mlx -o NEW\n" in ran.err) == (2, True), ran.err


def test_ls_says_what_it_is(run: Callable, adapters: Path) -> None:
    as_mlx(adapters / "mlx")
    ran = run("ls", "adapters")
    assert ran.code == 0
    assert "is an adapter of mlx-lm, not of PEFT" in " ".join(ran.out.split())


def test_what_is_not_there_is_named_with_close_names(run: Callable, adapters: Path) -> None:
    ran = run("convert", "adapters/piratte", "-o", "new")
    assert (ran.code, "Did you mean adapters/pirate?" in ran.err) == (2, True), ran.err


def test_what_the_base_is_needed_for_is_said(run: Callable, adapters: Path, tiny: LlamaForCausalLM) -> None:
    ran = run("convert", "adapters/poet", "-o", "poet.gguf", "--to", "gguf")
    assert (ran.code, ran.err) == (
        2,
        "loradeck: adapters/poet does not name its base, which is needed for the names and the order of its weights\n"
        "Give it with --base.\n",
    )
    assert not Path("poet.gguf").exists()


def test_a_base_that_only_the_adapter_names_is_said_to_be_its(run: Callable, adapters: Path) -> None:
    config = Path("adapters/poet/adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "/gone/base"}))
    for arguments in ["convert", "--to", "gguf"], ["export"]:
        ran = run(arguments[0], "adapters/poet", "-o", "poet.gguf", *arguments[1:])
        assert ran.code == 2
        assert ran.err.startswith(
            "loradeck: the base that adapters/poet names cannot be used: no base at '/gone/base'\n"
        )
        assert ran.err.endswith("Or give another with --base.\n")
    ran = run("convert", "adapters/poet", "-o", "poet.gguf", "--to", "gguf", "--base", "nowhere")
    assert ran.err.startswith("loradeck: no base at 'nowhere'\n")


def test_an_output_that_exists_stays(run: Callable, adapters: Path) -> None:
    ran = run("convert", "adapters/poet", "-o", "adapters/pirate")
    assert (ran.code, "adapters/pirate exists and is not empty" in ran.err) == (2, True)
    ran = run("convert", "adapters/poet", "-o", "adapters/poet")
    assert ran.code == 2
    assert Adapter.load("adapters/poet").config.r == 4
