"""The compose file as text: valid, closed to the world, hardened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft201909Validator

from tests.deploy_tests.compose_stack import interpolate

FOLDER = Path(__file__).parents[2] / "deploy" / "compose"
SCHEMA = Path(__file__).parent / "schemas" / "compose.json"


def load(name: str, **variables: str) -> dict[str, Any]:
    return dict(yaml.safe_load(interpolate((FOLDER / name).read_text(), variables)))


def faults(compose: dict[str, Any]) -> list[str]:
    schema = json.loads(SCHEMA.read_text())
    # "name" came into the specification after the published schema.
    compose = {key: value for key, value in compose.items() if key != "name"}
    return [
        f"{e.json_path}: {e.message}" for e in Draft201909Validator(schema).iter_errors(compose)
    ]


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_files_are_valid(name: str) -> None:
    assert faults(load(name)) == []


def test_the_schema_refuses_what_is_wrong() -> None:
    compose = load("compose.yaml")
    compose["services"]["ray"]["port"] = ["8265:8265"]
    compose["services"]["mlflow"]["read_only"] = [True]
    assert len(faults(compose)) == 2


def test_every_port_is_published_on_loopback_alone() -> None:
    services = load("compose.yaml", CADDIE_MLFLOW_PORT="5001")["services"]
    ports = {name: service.get("ports", []) for name, service in services.items()}
    assert ports.pop("mlflow") == ["127.0.0.1:5001:5000"]
    assert ports.pop("dashboard") == ["127.0.0.1:8080:8080"]
    assert ports.pop("ray") == ["127.0.0.1:8265:8265"]
    assert set(map(tuple, ports.values())) == {()}
    assert not [name for name, service in services.items() if "network_mode" in service]


def test_the_database_is_on_the_network_without_a_way_out() -> None:
    compose = load("compose.yaml")
    assert compose["networks"]["storage"] == {"internal": True}
    assert compose["services"]["postgres"]["networks"] == ["storage"]


def test_services_are_read_only_and_without_capabilities() -> None:
    compose = load("compose.yaml")
    for name, service in compose["services"].items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service
        assert "cap_add" not in service or name == "postgres"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or volume == (
                "./databases.sql:/docker-entrypoint-initdb.d/databases.sql:ro"
            )


def test_secrets_are_files_and_in_no_url() -> None:
    compose = load("compose.yaml")
    assert {each for secret in compose["secrets"].values() for each in secret} == {"file"}
    for name, service in compose["services"].items():
        for variable, value in service.get("environment", {}).items():
            if "PASS" in variable or "TOKEN" in variable:
                assert value.startswith("/run/secrets/"), name
        for secret in service.get("secrets", []):
            assert secret in compose["secrets"]
    assert "secrets" in (FOLDER / ".gitignore").read_text()
