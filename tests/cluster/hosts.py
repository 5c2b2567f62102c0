"""Several real hosts on one machine, for tests: each has its own network, processes, mounts and name.

A host is one process tree in namespaces of its own (network, PID, mount, UTS), with its own ``/tmp``, ``/run``,
``/dev/shm`` and home, an sshd and an address on a bridge that leads nowhere else. The rest of the file system is
shared, as is ``folder``: it plays the storage that every node reaches. Everything hangs on the first process of each
host, which dies with the test process, so that nothing outlives a run that was killed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from host import DIES_WITH_US, NAMESPACES, REPOSITORY, Host, Network, shell, tool_path

DELAY = Path(__file__).with_name("delay.py")
TOOLS = ("ip", "sshd", "ssh-keygen", "unshare", "nsenter", "setpriv", "mount")
BRIDGE = "sh"

SSHD = """\
HostKey {folder}/host_key
AuthorizedKeysFile {key}.pub
PidFile none
StrictModes no
SetEnv RAY_worker_niceness=0
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
"""


_numbers = itertools.count()


def require_hosts() -> None:
    """Skip the calling test, with the reason, where hosts cannot be made."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("hosts out of namespaces need Linux and root")
    if any(Path(place).is_relative_to("/tmp") for place in (REPOSITORY, sys.prefix)):
        pytest.skip("hosts have a /tmp of their own, and this checkout or its environment lies in /tmp")
    absent = [tool for tool in TOOLS if shutil.which(tool, path=tool_path()) is None]
    if absent:
        pytest.skip(f"hosts need {', '.join(absent)} (Debian: openssh-server, iproute2)")
    if not Path("/dev/net/tun").exists():
        pytest.skip("hosts need /dev/net/tun to slow their links down")
    probe = subprocess.run(
        [*NAMESPACES, "ip", "link", "add", "probe", "type", "bridge"],
        env={"PATH": tool_path()}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if probe.returncode:
        pytest.skip(f"this machine makes no namespaces with a bridge: {probe.stderr.strip()}")


@dataclass
class Hosts:
    """The hosts of a test, by name, and what can happen to the network between them."""

    hosts: dict[str, Host]
    network: Network
    _delays: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def cut(self, name: str, other: str | None = None) -> None:
        """Take the host off the network; with ``other``, only these two stop hearing each other."""
        if other is None:
            self.network.ip(f"link set {self.hosts[name].link} down")
        else:
            self._route("add", name, other)

    def mend(self, name: str, other: str | None = None) -> None:
        """Undo ``cut``."""
        if other is None:
            self.network.ip(f"link set {self.hosts[name].link} up")
        else:
            self._route("del", name, other)

    def slow(self, name: str, milliseconds: float) -> None:
        """Every packet to and from the host takes that much longer; 0 undoes it."""
        host, bridge = self.hosts[name], self.network.bridge
        self._hurry(name)
        if milliseconds <= 0:
            return
        ends = [
            f"{host.link}{letter}" for letter in "xyz"
        ]  # a bridge of the host's own, and a tap on either side
        process = subprocess.Popen(
            [*DIES_WITH_US, sys.executable, str(DELAY), *ends[1:], str(milliseconds)],
            env={"PATH": tool_path()}, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._delays[name] = process
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", "the taps could not be made"
        self.network.ip(f"link add {ends[0]} type bridge")
        for link, master in ((ends[0], None), (ends[1], ends[0]), (ends[2], bridge), (host.link, ends[0])):
            self.network.ip(f"link set {link} {f'master {master} ' if master else ''}up")

    def close(self) -> None:
        """End every process of every host, and remove the network."""
        for name in self.hosts:
            self._hurry(name)
        for host in self.hosts.values():
            host.kill()
        self.network.ip(f"link del {self.network.bridge}", check=False)

    def _hurry(self, name: str) -> None:
        if (process := self._delays.pop(name, None)) is None:
            return
        process.kill()  # its taps go with it
        process.communicate()
        link = self.hosts[name].link
        self.network.ip(f"link set {link} master {self.network.bridge}", check=self.hosts[name].is_up)
        self.network.ip(f"link del {link}x", check=False)

    def _route(self, change: str, name: str, other: str) -> None:
        for here, there in ((name, other), (other, name)):
            self.hosts[here].run(f"ip route {change} blackhole {self.hosts[there].address}/32")


@contextlib.contextmanager
def make_hosts(names: Sequence[str], folder: Path) -> Iterator[Hosts]:
    """Hosts with these names, booted. ``folder`` is seen by all of them; their own files lie in ``folder/hosts``."""
    prefix = _free_prefix()
    folder = folder.resolve()
    (folder / "hosts").mkdir(parents=True, exist_ok=True)
    addresses = {name: f"{prefix}.{index}" for index, name in enumerate(names, 2)}
    network = Network(f"{BRIDGE}{os.getpid():x}n{next(_numbers)}", prefix, folder / "hosts" / "hosts.txt")
    network.hosts_file.write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())
    )
    key = folder / "hosts" / "key"
    _make_key(key)
    shared = tuple({folder, REPOSITORY, Path(sys.prefix), Path(sys.base_prefix)})
    hosts = Hosts({}, network)
    network.ip(f"link add {network.bridge} type bridge")
    try:
        network.ip(f"addr add {network.address}/24 dev {network.bridge}")
        network.ip(f"link set {network.bridge} up")
        for name, address in addresses.items():
            own = folder / "hosts" / name
            (own / "home").mkdir(parents=True, exist_ok=True)
            _make_key(own / "host_key")
            (own / "sshd_config").write_text(SSHD.format(folder=own, key=key))
            link = f"{network.bridge}v{len(hosts.hosts)}"
            hosts.hosts[name] = Host(name, address, own, key, link, shared, network)
            hosts.hosts[name].boot()
        yield hosts
    finally:
        hosts.close()


def _free_prefix() -> str:
    """A /24 that this machine does not use. Links of test processes that were killed are removed first."""
    for link, pid in re.findall(rf" ({BRIDGE}([0-9a-f]+)n\d+\w*)[@:]", shell("ip -oneline link")):
        if not Path(f"/proc/{int(pid, 16)}").exists():
            shell(f"ip link del {link}", check=False)
    used = shell("ip -oneline address")
    while True:
        prefix = f"10.{random.SystemRandom().randrange(64, 128)}.{random.SystemRandom().randrange(256)}"
        if f" {prefix}." not in used:
            return prefix


def _make_key(path: Path) -> None:
    if not path.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
