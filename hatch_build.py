"""Puts compiled C code into a wheel, for `make wheels`. Without this hook a wheel is pure, and compiles on the machine.

It needs the project's dependencies.
"""

import platform
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags


class PrebuiltLibraries(BuildHookInterface):
    """The libraries that `loradeck.ops.compiler.load` looks for on the CPUs of this platform."""

    def initialize(self, _: str, build_data: dict[str, Any]) -> None:
        """Compile them, and tag the wheel with the platform."""
        source, folder = Path(self.root) / "src", Path(self.root) / "build" / "prebuilt"
        folder.mkdir(parents=True, exist_ok=True)
        sys.path.insert(0, str(source))
        from loradeck.native import library, varlen_attention
        from loradeck.ops import compiler, cpu

        x86 = platform.machine() in ("x86_64", "AMD64")
        builds = [
            (file, options, capability)
            for file, options in ((cpu.SOURCE, ""), (varlen_attention.SOURCE, ""), (library.SOURCE, library.OPTIONS))
            for capability in (compiler.FEATURES if x86 else ("DEFAULT",))
        ]
        if x86:
            more = (library.BYTES, library.HALVES)
            builds += [(library.SOURCE, f"{library.OPTIONS} {options}", "AVX512") for options in more]
        for build in builds:
            path = compiler.prebuild(*build, folder)
            build_data["force_include"][str(path)] = str(compiler.PREBUILT.relative_to(source) / path.name)
        tag = next(tag for tag in platform_tags() if not tag.startswith(("manylinux", "musllinux")))
        build_data["tag"], build_data["pure_python"] = f"py3-none-{tag}", False
