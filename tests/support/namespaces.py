"""Two hosts on this machine: network, name and disk of their own, joined by one cable.

Each is a network namespace; its processes also get a mount namespace, in which the same path
leads to another folder on each host, and a host name that both hosts resolve.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.debian import PATH, require

NAMES = ("alpha", "beta")

_ENTER = """
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
mount --bind "$2/$1" "$2/disk"
shift 2
exec "$@"
"""
"""What a process does to be on a host: name, folder of all hosts, command."""


@dataclass(frozen=True)
class Host:
    """`disk` is where the host's own disk is seen on it, and `contents` what that holds, as seen
    from outside."""

    name: str
    address: str
    namespace: str
    root: Path

    @property
    def disk(self) -> Path:
        return self.root / "disk"

    @property
    def contents(self) -> Path:
        return self.root / self.name

    def command(self, command: Sequence[str | Path]) -> list[str | Path]:
        """`command` as it is run on this host. Its process group is the caller's."""
        enter = ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--uts", "--mount"]
        return [*enter, "sh", "-ec", _ENTER, "sh", self.name, self.root, *command]

    def plug(self, state: str) -> None:
        """Take the cable out ('down') or put it back ('up'); nobody is told."""
        _run("ip", "-n", self.namespace, "link", "set", "cable", state)


@contextmanager
def two_hosts(root: Path) -> Iterator[tuple[Host, Host]]:
    """Hosts alpha and beta with their disks in `root`. The caller ends what it starts on them.

    Skips the test where there can be none.
    """
    untested = "hosts without a shared disk"
    require(["ip", "nsenter", "unshare"], ["iproute2", "util-linux"], untested)
    hosts = [
        Host(name, f"10.77.1.{number}", f"distmerge-{os.getpid()}-{name}", root)
        for number, name in enumerate(NAMES, start=1)
    ]
    _write_disks(root, hosts)
    with ExitStack() as stack:
        for host in hosts:
            try:
                _run("ip", "netns", "add", host.namespace)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"NOT TESTED: {untested}; only root can: {error.stderr.strip()}")
            stack.callback(_run, "ip", "netns", "del", host.namespace)
        _join(*hosts)
        yield hosts[0], hosts[1]


def _write_disks(root: Path, hosts: Sequence[Host]) -> None:
    names = "".join(f"{host.address} {host.name}\n" for host in hosts)
    (root / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    (root / "nsswitch.conf").write_text("hosts: files\n")  # no resolver can be reached
    for folder in (root / "disk", *(host.contents for host in hosts)):
        folder.mkdir()


def _join(first: Host, second: Host) -> None:
    ends = ["cable", "netns", second.namespace]
    _run("ip", "-n", first.namespace, "link", "add", "cable", "type", "veth", "peer", *ends)
    for host in (first, second):
        _run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "cable")
        for device in ("lo", "cable"):
            _run("ip", "-n", host.namespace, "link", "set", device, "up")


def _run(*command: str) -> None:
    env = {**os.environ, "PATH": PATH}
    subprocess.run(command, capture_output=True, text=True, check=True, env=env)
