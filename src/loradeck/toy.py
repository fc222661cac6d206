"""The tutorial's toy language model, with a vocabulary of ten colours."""

import torch
from torch import Tensor, nn

COLOURS = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "indigo",
    "violet",
    "magenta",
    "marigold",
    "chartreuse",
)


class ToyModel(nn.Module):
    """Embedding, linear layer and output head."""

    def __init__(self, hidden_size: int) -> None:
        """Initialise the weights from torch's global generator: embedding, linear, lm_head, in this order."""
        super().__init__()
        self.embedding = nn.Embedding(len(COLOURS), hidden_size)
        self.linear = nn.Linear(hidden_size, hidden_size)
        self.lm_head = nn.Linear(hidden_size, len(COLOURS))

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids (batch, sequence) -> logits (batch, sequence, 10)."""
        return self.lm_head(self.linear(self.embedding(input_ids)))


def generate_token(model: nn.Module, input_ids: Tensor) -> list[str]:
    """Return the most likely next colour of each row of input_ids (batch, sequence)."""
    with torch.no_grad():
        logits = model(input_ids)
    return [COLOURS[token] for token in logits[:, -1, :].argmax(dim=-1).tolist()]
