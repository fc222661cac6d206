"""The step, compiled for each kind of machine that this one can be."""

import ctypes
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loradeck.native import library, model
from loradeck.ops import compiler

EMULATION = Path(__file__).with_name("emulated.h")
DIGEST = hashlib.sha256(EMULATION.read_bytes()).hexdigest()[:8]
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
BUILDS = {  # the compiler's options, besides those for this machine
    "native": "",
    "AVX2": "-mno-avx512f -mtune=znver3",  # for which gcc prefers not to fuse some products
    "SSE2": "-mno-avx -mno-fma",
    "bfloat16": f"-DHALVES -include {EMULATION} -DEMULATION=0x{DIGEST}",
}


@pytest.fixture(
    scope="module",
    params=[
        *BUILDS,
        *(pytest.param(f"{name} by clang", marks=pytest.mark.slow) for name in BUILDS),
    ],
)
def build(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of each build, which is compiled from now on in place of this machine's own."""
    name, _, compiler = request.param.partition(" by ")
    if name != "native" and not AVX512:
        pytest.skip(f"{torch.backends.cpu.get_cpu_capability()}: the other builds are those of a machine with AVX-512")
    if compiler and not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if compiler:
            patch.setenv("CC", compiler)
        library.library.cache_clear()
        patch.setattr(model, "library", lambda _: library.library(BUILDS[name]))
        yield name
    library.library.cache_clear()


@pytest.fixture(scope="module")
def halves(build: str) -> bool:
    """Whether the build multiplies in bfloat16."""
    return build == "bfloat16"


@pytest.fixture(scope="module")
def compiled(build: str) -> ctypes.CDLL:
    """The step."""
    return model.library("")


@pytest.fixture(scope="module")
def parts(build: str) -> ctypes.CDLL:
    """Parts of the step by themselves."""
    sources = b"".join(path.read_bytes() for path in sorted(library.SOURCE.parent.glob("*.[ch]")))
    digest = hashlib.sha256(sources).hexdigest()[:8]
    options = f"-O1 -ffp-contract=off {BUILDS[build]} -I {library.SOURCE.parent} -DSOURCES=0x{digest}"
    return compiler.load(Path(__file__).with_name("parts.c"), options)


@pytest.fixture(autouse=True)
def small_tensors(one_thread: None) -> None:
    """torch's own threads stay out of the way."""
