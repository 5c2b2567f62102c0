"""The hosts that the cluster tests are made of are hosts."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Hosts, make_hosts, require_hosts

LISTEN = "import socket; s = socket.create_server(('', 7000)); exec('while True: s.accept()[0].sendall(b\"hello\")')"
CALL = "import socket, sys; print(socket.create_connection((sys.argv[1], 7000), timeout=2).recv(5).decode())"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    require_hosts()
    with make_hosts(["a", "b"], tmp_path_factory.mktemp("hosts")) as made:
        yield made


def calls(hosts: Hosts, caller: str, listener: str) -> bool:
    done = hosts[caller].run(["python", "-c", CALL, hosts[listener].address], check=False)
    return done.stdout == "hello\n"


@pytest.fixture
def listening(hosts: Hosts) -> Iterator[None]:
    process = hosts["b"].start(["python", "-c", LISTEN])
    deadline = time.monotonic() + 120
    while not calls(hosts, "a", "b"):
        assert time.monotonic() < deadline
    yield
    hosts["b"].end(process)


def ssh(hosts: Hosts, name: str, command: str) -> subprocess.CompletedProcess[str]:
    host = hosts[name]
    options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o BatchMode=yes"
    return subprocess.run(
        ["ssh", *options.split(), "-i", str(host.ssh_key), f"{host.user}@{host.address}", command],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_ssh_reaches_the_host_with_its_own_name_and_home(hosts: Hosts) -> None:
    done = ssh(hosts, "b", "hostname; echo there > ~/note; python3 --version")
    assert done.stdout.splitlines()[0] == "b", done.stderr
    assert (hosts["b"].home / "note").read_text() == "there\n"
    assert not (hosts["a"].home / "note").exists()
    assert not (Path.home() / "note").exists()


def test_hosts_share_the_folder_and_not_tmp(hosts: Hosts, tmp_path: Path) -> None:
    folder = hosts.network.hosts_file.parents[1]
    hosts["a"].run(f"echo shared > {folder}/shared.txt; echo own > /tmp/own.txt")
    assert hosts["b"].run(f"cat {folder}/shared.txt; ls /tmp").stdout.startswith("shared\n")
    assert "own.txt" not in hosts["b"].run("ls /tmp").stdout
    assert not Path("/tmp/own.txt").exists()


def test_a_host_sees_only_its_own_processes(hosts: Hosts) -> None:
    process = hosts["a"].start(["sleep", "1000"])
    pid = hosts["a"].pid_of(process)
    assert pid in hosts["a"].pids()
    assert pid not in hosts["b"].pids()
    assert os.getpid() not in hosts["a"].pids()
    see = "import pathlib; print([p for p in pathlib.Path('/proc').glob('[0-9]*/cmdline') if 'sleep\\0' in p.read_text()])"
    assert "cmdline" in hosts["a"].run(["python", "-c", see]).stdout
    assert "cmdline" not in hosts["b"].run(["python", "-c", see]).stdout
    os.kill(pid, signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT


@pytest.mark.usefixtures("listening")
def test_what_is_cut_is_not_heard_until_it_is_mended(hosts: Hosts) -> None:
    hosts.cut("b")
    assert not calls(hosts, "a", "b")
    hosts.mend("b")
    assert calls(hosts, "a", "b")
    hosts.cut("a", "b")
    assert not calls(hosts, "a", "b")
    assert ssh(hosts, "b", "true").returncode == 0
    hosts.mend("a", "b")
    assert calls(hosts, "a", "b")


@pytest.mark.usefixtures("listening")
def test_a_slow_link_carries_everything_later(hosts: Hosts) -> None:
    def seconds() -> float:
        code = (
            "import socket, sys, time; t = time.monotonic(); "
            "socket.create_connection((sys.argv[1], 7000)).close(); print(time.monotonic() - t)"
        )
        return float(hosts["a"].run(["python", "-c", code, hosts["b"].address]).stdout)

    hosts.slow("b", 60)
    assert seconds() >= 0.12  # a handshake is there and back
    assert len(ssh(hosts, "b", "yes stillhouse | head -c 3000000").stdout) == 3_000_000
    hosts.slow("b", 0)
    assert seconds() < 0.1


def test_a_killed_host_is_gone_and_boots_again(hosts: Hosts) -> None:
    sleeper = hosts["a"].pid_of(hosts["a"].start(["sleep", "1000"]))
    pids = hosts["a"].pids()
    assert sleeper in pids
    hosts["a"].kill()
    assert not hosts["a"].is_up
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert ssh(hosts, "b", "true").returncode == 0
    hosts["a"].boot()
    assert ssh(hosts, "a", "hostname").stdout == "a\n"


def test_nothing_is_left(tmp_path: Path) -> None:
    require_hosts()
    with pytest.raises(ZeroDivisionError), make_hosts(["a"], tmp_path) as hosts:  # noqa: PT012
        hosts.slow("a", 10)
        pids = hosts["a"].pids()
        raise ZeroDivisionError
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert hosts.network.bridge not in hosts.network.ip("link")
