"""The store on a real S3 endpoint: a moto server on loopback, started and ended here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator

import pytest
from store_battery import KEY, StoreBattery

from orchestrator.errors import StorageError
from orchestrator.store import Store

pytest.importorskip("s3fs", reason="needs the s3 extra")
pytest.importorskip("moto", reason="needs moto and flask")

BUCKET = "stillhouse-tests"
START_SECONDS = 300.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until_it_answers(endpoint: str, server: subprocess.Popen[bytes]) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            direct.open(f"{endpoint}/moto-api/", timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the moto server at {endpoint} did not start, exit status {server.poll()}")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    endpoint = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", endpoint.rpartition(":")[2]]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("NO_PROXY", "127.0.0.1")
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        try:
            wait_until_it_answers(endpoint, server)
            import s3fs

            s3fs.S3FileSystem.clear_instance_cache()
            s3fs.S3FileSystem().mkdir(BUCKET)
            yield f"s3://{BUCKET}"
            s3fs.S3FileSystem.clear_instance_cache()
        finally:
            server.terminate()
            server.wait(timeout=10)


class TestS3(StoreBattery):
    @pytest.fixture
    def url(self, bucket: str) -> str:
        return f"{bucket}/{uuid.uuid4().hex}"

    def test_a_listing_is_never_remembered(self, url: str) -> None:
        """Another process writes: here a connection of its own, since one process shares its listings."""
        import s3fs

        store, elsewhere = Store(url), s3fs.S3FileSystem(skip_instance_cache=True)
        store.write_json("failures/a.json", 1)
        assert store.list_json("failures") == ["failures/a.json"]
        assert store._files.names("failures") == ["a.json"]
        elsewhere.pipe_file(f"{url}/failures/b.json", b"2")
        assert store._files.exists("failures/b.json")
        assert store._files.names("failures") == ["a.json", "b.json"]
        assert store.list_json("failures") == ["failures/a.json", "failures/b.json"]
        elsewhere.rm_file(f"{url}/failures/b.json")
        assert not store._files.exists("failures/b.json")

    def test_a_create_that_is_sent_again_knows_its_own(self, store: Store) -> None:
        """A client repeats a put whose answer was lost; it must not take itself for somebody else."""
        assert store._files.create("failures/once.json", b"mine")
        assert store._files.create("failures/once.json", b"mine")
        assert not store._files.create("failures/once.json", b"theirs")
        assert store._files.read("failures/once.json") == b"mine"

    def test_a_bucket_as_root(self, bucket: str) -> None:
        store = Store(f"{bucket}/")
        store.write_json("failures/x.json", 1)
        assert store.list_json("failures") == ["failures/x.json"]
        store.delete_json("failures/x.json")

    def test_a_missing_bucket_is_named(self, bucket: str) -> None:
        with pytest.raises(StorageError, match=r"s3://no-such-bucket-here.*create the bucket"):
            Store("s3://no-such-bucket-here/x").check_writable()

    def test_storage_that_ignores_create_is_told(
        self, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(store._files, "create", lambda path, data: True)
        store.check_writable()
        assert "two workers may run the same stage" in caplog.text

    def test_a_missing_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fsspec.registry import _registry

        for protocol in ("s3", "s3a"):
            monkeypatch.delitem(_registry, protocol, raising=False)
        monkeypatch.setitem(sys.modules, "s3fs", None)
        with pytest.raises(StorageError, match=r'pip install "stillhouse\[s3\]"'):
            Store("s3://bucket/x").check_writable()

    def test_an_endpoint_that_is_away_is_a_storage_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import s3fs

        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            with pytest.raises(StorageError, match=r"s3://away/x.*check that the storage is reachable"):
                Store("s3://away/x").has(KEY)
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            assert os.environ["AWS_ENDPOINT_URL"]
