"""deploy/Containerfile and deploy/compose.yaml: what they name exists, and their parts name each other."""

import json
import os
import re
import shlex
import tomllib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from loradeck.cli import app
from loradeck.disk import cache_folder

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Containerfile and what follows each."""
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, rest in lines]


def instruction(name: str) -> str:
    """Return what follows the last instruction of a name: that of the image."""
    return [rest for other, rest in instructions() if other == name][-1]


def environment() -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(instruction("ENV")))


def bindings(words: list[str]) -> dict[str, Any]:
    """Return the arguments of `loradeck serve`, as the command line reads them."""
    command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    assert command.__name__ == "serve"
    return bound.arguments


def without_variables(text: str) -> str:
    """Return a text of compose.yaml as it is without variables in the environment."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Return what a service mounts: the place in the container -> the file, folder or volume."""
    parts = [without_variables(volume).split(":") for volume in service["volumes"]]
    return {place: source for source, place, *_ in parts}


compose = load("compose.yaml")
services = compose["services"]


def test_the_image_starts_a_server_by_flags_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = json.loads(instruction("ENTRYPOINT"))
    assert entry == ["loradeck"]
    arguments = bindings([without_variables(word) for word in services["loradeck"]["command"]])
    assert str(arguments["adapters"]) == "/var/lib/loradeck/adapters"
    assert (arguments["host"], str(arguments["port"])) == ("0.0.0.0", instruction("EXPOSE"))
    assert str(arguments["keys"]) == "/run/secrets/keys"
    monkeypatch.setenv("LORADECK_CACHE", environment()["LORADECK_CACHE"])
    folders = {str(arguments["adapters"]), str(cache_folder())}
    assert folders == {*json.loads(instruction("VOLUME"))}
    assert folders < {*mounts(services["loradeck"])}


def test_the_image_runs_as_a_user_that_it_has_made() -> None:
    user, group = instruction("USER").split(":")
    assert int(user) > 0
    assert f"--uid {user} --gid {group} " in instruction("RUN")
    assert f"groupadd --gid {group} " in instruction("RUN")


def test_the_image_is_healthy_when_its_own_port_answers() -> None:
    (port, route) = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", instruction("HEALTHCHECK"))[0]
    assert (port, route) == (instruction("EXPOSE"), "/health")


def test_the_image_has_a_python_that_loradeck_runs_on() -> None:
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    assert requires.startswith(">=3.")
    (minor,) = re.findall(r"/python:3\.(\d+)-slim", next(rest for name, rest in instructions() if name == "ARG"))
    assert int(minor) >= int(requires.removeprefix(">=3."))


def test_what_is_copied_into_the_image_exists_and_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "*"
    copies = [shlex.split(rest)[:-1] for name, rest in instructions() if name == "COPY" and "--from" not in rest]
    sources = [source for words in copies for source in words]
    assert {"src", "pyproject.toml"} <= {*sources}
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, line[1:]) for line in ignored if line.startswith("!")), source


@pytest.mark.parametrize("name", services)
def test_a_service_may_do_as_little_as_it_can(name: str) -> None:
    assert services[name]["cap_drop"] == ["ALL"]
    assert services[name]["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in services[name].get("ports", []))
    assert not services[name].get("privileged")


def test_what_compose_names_exists() -> None:
    build = services["loradeck"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    assert {*build["args"]} <= {rest.split("=")[0] for name, rest in instructions() if name == "ARG"}
    volumes, secrets = set(), set()
    for service in services.values():
        for source in mounts(service).values():
            if not source.startswith("./"):
                volumes.add(source)
            elif source != "./bases":  # the user's
                assert (DEPLOY / source).is_file(), source
        secrets |= {*service["secrets"]}
    assert volumes == {*compose["volumes"]}
    assert secrets == {*compose["secrets"]}
    assert {Path(secret["file"]).parent for secret in compose["secrets"].values()} == {Path("secrets")}
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {"/deploy/secrets/", "/deploy/bases/"} <= {*ignored}


@pytest.mark.parametrize("name", services)
def test_a_service_reads_the_secrets_that_it_has(name: str) -> None:
    texts = [
        json.dumps(services[name]),
        *(DEPLOY.joinpath(path).read_text() for path in mounts(services[name]).values() if path.endswith(".yml")),
    ]
    assert {*re.findall(r"/run/secrets/(\w+)", " ".join(texts))} == {*services[name]["secrets"]}


def test_the_services_find_each_other() -> None:
    (job,) = load("compose/prometheus.yml")["scrape_configs"]
    (server,) = job["static_configs"][0]["targets"]
    assert server == f"loradeck:{instruction('EXPOSE')}"
    (source,) = load("compose/datasource.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"  # where a Prometheus listens unless it is told otherwise
    assert not any("web.listen-address" in word for word in services["prometheus"]["command"])
    assert {"loradeck", "prometheus"} <= {*services}


def test_one_file_differs_from_the_other_only_by_the_server_and_its_key() -> None:
    alone, beside = load("prometheus.yml"), load("compose/prometheus.yml")
    for config in (alone, beside):
        (job,) = config["scrape_configs"]
        job.pop("authorization", None)
        job.pop("static_configs")
    assert alone == beside


def test_grafana_finds_the_dashboard() -> None:
    (provider,) = load("compose/dashboards.yml")["providers"]
    places = mounts(services["grafana"])
    (dashboard,) = (place for place, source in places.items() if source == "./grafana-dashboard.json")
    assert str(Path(dashboard).parent) == provider["options"]["path"]
    assert {Path(place).parent.name for place, source in places.items() if source.startswith("./compose/")} == {
        "datasources",
        "dashboards",
    }
    (variable,) = (
        v
        for v in json.loads((DEPLOY / "grafana-dashboard.json").read_text())["templating"]["list"]
        if v["type"] == "datasource"
    )
    assert variable["query"] == load("compose/datasource.yml")["datasources"][0]["type"]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda services: None, id="as it is"),
        pytest.param(lambda services: services["loradeck"].update(read_onli=True), id="a wrong key"),
    ],
)
def test_compose_keeps_to_its_schema(change: Callable[[dict[str, Any]], None]) -> None:
    path = os.environ.get("LORADECK_COMPOSE_SCHEMA")
    if path is None:
        pytest.skip("LORADECK_COMPOSE_SCHEMA is not set to a copy of the compose specification's JSON schema")
    document = load("compose.yaml")
    change(document["services"])
    validator = jsonschema.Draft7Validator(json.loads(Path(path).read_text(encoding="utf-8")))
    assert validator.is_valid(document) == (document == compose)
