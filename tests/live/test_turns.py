"""Turns between training and requests, by a clock that the tests set."""

from collections.abc import Callable
from itertools import pairwise

import pytest

from loradeck.live.turns import Turns

SLICE = 20.0


class Machine:
    """A machine on which a piece of training and a step of requests take so long."""

    def __init__(self, share: float, *, piece: float, step: float) -> None:
        self.now, self.piece, self.step = 0.0, piece, step
        self.turns = Turns(share, SLICE, clock=lambda: self.now)
        self.requests: Callable[[], bool] = lambda: True
        self.log: list[tuple[str, float]] = []
        """What computed, and when it was done."""

    def serve(self) -> bool:
        if not self.requests():
            return False
        self.now += self.step
        self.log.append(("step", self.now))
        return True

    def train(self, pieces: int) -> None:
        with self.turns.turn():
            for _ in range(pieces):
                self.now += self.piece
                self.log.append(("piece", self.now))
                self.turns.pause(self.serve)

    def spent(self) -> dict[str, float]:
        """Time by what computed."""
        kinds = [kind for kind, _ in self.log]
        return {"piece": self.piece * kinds.count("piece"), "step": self.step * kinds.count("step")}


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("piece", [0.5, 7.0, 30.0])
def test_training_has_its_share_while_requests_compute(share: float, piece: float) -> None:
    machine = Machine(share, piece=piece, step=1.0)
    machine.train(5000)
    spent = machine.spent()
    assert spent["piece"] / sum(spent.values()) == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_no_step_waits_longer_than_a_slice_and_a_piece(share: float) -> None:
    machine = Machine(share, piece=3.0, step=50.0)
    machine.train(1000)
    ends = [at for kind, at in machine.log if kind == "step"]
    assert max(after - before - machine.step for before, after in pairwise(ends)) < SLICE + 3.0


def test_steps_longer_than_the_share_leaves_them_alternate_with_slices() -> None:
    machine = Machine(0.5, piece=10.0, step=100.0)
    machine.train(40)
    kinds = "".join(kind[0] for kind, _ in machine.log)
    assert kinds == "ps" + "pps" * 19 + "p"


def test_without_requests_training_has_all() -> None:
    machine = Machine(0.2, piece=5.0, step=1.0)
    machine.requests = lambda: False
    machine.train(100)
    assert {kind for kind, _ in machine.log} == {"piece"}


def test_what_arrives_while_training_is_alone_is_served_at_the_next_pause() -> None:
    machine = Machine(0.2, piece=1.0, step=1.0)
    machine.requests = lambda: machine.now >= 1000.5
    machine.train(1100)
    first = next(at for kind, at in machine.log if kind == "step")
    assert first == 1002.0
    # However long it trained alone, the requests have what the share leaves them of one slice, not more.
    kinds = [kind for kind, _ in machine.log[1001:]]
    assert kinds[: kinds.index("piece")] == ["step"] * int(SLICE * 4)


def test_when_requests_end_training_goes_on_at_once() -> None:
    machine = Machine(0.2, piece=1.0, step=1.0)
    left = iter([True] * 3)
    machine.requests = lambda: next(left, False)
    machine.train(100)
    assert [kind for kind, _ in machine.log] == ["piece", "step", "step", "step"] + ["piece"] * 99


def test_what_computes_between_passes_is_not_training() -> None:
    """Passes that are shorter than a slice add up to one."""
    machine = Machine(0.5, piece=1.0, step=1.0)
    for _ in range(500):
        machine.train(2)
        machine.serve()
    spent = machine.spent()
    outside = 500 * machine.step
    assert spent["piece"] / (sum(spent.values()) - outside) == pytest.approx(0.5, rel=0.1)
