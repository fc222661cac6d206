"""The sections that benchmarks/grids.py writes."""

from benchmarks.grids import ahead, table, turned

FIGURES = {
    "loradeck": {"1 row, base (tokens/s)": 20.0, "16 rows, base (tokens/s)": 100.0},
    "loradeck, int8": {"1 row, base (tokens/s)": 90.0},
    "fast": {"1 row, base (tokens/s)": 50.0, "16 rows, base (tokens/s)": 90.0},
    "slow": {"1 row, base (tokens/s)": 2.0, "16 rows, base (tokens/s)": 9.0},
}


def test_a_peer_that_is_ahead_is_said_to_be() -> None:
    assert ahead(FIGURES) == ["- **fast** is ahead at 1 row, base (2.50 times).", "- **slow** is ahead nowhere."]


def test_what_was_not_tried_is_empty() -> None:
    rows = table(turned(FIGURES))
    assert rows[0] == "| | loradeck | loradeck, int8 | fast | slow |"
    assert rows[3] == "| 16 rows, base (tokens/s) | 100 |  | 90 | 9 |"
