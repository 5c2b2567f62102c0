"""One host on this machine: a process tree in namespaces of its own, with an sshd, and the network it hangs on."""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["DIES_WITH_US", "NAMESPACES", "REPOSITORY", "Host", "Network", "shell", "tool_path"]

REPOSITORY = Path(__file__).parents[2]
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
NAMESPACES = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts")
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
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
        return shell(f"ip {line}", check=check)


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
                command, env={"PATH": tool_path()}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
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
            time.sleep(0.02)
        self.network.ip(f"link del {self.link}", check=False)

    def _remaining(self) -> str:
        """Its processes and what each of them does, for a message."""
        pids = ",".join(map(str, {self._init, *self.pids()}))
        return shell(f"ps -o pid,ppid,stat,wchan:30,args -p {pids}", check=False)

    def _inside(self, command: Command) -> list[str]:
        words = ["bash", "-c", command] if isinstance(command, str) else list(command)
        enter = f"nsenter --target {self._init} --mount --uts --net --pid --wd={Path.home()}".split()
        return [*enter, *DIES_WITH_US, *words]

    def _environment(self, env: Mapping[str, str] | None) -> dict[str, str]:
        plain = {"PATH": tool_path(), "HOME": str(Path.home()), "USER": self.user, "LANG": "C.UTF-8"}
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
        sshd = shutil.which("sshd", path=tool_path())
        return INIT.format(name=self.name, shared="\n".join(lines), path=tool_path(), sshd=sshd, **quoted)

    def _plug_in(self) -> None:
        ip, inside = self.network.ip, f"nsenter --target {self._init} --net ip"
        card = "02:00:" + ":".join(f"{int(part):02x}" for part in self.address.split("."))
        ip(f"link add {self.link} type veth peer name eth0 address {card} netns {self._init}")
        ip(f"link set {self.link} master {self.network.bridge} up")
        for line in (f"addr add {self.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            shell(f"{inside} {line}")

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


def tool_path() -> str:
    """Programs of the environment that the tests run in come first."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}:{SBIN}"


def shell(line: str, check: bool = True) -> str:
    done = subprocess.run(
        line.split(), env={"PATH": tool_path()}, capture_output=True, text=True, check=False
    )
    if check and done.returncode:
        raise RuntimeError(f"{line}: {done.stderr.strip()}")
    return done.stdout


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
