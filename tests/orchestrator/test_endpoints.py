"""Who may submit jobs: real listening endpoints, on loopback and on an address of a network namespace."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from orchestrator.doctor import examine
from orchestrator.endpoints import Access, judge_endpoint, knock
from orchestrator.findings import Finding

REPOSITORY = Path(__file__).parents[2]


class Endpoint(BaseHTTPRequestHandler):
    """Answers as Ray's job endpoint does, with or without asking for a token."""

    closed = False

    def do_GET(self) -> None:
        jobs = self.path == "/api/jobs/"
        self.send_response(404 if not jobs else 401 if self.closed else 200)
        self.end_headers()
        self.wfile.write(b"[]" if jobs else b"")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(params=[True, False], ids=["closed", "open"])
def endpoint(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, bool]]:
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    monkeypatch.setattr(Endpoint, "closed", request.param)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port, request.param
    server.shutdown()
    server.server_close()


def test_an_endpoint_on_loopback(
    endpoint: tuple[int, bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    port, closed = endpoint
    assert knock("127.0.0.1", port) is (Access.CLOSED if closed else Access.OPEN)
    (finding,) = judge_endpoint("127.0.0.1", port)
    assert finding.level == ("good" if closed else "note")
    assert ("asks for a token" in finding.text) == closed
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{port}")
    assert finding in examine(str(tmp_path / "runs"), None)


def test_where_nobody_listens() -> None:
    assert knock("127.0.0.1", 9) is Access.NONE
    assert list(judge_endpoint("127.0.0.1", 9)) == []


OUTSIDE = """
import json, subprocess, sys, threading
from http.server import HTTPServer
subprocess.run("ip link set lo up; ip addr add 10.77.0.1/32 dev lo", shell=True, check=True)
sys.path.insert(0, {tests!r})
from test_endpoints import Endpoint
from orchestrator.doctor import examine
from orchestrator.endpoints import judge_endpoint
server = HTTPServer(("0.0.0.0", 8265), Endpoint)
threading.Thread(target=server.serve_forever, daemon=True).start()
found = {{"open": examine({storage!r}, None), "allowed": examine({storage!r}, None, ["10.77.0.1"])}}
Endpoint.closed = True
found["closed"] = list(judge_endpoint("10.77.0.1", 8265))
print(json.dumps({{name: [[item.level, item.text] for item in items if "10.77" in item.text] for name, items in found.items()}}))
"""


def test_an_endpoint_that_others_reach(tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("an address of a network namespace needs root, unshare and ip")
    code = OUTSIDE.format(tests=str(Path(__file__).parent), storage=str(tmp_path / "runs"))
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    if "Operation not permitted" in done.stderr:
        pytest.skip("no network namespaces here")
    assert done.returncode == 0, done.stderr
    found = {name: [Finding(*item) for item in items] for name, items in json.loads(done.stdout).items()}
    assert [finding.level for finding in found["open"]] == ["wrong"]
    assert "takes jobs from anybody" in found["open"][0].text
    assert "--dashboard-host 127.0.0.1" in found["open"][0].text
    assert [finding.level for finding in found["allowed"]] == ["note"]
    assert [finding.level for finding in found["closed"]] == ["note"]
