"""A private Slurm cluster for tests: real daemons, virtual nodes on this machine, own ports."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
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


def missing_programs() -> list[str]:
    """What a cluster needs and this machine lacks (Debian: apt-get install slurm-wlm munge)."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


@dataclass(frozen=True)
class Job:
    """A job that has ended. `log` is what the batch script and its tasks printed."""

    state: str
    exit_code: str
    log: str


@dataclass(frozen=True)
class Cluster:
    """A running cluster; its nodes share this machine's disks and its loopback network."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """What its commands need. The names of virtual nodes mean nothing to a resolver, so
        ranks are told where to meet."""
        return {
            "SLURM_CONF": str(self.root / "slurm.conf"),
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def run(self, batch: Sequence[str | Path], env: Mapping[str, str], timeout: float = 90) -> Job:
        """sbatch the script and arguments `batch`, and wait for the end of the job."""
        env = {**env, **self.environment}
        log = self.root / "job.log"
        command = ["sbatch", "--parsable", f"--output={log}", *map(str, batch)]
        number = _output(command, env).strip()
        deadline = time.monotonic() + timeout
        while _output(["squeue", "--noheader", "--job", number], env).strip():
            if time.monotonic() > deadline:
                _output(["scancel", number], env)
                raise AssertionError(f"job {number} ran longer than {timeout} s\n{log.read_text()}")
            time.sleep(0.2)
        shown = _output(["scontrol", "--oneliner", "show", "job", number], env)
        fields = dict(re.findall(r"(JobState|ExitCode)=(\S+)", shown))
        return Job(fields["JobState"], fields["ExitCode"], log.read_text())


@contextmanager
def cluster(root: Path, *, nodes: int, cpus: int, env: Mapping[str, str]) -> Iterator[Cluster]:
    """Start a cluster of virtual nodes n1, n2 ... with its files in `root`, and stop it again."""
    host = socket.gethostname().split(".")[0]
    ports = _free_ports(nodes + 1)
    for name in ("state", *(f"spool.n{number}" for number in range(1, nodes + 1))):
        (root / name).mkdir()
    key = root / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    lines = [
        f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} "
        f"Sockets=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=4000"
        for number, port in enumerate(ports[1:], start=1)
    ]
    lines.append(f"PartitionName=test Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP")
    conf = root / "slurm.conf"
    common = _CONF.format(host=host, port=ports[0], user=getpass.getuser(), root=root)
    conf.write_text(common + "\n".join(lines) + "\n")

    env = {**env, "PATH": f"{env['PATH']}:/usr/sbin:/sbin", "SLURM_CONF": str(conf)}
    munge = ["munged", "--foreground", "--force", f"--socket={root}/munge.socket"]
    munge += [f"--{what}-file={root}/munge.{what}" for what in ("key", "pid", "log", "seed")]
    with ExitStack() as daemons:
        daemons.enter_context(_daemon(root / "munged.log", munge, env))
        _until((root / "munge.socket").exists, "munged does not answer", root)
        control = ["slurmctld", "-D", "-c", "-f", str(conf)]
        daemons.enter_context(_daemon(root / "slurmctld.log", control, env))
        for number in range(1, nodes + 1):
            command = ["slurmd", "-D", "-f", str(conf), "-N", f"n{number}"]
            daemons.enter_context(_daemon(root / f"slurmd.n{number}.log", command, env))
        _until(lambda: _idle(env) == nodes, "the nodes do not come up", root)
        yield Cluster(root)


@contextmanager
def _daemon(log: Path, command: Sequence[str], env: Mapping[str, str]) -> Iterator[None]:
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


def _idle(env: Mapping[str, str]) -> int:
    states = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return states.stdout.split().count("idle")


def _output(command: Sequence[str], env: Mapping[str, str]) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
