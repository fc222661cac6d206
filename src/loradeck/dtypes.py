"""Which dtypes a device computes in natively, and which it emulates."""

from functools import cache

import torch

# The CPU instructions that a dtype needs; many common CPUs (AVX2, or AVX-512 without these) have neither.
INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


def computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a device multiplies numbers of a floating-point dtype natively, not as wider copies."""
    if dtype not in INSTRUCTIONS:
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and _cpu_computes_in(dtype)


def cpu_has(*instructions: str) -> bool:
    """Whether torch finds one of these instructions on the CPU, by its names for them."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 and later
    return any(capabilities.get(name) for name in instructions)


@cache
def _cpu_computes_in(dtype: torch.dtype) -> bool:
    return cpu_has(*INSTRUCTIONS[dtype])
