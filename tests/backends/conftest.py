"""Stores elsewhere: one in memory, which knows no conditional write, and one on an S3 server of this machine."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.backends.s3_server import Faults, proxy, s3_server

from loradeck.backends import place
from loradeck.store import AdapterStore

WHY = "needs `pip install --group stores` (s3fs and moto's S3 server)"
BUCKET = "bucket"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, of each test its own; and no pauses between attempts."""
    monkeypatch.setenv("LORADECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(place, "FIRST_PAUSE", 0.001)
    return tmp_path / "cache"


@pytest.fixture
def memory(tmp_path: Path) -> AdapterStore:
    return AdapterStore(f"memory://{tmp_path.name}/adapters")


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    """The address of a real S3 server with one bucket."""
    pytest.importorskip("s3fs", reason=WHY)
    pytest.importorskip("moto.server", reason=WHY)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    with s3_server() as address:
        yield address


@pytest.fixture
def s3(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """The faults of a proxy in front of an S3 server that holds one empty bucket."""
    import boto3

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "name")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with proxy(s3_address) as (faults, address):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        client = boto3.client("s3", endpoint_url=s3_address)
        client.create_bucket(Bucket=BUCKET)
        yield faults
        for each in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
            for entry in each.get("Contents", []):
                client.delete_object(Bucket=BUCKET, Key=entry["Key"])
        client.delete_bucket(Bucket=BUCKET)
        client.close()
