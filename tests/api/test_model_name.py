"""The names that clients give to models: every way to write them, and what is refused."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradeck import AdapterStore, Base
from loradeck.api.errors import HttpError
from loradeck.api.model_name import MAX_BLEND, AdapterIds, ModelNames
from loradeck.api.requests import GenerationRequest, LoraScale

from .conftest import random_adapter


@pytest.fixture
def names(base: Base, store: AdapterStore) -> ModelNames:
    return ModelNames(base, AdapterIds(store))


@pytest.mark.parametrize(
    ("text", "entry", "label"),
    [
        ("", None, ""),
        ("tiny", None, ""),
        ("org/tiny", None, ""),
        ("tiny:", None, ""),
        ("poet", {"poet": 1.0}, "poet"),
        ("tiny:poet", {"poet": 1.0}, "poet"),
        ("org/tiny:poet@2", {"poet@2": 1.0}, "poet@2"),
        ("tiny:tiny", {"tiny": 1.0}, "tiny"),
        ("poet*0.7+pirate*0.3", {"poet": 0.7, "pirate": 0.3}, "pirate*0.3+poet*0.7"),
        ("tiny:poet + pirate*-1", {"poet": 1.0, "pirate": -1.0}, "pirate*-1+poet"),
        ("poet*0.5+poet*0.25", {"poet": 0.75}, "poet*0.75"),
    ],
)
def test_names(names: ModelNames, text: str, entry: object, label: str) -> None:
    selection = names.select(GenerationRequest(model=text))
    assert selection.entry == entry
    assert selection.label == label


@pytest.mark.parametrize(
    "text", ["poet*", "*0.5", "poet*x", "poet+", "poet*nan", "poet*1e999", "poet*1e308+poet*1e308"]
)
def test_an_invalid_blend_is_refused(names: ModelNames, text: str) -> None:
    with pytest.raises(HttpError) as caught:
        names.parse(text)
    assert (caught.value.status, caught.value.param) == (400, "model")


def test_a_weight_that_is_too_large_is_shown_as_it_is(names: ModelNames) -> None:
    with pytest.raises(HttpError, match=re.escape("The weight of 'poet' is 1000001.0; it may be up to 1,000,000.")):
        names.parse("poet*1000001")


def test_the_size_of_a_blend_is_limited(names: ModelNames) -> None:
    with pytest.raises(HttpError, match=str(MAX_BLEND)):
        names.parse("+".join(f"a{i}" for i in range(MAX_BLEND + 1)))


def test_adapter_id_and_lora(names: ModelNames) -> None:
    assert names.select(GenerationRequest(adapter_id="poet")).names == ["poet"]
    assert names.select(GenerationRequest(model="tiny", adapter_id="poet@1")).names == ["poet"]
    assert names.select(GenerationRequest(model="poet", adapter_id="tiny:poet")).names == ["poet"]
    assert names.select(GenerationRequest(model="tiny", lora=[LoraScale(0, 0.5), LoraScale(2, 0.0)])).entry == {
        "pirate": 0.5
    }
    assert names.select(GenerationRequest(lora=[])).entry is None
    with pytest.raises(HttpError, match="model and adapter_id"):
        names.select(GenerationRequest(model="poet", adapter_id="pirate"))
    with pytest.raises(HttpError, match="adapter id 9") as caught:
        names.select(GenerationRequest(lora=[LoraScale(9, 1.0)]))
    assert caught.value.status == 404


def test_scales_apply_to_requests_that_name_nothing(names: ModelNames) -> None:
    names._ids.set_scales({"poet": 0.5, "pirate": 0.0})
    assert names.select(GenerationRequest()).entry == {"poet": 0.5}
    assert names.select(GenerationRequest(model="tiny")).entry is None
    assert names.select(GenerationRequest(lora=[])).entry is None


def test_a_name_keeps_its_id(store: AdapterStore) -> None:
    ids = AdapterIds(store)
    assert ids.names() == {0: "pirate", 1: "poet", 2: "team-a"}
    store.publish("admiral", random_adapter(9))
    store.remove("poet")
    assert ids.names() == {0: "pirate", 2: "team-a", 3: "admiral"}
    store.publish("poet", random_adapter(9))
    assert ids.name(1) == "poet"
    assert AdapterIds(None).names() == {}


@given(st.text(max_size=20))
def test_any_text_is_a_selection_or_a_400(text: str) -> None:
    names = object.__new__(ModelNames)
    names._aliases = {"tiny"}
    status = None
    try:
        assert all(names.parse(text).names)
    except HttpError as error:
        status = error.status
    assert status in (None, 400)
