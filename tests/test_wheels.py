"""`make wheels`: without a compiler the step is computed by a prebuilt library, and by none that the CPU cannot run."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from loradeck.base import blocked
from loradeck.native import library
from loradeck.ops import compiler, cpu

ROOT = Path(__file__).parent.parent
SITE = "purelib"
pytestmark = pytest.mark.slow
pytest.importorskip("hatchling", reason="needs pip install --group wheels")
if torch.backends.cpu.get_cpu_capability() not in compiler.FEATURES:
    pytest.skip("the wheel for x86-64 is built on a CPU with AVX2", allow_module_level=True)


def built(folder: Path, *, libraries: bool) -> Path:
    environment = {**os.environ, "HATCH_BUILD_HOOK_ENABLE_CUSTOM": str(libraries).lower()}
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("wheel"), libraries=True)


@pytest.fixture(scope="module")
def libraries(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the wheel's libraries."""
    folder = tmp_path_factory.mktemp("libraries")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder / "loradeck" / "ops" / "prebuilt"


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the wheel, which finds other packages where this one has them."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    (Path(sysconfig.get_path(SITE, vars=paths)) / "others.pth").write_text(sysconfig.get_path(SITE))
    return python


KERNELS = """
import json, torch
import loradeck
from loradeck.base import blocked
from loradeck.ops import cpu

facts = {
    "file": loradeck.__file__,
    "step": blocked.why_not_blocked(torch.float32) or blocked.origin(torch.float32),
    "adapters": cpu.why_not_available() or cpu.origin(),
}
"""
STEP = """
from transformers import LlamaConfig, LlamaForCausalLM
from loradeck.runner.choice import runner_of
from loradeck.runner.request import Request, Scheduled

torch.manual_seed(0)
config = LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
runner = runner_of(LlamaForCausalLM(config).eval())
cache = runner.new_cache(1 << 20)
requests = [Request([*range(3, 3 + length)]) for length in (40, 7)]
assert all(cache.reserve(request, len(request.tokens)) for request in requests)
logits = runner.run([Scheduled(request, len(request.tokens)) for request in requests], cache)
facts |= {"runner": type(runner).__name__, "logits": torch.cat(logits).view(torch.int32).tolist()}
"""


def run(code: str, python: Path | str, folder: Path, *emulator: str, **environment: str) -> dict[str, object]:
    """What the code finds out in a process of its own, whose cache is empty."""
    kept = {name: value for name, value in os.environ.items() if name not in ("CC", "PYTHONPATH")}
    environment = {**kept, "LORADECK_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", **environment}
    command = [*emulator, python, "-c", f"{code}\nprint(json.dumps(facts))"]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_machine_without_a_compiler_computes_the_same_bits(installed: Path, tmp_path: Path) -> None:
    prebuilt = run(KERNELS + STEP, installed, tmp_path, PATH=str(tmp_path))
    assert str(prebuilt.pop("file")).startswith(str(installed.parent.parent))
    assert not (tmp_path / "cache" / "compiled").exists()
    compiled = run(KERNELS + STEP, sys.executable, tmp_path, PYTHONPATH=str(ROOT / "src"))
    assert str(compiled.pop("file")).startswith(str(ROOT / "src"))
    assert [*(tmp_path / "cache" / "compiled").iterdir()]
    assert prebuilt == {**compiled, "step": "prebuilt", "adapters": "prebuilt"}
    assert compiled["runner"] == "NativeRunner"
    assert compiled["step"] == compiled["adapters"] == "compiled on this machine"


@pytest.mark.parametrize(("machine", "runs"), [("Haswell", True), ("Nehalem", False)])
def test_a_lesser_cpu(installed: Path, tmp_path: Path, machine: str, runs: bool) -> None:
    """Emulated: an instruction that the CPU lacks ends the process."""
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("needs qemu-x86_64")
    facts = run(KERNELS, installed, tmp_path, emulator, "-cpu", machine, PATH=str(tmp_path))
    why = "is unavailable (no C compiler; install gcc or clang, or set $CC)"
    assert facts["step"] == facts["adapters"] == ("prebuilt" if runs else why)


AVX512 = r"zmm|ymm(1[6-9]|2\d|3[01])|%k[0-7]"
CPUS = {  # as torch sees them: capability, and whether they multiply bytes and in bfloat16
    "Nehalem": ("DEFAULT", False, False),
    "Haswell": ("AVX2", False, False),
    "Zen 2": ("AVX2", False, False),
    "Skylake-X": ("AVX512", False, False),
    "Cascade Lake": ("AVX512", True, False),
    "Zen 4": ("AVX512", True, True),
    "Sapphire Rapids": ("AVX512", True, True),
    "Sapphire Rapids, held to AVX2": ("AVX2", True, True),  # ATEN_CPU_CAPABILITY
    "Graviton 2": ("DEFAULT", False, False),
    "M1": ("DEFAULT", False, False),
}


@pytest.mark.parametrize("name", CPUS)
def test_each_cpu_loads_the_library_for_its_own_instructions(
    libraries: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    capability, in_bytes, halves = CPUS[name]
    features = {"avx512_bf16": halves, "amx_bf16": True, "avx512_vnni": in_bytes}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    monkeypatch.setattr(compiler, "PREBUILT", libraries)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    in_halves = blocked.multiplies_halves(torch.bfloat16)
    assert in_halves == (halves and capability == "AVX512")
    for source, options in (
        (cpu.SOURCE, ""),
        (library.SOURCE, f"{library.OPTIONS} {library.options_for(halves=in_halves)}"),
    ):
        if capability == "DEFAULT":
            with pytest.raises(OSError, match="no C compiler"):
                compiler.load(source, options)
            continue
        code = disassembled(Path(compiler.load(source, options)._name))
        assert bool(re.search(AVX512, code)) == (capability == "AVX512")
        assert ("vdpbf16ps" in code) == (in_halves and source == library.SOURCE)
        assert ("vpdpbusd" in code) == (in_bytes and capability == "AVX512" and source == library.SOURCE)


def disassembled(path: Path) -> str:
    objdump = shutil.which("objdump", path=os.defpath)
    if objdump is None:
        pytest.skip("needs objdump")
    return subprocess.run([objdump, "-d", path], check=True, capture_output=True, text=True).stdout


def test_the_tag_names_the_platform(wheel: Path) -> None:
    tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{tag}.whl")


def test_other_wheels_have_no_libraries(tmp_path: Path) -> None:
    wheel = built(tmp_path, libraries=False)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith(".so")] == []


@pytest.mark.parametrize(("source", "options"), [(cpu.SOURCE, ""), (library.SOURCE, library.OPTIONS)])
def test_the_library_for_arm_is_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Path, options: str
) -> None:
    if shutil.which("aarch64-linux-gnu-gcc") is None:
        pytest.skip("needs aarch64-linux-gnu-gcc")
    monkeypatch.setenv("CC", "aarch64-linux-gnu-gcc")
    path = compiler.prebuild(source, options, "DEFAULT", tmp_path)
    assert path.read_bytes()[18:20] == (183).to_bytes(2, "little")  # the machine of an ELF file: AArch64
