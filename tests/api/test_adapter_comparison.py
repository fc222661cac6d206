"""Two adapters compared module by module, as the page's heat map shows them."""

import hashlib

import pytest
import torch

from loradeck import Adapter, AdapterStore, LoraConfig
from loradeck.api.auth import ApiKey, ApiKeys
from loradeck.lora.distance import compare, overall
from loradeck.lora.manifest import read_folder

from .conftest import LocalServer

pytestmark = pytest.mark.slow

URL = "/v1/adapters/compare"
KEYS = ApiKeys([ApiKey("alice", hashlib.sha256(b"ka").hexdigest(), ("poet", "team-*"))])


def test_two_adapters(server: LocalServer, store: AdapterStore) -> None:
    answer = server.request(f"{URL}?a=poet&b=tiny:pirate@1").json()
    assert (answer["object"], answer["a"], answer["b"]) == ("adapter.comparison", "poet@2", "pirate@1")
    expected = compare(read_folder(store.find("poet").path), read_folder(store.find("pirate").path))
    assert answer["distance"] == pytest.approx(overall(expected))
    assert [module["path"] for module in answer["modules"]] == [module.path for module in expected]
    for module, each in zip(answer["modules"], expected, strict=True):
        assert (module["norm_a"], module["norm_b"]) == pytest.approx(each.norms)
        assert module["distance"] == pytest.approx(each.distance)
        assert module["similarity"] == pytest.approx(each.similarity)


def test_an_adapter_and_itself(server: LocalServer) -> None:
    answer = server.request(f"{URL}?a=poet&b=poet@2").json()
    assert answer["distance"] == 0
    assert [module["similarity"] for module in answer["modules"]] == pytest.approx([1] * 4)


def test_modules_that_one_leaves_alone(server: LocalServer, store: AdapterStore) -> None:
    path = "model.layers.0.mlp.up_proj"
    shape = server.engine.base.model.get_submodule(path).weight.shape
    pairs = {path: (torch.ones(2, shape[1]), torch.ones(shape[0], 2))}
    store.publish("up", Adapter.of(LoraConfig(r=2, target_modules=["up_proj"]), pairs))
    *others, up = server.request(f"{URL}?a=poet&b=up").json()["modules"]
    assert (up["path"], up["norm_a"], up["distance"], up["similarity"]) == (path, 0, None, None)
    assert all((each["norm_b"], each["distance"], each["similarity"]) == (0, pytest.approx(1), None) for each in others)
    zero = {path: (torch.ones(2, shape[1]), torch.zeros(shape[0], 2))}
    store.publish("zero", Adapter.of(LoraConfig(r=2, target_modules=["up_proj"]), zero))
    assert server.request(f"{URL}?a=zero&b=up").json()["distance"] is None


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ("a=poet", 400, "b"),
        ("a=&b=poet", 400, "a"),
        ("", 400, "a"),
        ("a=poet&b=tiny", 400, "b"),
        ("a=poet*0.5&b=poet", 404, "a"),
        ("a=poet&b=nobody", 404, "model"),
        ("a=poet@9&b=poet", 404, "model"),
    ],
)
def test_what_cannot_be_compared(server: LocalServer, query: str, status: int, param: str) -> None:
    refused = server.request(f"{URL}?{query}")
    assert (refused.status_code, refused.json()["error"]["param"]) == (status, param), refused.text


def test_adapters_of_another_base_are_refused(server: LocalServer, store: AdapterStore) -> None:
    pairs = {"model.layers.0.self_attn.q_proj": (torch.ones(2, 32), torch.ones(64, 2))}
    Adapter.of(LoraConfig(r=2, target_modules=["q_proj"]), pairs).save(store.folder / "wide")
    refused = server.request(f"{URL}?a=poet&b=wide")
    assert refused.status_code == 422
    assert str(store.folder) not in refused.text


def test_a_key_may_use_both(server: LocalServer) -> None:
    server = server.configured(keys=KEYS)
    assert server.request(f"{URL}?a=poet&b=team-a").status_code == 401
    assert server.request(f"{URL}?a=poet&b=team-a", key="ka").status_code == 200  # without control
    for query in ("a=poet&b=pirate", "a=pirate&b=poet", "a=poet&b=nobody"):
        assert server.request(f"{URL}?{query}", key="ka").status_code == 403
