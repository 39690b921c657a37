"""A real server of the S3 protocol on loopback (moto's), and what a test does there behind a store's back."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def running(log: Path) -> Iterator[str]:
    """The endpoint of a server that ends with the block."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def environment(endpoint: str, mirrors: Path) -> dict[str, str]:
    """What a user sets for this server."""
    return {
        **KEYS,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "DISTILY_CACHE_DIR": str(mirrors),
    }


class Bucket:
    """A bucket of its own for one test, seen through boto3, which the package does not use."""

    def __init__(self, endpoint: str, name: str, mirrors: Path) -> None:
        import boto3

        self.name, self.mirrors, self.endpoint = name, mirrors, endpoint
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )
        self.client.create_bucket(Bucket=name)
        # So that a test sees when an object was written again.
        self.client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})

    def url(self, store: str) -> str:
        return f"s3://{self.name}/{store}"

    def names(self, store: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=f"{store}/")
        return sorted(o["Key"].removeprefix(f"{store}/") for page in pages for o in page.get("Contents", ()))

    def read(self, store: str, name: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.name, Key=f"{store}/{name}")["Body"].read())

    def write(self, store: str, name: str, data: bytes | None) -> None:
        """Replace an object, or remove it."""
        key = {"Bucket": self.name, "Key": f"{store}/{name}"}
        if data is None:
            # With every version: moto lists the folder of an object that only has a marker of its removal.
            found = self.client.list_object_versions(Bucket=self.name, Prefix=key["Key"])
            for version in found.get("Versions", ()):
                self.client.delete_object(**key, VersionId=version["VersionId"])
        else:
            self.client.put_object(**key, Body=data)

    def upload(self, directory: Path, store: str) -> None:
        """A local store as it is."""
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            self.write(store, str(path.relative_to(directory)), path.read_bytes())

    def forget(self) -> None:
        """Remove every mirror, as on another machine."""
        for path in sorted(self.mirrors.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()

    def mirrored(self) -> set[str]:
        """Names in all mirrors, relative to their store."""
        found = (p.relative_to(self.mirrors) for p in self.mirrors.rglob("*") if p.is_file())
        return {"/".join(path.parts[1:]) for path in found}


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(tmp_path_factory.mktemp("s3") / "server.log") as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name, value in environment(s3_endpoint, tmp_path / "mirrors").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    return Bucket(s3_endpoint, f"bucket-{os.urandom(6).hex()}", tmp_path / "mirrors")
