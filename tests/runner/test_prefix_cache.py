"""Blocks of keys and values are found by their adapters, what came before them, and their own tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loradeck.runner.prefix_cache import BLOCK, PrefixCache

BASE, POET, HALF = (), (("poet", 1.0),), (("poet", 0.5),)
SIZE = 2 * BLOCK * 4 * 4  # bytes of a block here: two tensors (1, 1, BLOCK, 4) of float32


class Row:
    """What a request has computed: each token's keys say where it stands."""

    def __init__(self, length: int, label: float = 0.0) -> None:
        self.keys = torch.arange(float(length))[None, None, :, None].expand(1, 1, length, 4) + label
        self.reads = 0

    def read(self, start: int, stop: int) -> Sequence[Tensor]:
        self.reads += 1
        return [self.keys[:, :, start:stop], -self.keys[:, :, start:stop]]


def tokens(length: int, first: int = 0) -> list[int]:
    return [first, *range(1, length)]


def keep(prefixes: PrefixCache, key, own: list[int], room: int = 1 << 30, label: float = 0.0) -> Row:
    row = Row(len(own), label)
    prefixes.keep(key, own, row.read, room)
    return row


def test_whole_blocks_are_found_but_for_the_last_token() -> None:
    prefixes = PrefixCache()
    keep(prefixes, POET, tokens(3 * BLOCK + 5))
    assert len(prefixes.find(POET, tokens(3 * BLOCK + 5))) == 3
    assert len(prefixes.find(POET, tokens(3 * BLOCK + 1))) == 3
    assert len(prefixes.find(POET, tokens(3 * BLOCK))) == 2  # its last token is to be computed
    assert len(prefixes.find(POET, tokens(BLOCK))) == 0
    assert prefixes.hits == 8 * BLOCK
    assert prefixes.queries == 10 * BLOCK + 6
    blocks = prefixes.find(POET, tokens(3 * BLOCK + 5))
    found = torch.cat([block.tensors[0] for block in blocks], dim=2)
    assert torch.equal(found[0, 0, :, 0], torch.arange(3.0 * BLOCK))


def test_nothing_is_found_under_another_key() -> None:
    prefixes = PrefixCache()
    for i, key in enumerate((POET, HALF, BASE)):
        keep(prefixes, key, tokens(BLOCK), label=100.0 * i)
    for i, key in enumerate((POET, HALF, BASE)):
        block = prefixes.find(key, tokens(BLOCK + 1))[0]
        assert float(block.tensors[0][0, 0, 0, 0]) == 100.0 * i
    assert prefixes.find((("pirate", 1.0),), tokens(BLOCK + 1)) == []
    assert prefixes.find((*POET, ("pirate", 1.0)), tokens(BLOCK + 1)) == []


def test_the_same_tokens_after_others_are_others() -> None:
    prefixes = PrefixCache()
    keep(prefixes, POET, tokens(2 * BLOCK, first=0))
    keep(prefixes, POET, tokens(2 * BLOCK, first=999), label=0.5)
    own = prefixes.find(POET, [*tokens(2 * BLOCK, first=999), 1])
    assert [float(block.tensors[0][0, 0, 0, 0]) % 1 for block in own] == [0.5, 0.5]
    assert prefixes.find(POET, [*tokens(2 * BLOCK, first=5), 1]) == []


def test_what_is_known_is_not_copied_again() -> None:
    prefixes = PrefixCache()
    assert keep(prefixes, POET, tokens(4 * BLOCK)).reads == 4
    assert keep(prefixes, POET, tokens(4 * BLOCK)).reads == 0
    assert prefixes.nbytes == 4 * SIZE


def test_blocks_are_copies() -> None:
    prefixes = PrefixCache()
    row = Row(BLOCK)
    row.keys = row.keys.clone()
    prefixes.keep(POET, tokens(BLOCK), row.read, 1 << 30)
    row.keys.fill_(float("nan"))
    assert not prefixes.find(POET, tokens(BLOCK + 1))[0].tensors[0].isnan().any()


def test_the_least_recently_used_give_way_the_last_of_a_prompt_first() -> None:
    prefixes = PrefixCache()
    keep(prefixes, POET, tokens(2 * BLOCK), 4 * SIZE)
    keep(prefixes, BASE, tokens(2 * BLOCK), 4 * SIZE)
    prefixes.find(POET, tokens(2 * BLOCK + 1))
    keep(prefixes, HALF, tokens(BLOCK), 4 * SIZE)
    assert prefixes.nbytes == 4 * SIZE
    assert [len(prefixes.find(key, tokens(2 * BLOCK + 1))) for key in (POET, BASE, HALF)] == [2, 1, 1]
    prefixes.shrink(0)
    assert (prefixes.nbytes, len(prefixes._blocks)) == (0, 0)


def test_a_prompt_longer_than_the_room_keeps_its_beginning() -> None:
    prefixes = PrefixCache()
    keep(prefixes, POET, tokens(5 * BLOCK), 2 * SIZE)
    assert prefixes.nbytes <= 2 * SIZE
    assert len(prefixes.find(POET, tokens(5 * BLOCK))) == 2
    keep(prefixes, BASE, tokens(BLOCK), 0)
    assert prefixes.find(BASE, tokens(BLOCK + 1)) == []
