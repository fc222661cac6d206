"""Which dtypes a device computes in, and which it only emulates. Knows devices; knows no layers."""

from functools import cache

import torch

# What a CPU must be able to do; many that people own (AVX2, or AVX-512 without these) can do neither.
INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


def computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Say whether a device multiplies numbers of a floating dtype, rather than wider copies of them."""
    if dtype not in INSTRUCTIONS:
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and _cpu_computes_in(dtype)


@cache
def _cpu_computes_in(dtype: torch.dtype) -> bool:
    able = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 and later
    return any(able.get(name) for name in INSTRUCTIONS[dtype])
