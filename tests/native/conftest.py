"""The step, compiled for each kind of machine that this one can be."""

import hashlib
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from loradeck.native import library, model

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
        *(pytest.param(f"{name} by {cc}", marks=pytest.mark.slow) for name in BUILDS for cc in ("clang",)),
    ],
)
def halves(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Each build, in place of this machine's own; whether it multiplies in bfloat16."""
    name, _, compiler = request.param.partition(" by ")
    if name != "native" and not AVX512:
        pytest.skip(f"{torch.backends.cpu.get_cpu_capability()}: the other builds are those of a machine with AVX-512")
    if compiler and not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if compiler:
            patch.setenv("CC", compiler)
        library.library.cache_clear()
        patch.setattr(library, "HALVES", "")
        patch.setattr(model, "HALVES", "")
        patch.setattr(model, "library", partial(lambda options, _: library.library(options), BUILDS[name]))
        yield name == "bfloat16"
    library.library.cache_clear()


@pytest.fixture(autouse=True)
def small_tensors(one_thread: None) -> None:
    """torch's own threads stay out of the way."""
