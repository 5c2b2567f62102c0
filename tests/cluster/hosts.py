"""Several real hosts on one machine, for tests: each has its own network, processes, mounts and name.

A host is one process tree in namespaces of its own (network, PID, mount, UTS), with its own ``/tmp``, ``/run``,
``/dev/shm`` and home, an sshd and an address on a bridge that leads nowhere else. The rest of the file system is
shared, as is ``folder``: it plays the storage that every node reaches. Everything hangs on the first process of each
host, which dies with the test process, so that nothing outlives a run that was killed.
"""

from __future__ import annotations

import contextlib
import getpass
import itertools
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DELAY = Path(__file__).with_name("delay.py")
TOOLS = ("ip", "sshd", "ssh-keygen", "unshare", "nsenter", "setpriv", "mount")
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
NAMESPACES = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts")
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
BRIDGE = "sh"
START_SECONDS = 120.0
Command = str | Sequence[str]

INIT = """\
set -e
hostname {name}
mount --bind {hosts_file} /etc/hosts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd /run/home
mkdir -m 1777 /run/tmp
mount --bind {home} /run/home
{shared}
mount --rbind /run/home {user_home}
mount --rbind /run/tmp /tmp
cd {user_home}
env -i PATH="{path}" {sshd} -D -e -f {folder}/sshd_config 2> {folder}/sshd.txt &
wait  # and reap what is left behind: this shell is process 1
"""
SSHD = """\
HostKey {folder}/host_key
AuthorizedKeysFile {key}.pub
PidFile none
StrictModes no
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
    absent = [tool for tool in TOOLS if shutil.which(tool, path=_path()) is None]
    if absent:
        pytest.skip(f"hosts need {', '.join(absent)} (Debian: openssh-server, iproute2)")
    if not Path("/dev/net/tun").exists():
        pytest.skip("hosts need /dev/net/tun to slow their links down")
    probe = subprocess.run(
        [*NAMESPACES, "ip", "link", "add", "probe", "type", "bridge"],
        env={"PATH": _path()}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if probe.returncode:
        pytest.skip(f"this machine makes no namespaces with a bridge: {probe.stderr.strip()}")


@dataclass
class Host:
    """One host. It runs from the start; ``kill`` and ``boot`` end and restart it, with the same address and files."""

    name: str
    address: str
    folder: Path
    """Its keys, configuration and home."""
    ssh_key: Path
    """Private key that opens ``ssh USER@ADDRESS``."""
    link: str
    """Its link's end at the bridge."""
    shared: tuple[Path, ...]
    """What lies below ``/tmp`` or the home and is seen all the same."""
    network: Network
    user: str = field(default_factory=getpass.getuser)
    _outer: subprocess.Popen[bytes] | None = None
    _init: int = 0

    @property
    def home(self) -> Path:
        """Where the host's home lies, seen from outside."""
        return self.folder / "home"

    def boot(self) -> None:
        """Start the host's first process and sshd, and plug in its link. Returns when ssh answers."""
        assert not self.is_up, f"host {self.name} is up"
        script = self.folder / "init.sh"
        script.write_text(self._init_script())
        command = [*DIES_WITH_US, *NAMESPACES, "bash", str(script)]
        with (self.folder / "init.txt").open("ab") as output:
            self._outer = subprocess.Popen(
                command, env={"PATH": _path()}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self._init = _only_child(self._outer)
        self._plug_in()
        self._wait_for_ssh()

    @property
    def is_up(self) -> bool:
        return self._outer is not None and self._outer.poll() is None

    def run(
        self,
        command: Command,
        *,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command (a list, or a line for the shell) inside and wait; its output in the exception when it fails."""
        done = subprocess.run(
            self._inside(command), env=self._environment(env), capture_output=True, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{self.name}: {command}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def start(
        self, command: Command, env: Mapping[str, str] | None = None, output: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command inside. It dies with the process that is given back; ``end`` it, or kill ``pid_of`` it."""
        with (output or self.folder / "output.txt").open("ab") as stream:
            return subprocess.Popen(
                self._inside(command), env=self._environment(env), stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
            )  # fmt: skip

    def pid_of(self, started: subprocess.Popen[bytes]) -> int:
        """The process behind one that ``start`` gave: what is given back only waits for it. Numbered as outside."""
        return _only_child(started)

    def end(self, started: subprocess.Popen[bytes]) -> None:
        """Kill what ``start`` began. From inside: what is given back has to collect it, or the host cannot go down."""
        if started.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid_of(started), signal.SIGKILL)
        started.wait(START_SECONDS)

    def pids(self) -> list[int]:
        """Every process of the host, numbered as outside."""
        space = _process_space(self._init) if self.is_up else None
        numbers = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        return [pid for pid in numbers if space is not None and _process_space(pid) == space]

    def kill(self) -> None:
        """Pull the plug: the link first, so that nobody hears a goodbye, then every process at once."""
        if self._outer is None:
            return
        self.network.ip(f"link set {self.link} down", check=False)
        if self.is_up:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._init, signal.SIGKILL)
        deadline = time.monotonic() + 120  # on a busy machine all of its processes take their time to go
        while self._outer.poll() is None:
            assert time.monotonic() < deadline, f"host {self.name} was killed, but stays: {self._remaining()}"
            self._collect_orphans()
            time.sleep(0.02)
        self.network.ip(f"link del {self.link}", check=False)

    def _collect_orphans(self) -> None:
        """What entered the host and outlived who let it in is ours once Ray has made this process a reaper of orphans.

        The host cannot go down before each of its dead is collected.
        """
        for pid in self.pids():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    def _remaining(self) -> str:
        """Its processes and what each of them does, for a message."""
        pids = ",".join(map(str, {self._init, *self.pids()}))
        return _shell(f"ps -o pid,ppid,stat,wchan:30,args -p {pids}", check=False)

    def _inside(self, command: Command) -> list[str]:
        words = ["bash", "-c", command] if isinstance(command, str) else list(command)
        enter = f"nsenter --target {self._init} --mount --uts --net --pid --wd={Path.home()}".split()
        return [*enter, *DIES_WITH_US, *words]

    def _environment(self, env: Mapping[str, str] | None) -> dict[str, str]:
        plain = {"PATH": _path(), "HOME": str(Path.home()), "USER": self.user, "LANG": "C.UTF-8"}
        return {**plain, "PYTHONPATH": str(REPOSITORY), **(env or {})}

    def _init_script(self) -> str:
        lines = []
        for path in self.shared:
            for hidden, place in ((Path("/tmp"), "/run/tmp"), (Path.home(), "/run/home")):
                if path.is_relative_to(hidden):
                    target = shlex.quote(f"{place}/{path.relative_to(hidden)}")
                    lines.append(f"mkdir -p {target} && mount --bind {shlex.quote(str(path))} {target}")
        paths = {"home": self.home, "user_home": Path.home(), "folder": self.folder, "hosts_file": self.network.hosts_file}  # fmt: skip
        quoted = {name: shlex.quote(str(path)) for name, path in paths.items()}
        sshd = shutil.which("sshd", path=_path())
        return INIT.format(name=self.name, shared="\n".join(lines), path=_path(), sshd=sshd, **quoted)

    def _plug_in(self) -> None:
        ip, inside = self.network.ip, f"nsenter --target {self._init} --net ip"
        card = "02:00:" + ":".join(f"{int(part):02x}" for part in self.address.split("."))
        ip(f"link add {self.link} type veth peer name eth0 address {card} netns {self._init}")
        ip(f"link set {self.link} master {self.network.bridge} up")
        for line in (f"addr add {self.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            _shell(f"{inside} {line}")

    def _wait_for_ssh(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection((self.address, 22), timeout=0.2).close()
                return
            except OSError as error:
                if time.monotonic() > deadline or not self.is_up:
                    texts = [self.folder / "init.txt", self.folder / "sshd.txt"]
                    said = "".join(path.read_text() for path in texts if path.exists())
                    raise RuntimeError(f"host {self.name} has no sshd ({error}): {said}") from error
                time.sleep(0.05)


@dataclass
class Network:
    """The bridge that the hosts hang on, and the file that names them."""

    bridge: str
    prefix: str
    """First three numbers of every address."""
    hosts_file: Path

    @property
    def address(self) -> str:
        """Of the machine itself, for the hosts."""
        return f"{self.prefix}.1"

    def ip(self, line: str, check: bool = True) -> str:
        return _shell(f"ip {line}", check=check)


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
            env={"PATH": _path()}, stdout=subprocess.PIPE,
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
    for link, pid in re.findall(rf" ({BRIDGE}([0-9a-f]+)n\d+\w*)[@:]", _shell("ip -oneline link")):
        if not Path(f"/proc/{int(pid, 16)}").exists():
            _shell(f"ip link del {link}", check=False)
    used = _shell("ip -oneline address")
    while True:
        prefix = f"10.{random.SystemRandom().randrange(64, 128)}.{random.SystemRandom().randrange(256)}"
        if f" {prefix}." not in used:
            return prefix


def _path() -> str:
    """Programs of the environment that the tests run in come first."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}:{SBIN}"


def _shell(line: str, check: bool = True) -> str:
    done = subprocess.run(line.split(), env={"PATH": _path()}, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{line}: {done.stderr.strip()}")
    return done.stdout


def _make_key(path: Path) -> None:
    if not path.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def _only_child(parent: subprocess.Popen[bytes]) -> int:
    """The process that ``parent`` has forked; waits for it."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and parent.poll() is None:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.01)
    raise RuntimeError(f"{parent.args!r} has no process below it: exit {parent.poll()}")


def _process_space(pid: int) -> str | None:
    """The PID namespace that a process lives in."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None
