"""A private Slurm cluster for tests: real daemons, on virtual nodes of this machine or on hosts of
tests.support.namespaces, with ports of its own."""

from __future__ import annotations

import getpass
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.support.debian import PATH, require
from tests.support.namespaces import Host
from tests.support.processes import environment, run

_CONF = """\
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=5
PropagateResourceLimits=NONE
"""


def require_slurm() -> None:
    """Skip the test where there is no Slurm and none can be installed."""
    programs = ["slurmctld", "slurmd", "sbatch", "srun", "munged"]
    require(programs, ["slurm-wlm", "munge"], "launch/*.sbatch under a real Slurm")


@dataclass(frozen=True)
class Job:
    """A job that has ended. `log` is what the batch script and its tasks printed."""

    state: str
    exit_code: str
    log: str


class _Node(NamedTuple):
    """`host` is None for a virtual node, which lives on this machine's loopback network."""

    name: str
    hostname: str
    address: str
    port: int
    host: Host | None

    def command(self, command: Sequence[str | Path]) -> Sequence[str | Path]:
        return command if self.host is None else self.host.command(command)


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    root: Path
    nodes: Sequence[_Node]

    @property
    def environment(self) -> dict[str, str]:
        """What its commands need. The names of virtual nodes mean nothing to a resolver, so
        ranks are told where to meet."""
        conf = {"SLURM_CONF": str(self.root / "slurm.conf")}
        if self.nodes[0].host is not None:
            return conf
        return {**conf, "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}

    def run(self, batch: Sequence[str | Path], env: Mapping[str, str], timeout: float = 150) -> Job:
        """sbatch the script and arguments `batch`, and wait for the end of the job."""
        return self.wait(self.submit(batch, env), timeout)

    def submit(self, batch: Sequence[str | Path], env: Mapping[str, str]) -> str:
        """The job's number. Its log is `root`/NUMBER.log."""
        command = ["sbatch", "--parsable", f"--output={self.root}/%j.log", *batch]
        return self.call(command, env).strip()

    def wait(self, number: str, timeout: float = 150) -> Job:
        """How the job has ended."""
        self.wait_for(number, "", timeout)
        shown = self.call(["scontrol", "--oneliner", "show", "job", number])
        fields = dict(re.findall(r"(JobState|ExitCode)=(\S+)", shown))
        return Job(fields["JobState"], fields["ExitCode"], self.log(number))

    def wait_for(self, number: str, state: str, timeout: float = 90) -> None:
        """Return when the queue has the job in `state`; '' is not at all."""
        deadline = time.monotonic() + timeout
        queue = ["squeue", "--noheader", "--format=%T", "--job", number]
        while (found := self.call(queue).strip()) != state:
            if time.monotonic() > deadline:
                self.call(["scancel", number])
                raise AssertionError(f"{found!r} for over {timeout} s\n{self.log(number)}")
            time.sleep(0.2)

    def log(self, number: str) -> str:
        log = self.root / f"{number}.log"
        return log.read_text() if log.exists() else ""

    def call(self, command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> str:
        """What one of Slurm's commands prints, run on the first node."""
        done = run(self.nodes[0].command(command), {**(env or environment()), **self.environment})
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout


@contextmanager
def cluster(root: Path, *, cpus: int, hosts: Sequence[Host] = ()) -> Iterator[Cluster]:
    """Start a cluster of `hosts`, or of two virtual nodes, with its files in `root`; stop it again.

    Each node has `cpus` of which a task takes one; they need not be there.
    """
    nodes, control = _nodes(hosts)
    key = root / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    (root / "state").mkdir()
    conf = root / "slurm.conf"
    conf.write_text(_configuration(root, nodes, control, cpus))

    env = {**environment(SLURM_CONF=str(conf)), "PATH": f"{environment()['PATH']}:{PATH}"}
    munge = ["munged", "--foreground", "--force", f"--socket={root}/munge.socket"]
    munge += [f"--{what}-file={root}/munge.{what}" for what in ("key", "pid", "log", "seed")]
    with ExitStack() as daemons:
        daemons.enter_context(_daemon(root / "munged.log", munge, env))
        _until((root / "munge.socket").exists, "munged does not answer", root)
        command = nodes[0].command(["slurmctld", "-D", "-c", "-f", conf])
        daemons.enter_context(_daemon(root / "slurmctld.log", command, env))
        for node in nodes:
            (root / f"spool.{node.name}").mkdir()
            command = node.command(["slurmd", "-D", "-f", conf, "-N", node.name])
            daemons.enter_context(_daemon(root / f"slurmd.{node.name}.log", command, env))
        running = Cluster(root, nodes)
        _until(lambda: _idle(running) == len(nodes), "the nodes do not come up", root)
        yield running


def _nodes(hosts: Sequence[Host]) -> tuple[list[_Node], int]:
    """The nodes, and the port of their controller, which lives on the first."""
    if hosts:
        return [_Node(host.name, host.name, host.address, 6818, host) for host in hosts], 6817
    control, *ports = _free_ports(3)
    here = socket.gethostname().split(".")[0]
    named = enumerate(ports, start=1)
    return [_Node(f"n{number}", here, "127.0.0.1", port, None) for number, port in named], control


def _configuration(root: Path, nodes: Sequence[_Node], control: int, cpus: int) -> str:
    host = f"{nodes[0].hostname}({nodes[0].address})"
    lines = [
        f"NodeName={node.name} NodeHostname={node.hostname} NodeAddr={node.address} "
        f"Port={node.port} CPUs={cpus} Sockets=1 CoresPerSocket={cpus} ThreadsPerCore=1 "
        "RealMemory=4000"
        for node in nodes
    ]
    names = ",".join(node.name for node in nodes)
    lines.append(f"PartitionName=cpu Nodes={names} Default=YES MaxTime=INFINITE State=UP")
    common = _CONF.format(host=host, port=control, user=getpass.getuser(), root=root)
    return common + "\n".join(lines) + "\n"


@contextmanager
def _daemon(log: Path, command: Sequence[str | Path], env: Mapping[str, str]) -> Iterator[None]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until(ready: Callable[[], bool], otherwise: str, root: Path, timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not ready():
        if time.monotonic() > deadline:
            logs = [f"{log.name}: {log.read_text()[-1000:]}" for log in sorted(root.glob("*.log"))]
            raise AssertionError("\n".join([otherwise, *logs]))
        time.sleep(0.1)


def _idle(running: Cluster) -> int:
    try:
        states = running.call(["sinfo", "--noheader", "--Node", "--format=%T"])
    except AssertionError:  # the controller does not answer yet
        return 0
    return states.split().count("idle")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
