"""Adapters in metrics: a bounded number of series, whoever asks for what."""

from hypothesis import given
from hypothesis import strategies as st

from loradeck.api.metrics import BASE, BLEND, OTHER, AdapterLabels, name_of


def test_what_counts_as_one_adapter() -> None:
    assert [name_of(text) for text in ("poet", "poet@2", "poet*0.5", "poet@2*0.5")] == ["poet"] * 4
    assert name_of("") == BASE
    assert name_of("poet*0.7+pirate*0.3") == BLEND


def test_the_busiest_have_labels() -> None:
    gone: list[str] = []
    labels = AdapterLabels(2, gone.append)
    for name in ("a", "b", "b", "c"):
        labels.count(name)
    assert [labels.label(name) for name in ("a", "b", "c", "", "a+b")] == ["a", "b", OTHER, BASE, BLEND]
    labels.count("c")
    assert gone == ["a"]
    assert [labels.label(name) for name in ("a", "b", "c")] == [OTHER, "b", "c"]


def test_who_is_there_unasked_takes_what_is_free() -> None:
    labels = AdapterLabels(1, lambda _: None)
    labels.count("a", 0)
    labels.count("b", 0)
    assert [labels.label(name) for name in "ab"] == ["a", OTHER]
    labels.count("b")
    assert [labels.label(name) for name in "ab"] == [OTHER, "b"]


@given(st.lists(st.sampled_from("abcdefgh"), max_size=60), st.integers(1, 4))
def test_labels_are_bounded(names: list[str], most: int) -> None:
    gone: list[str] = []
    labels = AdapterLabels(most, gone.append)
    for name in names:
        labels.count(name)
    assert len({labels.label(name) for name in names} - {OTHER}) <= most
    assert all(labels.label(name) != name or name in names for name in "abcdefgh")
