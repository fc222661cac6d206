"""The one operation, y[t] = f(x[t]) + Σ_a w_a · scaling_a · B_a (A_a x[t]), and how it is computed.

Knows tensors and row numbers; knows no names, no files, no models. `choose.lora` is the only door.
"""
