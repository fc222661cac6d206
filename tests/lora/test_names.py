"""What an adapter may be called."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loradeck.errors import AdapterNameError
from loradeck.lora.names import check_name


@pytest.mark.parametrize(
    "name",
    ["1", "mlp", "lora", "a.b", "a b", "A-Z_0", "ünïcode", "日本語", "x" * 128, "default", "adapter_model.safetensors", "v1.2-rc",
     "it's", "(a)", "a&b", "100%", "self", "__init__"],
)  # fmt: skip
def test_names_that_can_be(name):
    check_name(name)


@pytest.mark.parametrize(
    "name",
    ["", " ", "a ", " a", "\t", ".", "..", ".git", "a/b", "../a", "/a", "a\\b", "C:", "a@2", "a*0.7", "a+b", "a,b", "a=b", 'a"b',
     "a?", "<a>", "a|b", "a\nb", "a\0", "a\x7f", "a\u202eb", "a\u200b", "\ud800", "x" * 129, None, 3, b"a", ["a"]],
    ids=repr,
)  # fmt: skip
def test_names_that_cannot_be(name):
    with pytest.raises(AdapterNameError) as caught:
        check_name(name)
    assert caught.value.hint
    assert str(caught.value).isprintable() or "\n" in str(caught.value)


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(st.text(max_size=6))
def test_no_name_leaves_its_folder(tmp_path_factory, name):
    try:
        check_name(name)
    except AdapterNameError:
        return
    root = tmp_path_factory.getbasetemp()
    inside = (root / name).resolve()
    assert inside.parent == root.resolve()
    assert inside.name == name
