"""Two adapters trained in one pass, each on its own rows only."""

import torch
from torch.nn.functional import mse_loss

from loradeck import Bank, LoraConfig

torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).requires_grad_(False)
bank = Bank(base)
bank.add("sum", LoraConfig(r=4, target_modules=["0", "2"]))
bank.add("product", LoraConfig(r=8, target_modules=["0", "2"]))
optimizers = [
    torch.optim.AdamW(bank.parameters("sum"), lr=1e-2),
    torch.optim.AdamW(bank.parameters("product"), lr=3e-3),
]
for step in range(301):
    x = torch.rand(64, 8)
    wanted = torch.cat([x[:32].sum(1), x[32:].prod(1)])
    with bank.route(["sum"] * 32 + ["product"] * 32):
        errors = mse_loss(base(x).squeeze(1), wanted, reduction="none")
    (errors[:32].mean() + errors[32:].mean()).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    if step % 100 == 0:
        print(f"step {step}: sum {errors[:32].mean():.4f}, product {errors[32:].mean():.5f}")
