"""The LoRA update, y[t] = f(x[t]) + Σ_a w_a · scaling_a · B_a (A_a x[t]), and its kernels.

`dispatch.lora` is the entry point; `reference.lora` is the definition.
"""
