"""The idea in seven lines, on the toy model: add, train, save, load, route, blend."""

import tempfile

import torch

from loradeck import Bank, LoraConfig
from loradeck.toy import COLOURS, ToyModel, generate_token

torch.manual_seed(42)
base, ids = ToyModel(64), torch.arange(8)[None]
bank = Bank(base)
for colour in ("indigo", "red"):
    bank.add(colour, LoraConfig(r=4, target_modules=["linear"]))
    optimizer = torch.optim.AdamW(bank.parameters(colour), lr=1e-2)
    for _ in range(30):
        with bank.route(colour):
            loss = torch.nn.functional.cross_entropy(base(ids)[:, -1], torch.tensor([COLOURS.index(colour)]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
with tempfile.TemporaryDirectory() as folder:
    bank.save("red", f"{folder}/red")
    bank.unload("red")
    bank.load(f"{folder}/red")
with bank.route(["indigo", "red", None, {"indigo": 0.5, "red": 0.5}]):
    print(bank.names(), generate_token(base, ids.repeat(4, 1)))
bank.detach()
