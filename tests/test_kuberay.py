"""deploy/rayservice.yaml: its parts name each other, and it keeps to KubeRay's schema where that is at hand."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from loradeck.scale.config import ScaleConfig

TEXT = (Path(__file__).parent.parent / "deploy" / "rayservice.yaml").read_text(encoding="utf-8")


def loaded() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


spec = loaded()["spec"]
cluster = spec["rayClusterConfig"]
serve = yaml.safe_load(spec["serveConfigV2"])
(application,) = serve["applications"]
(workers,) = cluster["workerGroupSpecs"]
PODS = {"head": cluster["headGroupSpec"]["template"]["spec"], "worker": workers["template"]["spec"]}
CONTAINERS = {name: pod["containers"][0] for name, pod in PODS.items()}


def ports(container: dict[str, Any]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container["ports"]}


def test_the_application_is_built_from_settings_that_there_are() -> None:
    module, name = application["import_path"].split(":")
    assert (module, name) == ("loradeck.scale.app", "build")
    from loradeck.api.service import ServiceConfig

    scale = ScaleConfig(**application["args"]["scale"])
    service = ServiceConfig(**{field: value for field, value in application["args"].items() if field != "scale"})
    assert service.keys
    assert Path(service.keys).parent == Path("/run/secrets/loradeck")
    assert (workers["minReplicas"], workers["maxReplicas"]) == (scale.replicas, scale.max_replicas)
    assert CONTAINERS["worker"]["resources"]["limits"]["cpu"] == str(int(scale.replica_cpus))  # one replica each
    assert PODS["worker"]["terminationGracePeriodSeconds"] > service.server.drain


def test_every_node_has_the_same_image_and_serves_at_the_port_of_the_application() -> None:
    assert {container["image"] for container in CONTAINERS.values()} == {"loradeck:ray"}
    assert {ports(container)["serve"] for container in CONTAINERS.values()} == {serve["http_options"]["port"]}
    assert CONTAINERS["worker"]["readinessProbe"]["httpGet"]["port"] == serve["http_options"]["port"]
    assert CONTAINERS["head"]["readinessProbe"]["httpGet"]["port"] == ports(CONTAINERS["head"])["dashboard"]


@pytest.mark.parametrize("name", PODS)
def test_a_pod_has_what_it_mounts_and_may_do_little(name: str) -> None:
    pod, container = PODS[name], CONTAINERS[name]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    places = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {str(Path(application["args"]["keys"]).parent), "/tmp", "/var/cache/loradeck"} == places
    user = pod["securityContext"]
    image = (Path(__file__).parent.parent / "deploy" / "Containerfile").read_text(encoding="utf-8")
    assert f"\nUSER {user['runAsUser']}:{user['runAsGroup']}\n" in image
    assert user["runAsNonRoot"]
    rights = container["securityContext"]
    assert rights == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def parts(schema: object) -> Iterator[dict[str, Any]]:
    """Yield a schema and all in it."""
    if isinstance(schema, dict):
        yield schema
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from parts(part)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        pytest.param(lambda spec: None, [], id="as it is"),
        pytest.param(lambda spec: spec.update(serveConfig=""), ["spec"], id="a wrong key"),
        pytest.param(
            lambda spec: spec["rayClusterConfig"].update(rayVersion=2.6),
            ["spec", "rayClusterConfig", "rayVersion"],
            id="a wrong type",
        ),
    ],
)
def test_it_keeps_to_the_schema(change: Callable[[dict[str, Any]], None], path: list[str]) -> None:
    """As a cluster checks it, and unknown keys too, as `kubectl apply` does."""
    file = os.environ.get("LORADECK_RAYSERVICE_CRD")
    if file is None:
        pytest.skip("LORADECK_RAYSERVICE_CRD is not set to a copy of KubeRay's ray.io_rayservices.yaml")
    versions = yaml.load(Path(file).read_text(encoding="utf-8"), yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = (each["schema"]["openAPIV3Schema"] for each in versions if each["name"] == "v1")
    for part in parts(schema["properties"]["spec"]):
        if isinstance(part.get("properties"), dict) and "type" in part:
            part.setdefault("additionalProperties", bool(part.get("x-kubernetes-preserve-unknown-fields")))
        if part.get("x-kubernetes-int-or-string") is True:
            part.pop("type", None)
    document = loaded()
    change(document["spec"])
    errors = [*jsonschema.Draft4Validator(schema).iter_errors(document)]
    assert [[*error.absolute_path] for error in errors] == ([path] if path else [])
