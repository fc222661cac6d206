"""The processes that train together, each on its share of every batch.

Each has the base and the same adapters. What they compute is added up: the gradients of the adapters, in one message a
step, and the losses. So each takes the same optimizer step, and only one of them needs to write.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loradeck.errors import TrainingError

PATIENCE = timedelta(hours=1)  # another process may evaluate, sample or write meanwhile


class Group:
    """A process that trains alone."""

    rank: int = 0
    """Which of the processes this is; the first, 0, writes."""
    size: int = 1
    device: torch.device | None = None
    """Where this process computes; None leaves it to the base."""

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by the sum of all processes'; None only where none has one."""

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """Return the sum over all processes of each number."""
        return [*numbers]

    def check_same(self, facts: Callable[[], Mapping[str, object]]) -> None:
        """Wait for all processes, and check that what must be the same is. `facts` is called if there are several.

        Raises:
            TrainingError: names what differs from the first process.
        """


class ProcessGroup(Group):
    """One of several processes, which torchrun or Ray has started and torch.distributed connects."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if dist.get_backend() == "nccl":
            self.device = torch.device("cuda", torch.cuda.current_device())

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """As Group, in one message, of float32 or wider."""
        parameters = [*parameters]
        if not parameters:
            return
        dtype = reduce(torch.promote_types, (each.dtype for each in parameters), torch.float32)
        parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        counts = torch.tensor([float(each.grad is not None) for each in parameters])
        flat = torch.cat([part.flatten().to(dtype) for part in (*parts, counts.to(parts[0].device))])
        self._sum(flat)
        *sums, counts = flat.split([*(each.numel() for each in parameters), len(parameters)])
        for parameter, gradient, count in zip(parameters, sums, counts.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if count else None

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """As Group, in float64."""
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self._sum(sums)
        return sums.tolist()

    def check_same(self, facts: Callable[[], Mapping[str, object]]) -> None:
        """As Group."""
        all_facts: list[Mapping[str, object]] = [{}] * self.size
        with _connected():
            dist.all_gather_object(all_facts, facts())
        problems = [
            f"process {rank}: {name} is {value}, that of process 0 is {all_facts[0].get(name)}"
            for rank, others in enumerate(all_facts)
            for name, value in others.items()
            if value != all_facts[0].get(name)
        ]
        if problems:
            hint = "Give every process the same base, data, folder and version of loradeck."
            raise TrainingError("the processes do not train the same", problems, hint=hint)

    def _sum(self, tensor: Tensor) -> None:
        with _connected():
            dist.all_reduce(tensor)


@contextmanager
def process_group() -> Iterator[Group]:
    """Connect to the other processes that torchrun or Ray has started, if this one is one of several."""
    if dist.is_available() and dist.is_initialized():  # Ray has done so, and undoes it
        yield ProcessGroup()
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield Group()
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    with _connected():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield ProcessGroup()
        with _connected():
            dist.barrier()  # the first process still writes when the others have nothing left to do
    finally:
        dist.destroy_process_group()


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        message = str(error).strip().partition("\n")[0]
        raise TrainingError(
            f"the connection to the other processes is lost: {message}",
            hint="One of them has ended; see its own message.",
            cli="Go on with --resume.",
        ) from error
