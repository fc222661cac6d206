"""The labels of adapters in the metrics: their number is bounded, whatever clients ask for."""

from hypothesis import given
from hypothesis import strategies as st

from loradeck.api.metrics import BASE_LABEL, BLEND_LABEL, OTHER_LABEL, AdapterLabels, name_of


def test_names_of_adapters() -> None:
    assert [name_of(text) for text in ("poet", "poet@2", "poet*0.5", "poet@2*0.5")] == ["poet"] * 4
    assert name_of("") == BASE_LABEL
    assert name_of("poet*0.7+pirate*0.3") == BLEND_LABEL


def test_the_busiest_have_labels() -> None:
    removed: list[str] = []
    labels = AdapterLabels(2, removed.append)
    for name in ("a", "b", "b", "c"):
        labels.count(name)
    assert [labels.label(name) for name in ("a", "b", "c", "", "a+b")] == [
        "a",
        "b",
        OTHER_LABEL,
        BASE_LABEL,
        BLEND_LABEL,
    ]
    labels.count("c")
    assert removed == ["a"]
    assert [labels.label(name) for name in ("a", "b", "c")] == [OTHER_LABEL, "b", "c"]


def test_an_adapter_without_requests_takes_a_free_label() -> None:
    labels = AdapterLabels(1, lambda _: None)
    labels.count("a", 0)
    labels.count("b", 0)
    assert [labels.label(name) for name in "ab"] == ["a", OTHER_LABEL]
    labels.count("b")
    assert [labels.label(name) for name in "ab"] == [OTHER_LABEL, "b"]


@given(st.lists(st.sampled_from("abcdefgh"), max_size=60), st.integers(1, 4))
def test_labels_are_bounded(names: list[str], maximum: int) -> None:
    removed: list[str] = []
    labels = AdapterLabels(maximum, removed.append)
    for name in names:
        labels.count(name)
    assert len({labels.label(name) for name in names} - {OTHER_LABEL}) <= maximum
    assert all(labels.label(name) != name or name in names for name in "abcdefgh")
