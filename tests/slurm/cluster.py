"""A real Slurm cluster of two nodes on this machine, for as long as a block runs.

Each node is a network namespace with processes, mounts, a host name and a /tmp of its own, so that two nodes share
nothing but files below one folder, as on a cluster. Needs root, iproute2, and Debian's slurm-wlm and munge.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CPUS = 2
"""Of each node, as Slurm counts them."""
NODES = ("n1", "n2")


def missing() -> str:
    """Why there can be no such cluster here; empty where there can."""
    needed = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
    absent = [name for name in needed if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge iproute2 util-linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode != 0:
        return "this container may not make network namespaces"
    if Path(sys.prefix).is_relative_to("/tmp"):
        return "each node has a /tmp of its own, and this checkout lies below /tmp: move it"
    return ""


_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Cluster:
    """`shared` is the folder that both nodes and this process see."""

    def __init__(self, shared: Path) -> None:
        self.shared, self.net = shared, os.getpid() % 250 + 1
        self.conf = shared / "slurm" / "slurm.conf"
        self._inits: dict[str, subprocess.Popen[bytes]] = {}
        self._daemons: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """For Slurm's commands, and what they start."""
        return {**os.environ, "PATH": _PATH, "SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        """Everything, until both nodes are idle."""
        for name in ("state", "log", "spool", "munge"):
            (self.conf.parent / name).mkdir(parents=True, exist_ok=True)
        self._start_munge()
        self.conf.write_text(self._configuration())
        (self.conf.parent / "plugstack.conf").touch()
        hosts = [f"{self._ip(i + 1)} {name}" for i, name in enumerate(NODES)]
        host = f"{self._ip(254)} {socket.gethostname().split('.')[0]}"
        (self.conf.parent / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, host, ""]))
        self._ip_command(f"link add {self._bridge} type bridge")
        self._ip_command(f"addr add {self._ip(254)}/24 dev {self._bridge}")
        self._ip_command(f"link set {self._bridge} up")
        self._daemon("slurmctld", "-D", "-f", str(self.conf))
        for name in NODES:
            self._connect(name)
            self.power_on(name)
        self.until(lambda: self.states() == ["idle"], 60, "nodes that are idle")

    def stop(self) -> None:
        """Everything, whatever state it is in."""
        for name in NODES:
            self.power_off(name)
            with contextlib.suppress(subprocess.CalledProcessError):
                self._ip_command(f"netns del {self._space(name)}")
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()
        with contextlib.suppress(subprocess.CalledProcessError):
            self._ip_command(f"link del {self._bridge}")

    def power_on(self, name: str) -> None:
        """A node boots: its first process, and slurmd."""
        log = (self.conf.parent / "log" / f"{name}.out").open("ab")
        boot = f"""hostname {name}; mount -t tmpfs tmpfs /tmp; mount -t tmpfs tmpfs /dev/shm
            mount --bind {self.conf.parent}/hosts /etc/hosts; slurmd -D -f {self.conf} -N {name} & wait; sleep inf"""
        words = ["nsenter", f"--net=/run/netns/{self._space(name)}", "unshare", "--pid", "--fork", "--mount", "--uts"]
        self._inits[name] = subprocess.Popen(
            [*words, "--mount-proc", "--kill-child", "bash", "-c", boot],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=self.environment,
            start_new_session=True,
        )
        log.close()

    def power_off(self, name: str) -> None:
        """Every process of the node is gone at once."""
        for pid in self.processes(name, "init"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if name in self._inits:
            self._inits.pop(name).wait()

    def kill_slurmd(self, name: str) -> None:
        """Slurm's daemon alone: what it started goes on."""
        for pid, title in self.processes(name).items():
            if title.startswith("slurmd "):
                os.kill(pid, signal.SIGKILL)

    def start_slurmd(self, name: str) -> None:
        """It comes back."""
        self.run("bash", "-c", f"slurmd -f {self.conf} -N {name}", node=name)

    def processes(self, name: str, containing: str = "") -> dict[int, str]:
        """Living processes of a node, by their number out here: those whose command line contains something.

        `init`: the node's first one.
        """
        net = Path(f"/run/netns/{self._space(name)}")
        inode = net.stat().st_ino if net.exists() else -1
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                title = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if (process / "ns" / "net").stat().st_ino == inode and title:
                    found[int(process.name)] = title
        if containing == "init":
            return {pid: title for pid, title in found.items() if title.startswith("unshare")}
        return {pid: title for pid, title in found.items() if containing in title}

    def run(self, *words: str, node: str = "", check: bool = True, seconds: float = 60) -> str:
        """What a command prints, here or on a node."""
        if node:
            inside = next(
                pid
                for pid, title in self.processes(node).items()
                if title.startswith(("bash -c hostname", "sleep inf"))
            )
            words = ("nsenter", f"--target={inside}", "--net", "--mount", "--uts", "--pid", *words)
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=seconds)
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def states(self) -> list[str]:
        """Of the nodes, each once."""
        return sorted(set(self.run("sinfo", "-h", "-o", "%T", "-p", "main", check=False).split()))

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job."""
        told = self.run("scontrol", "show", "job", number, "-o").split()
        return {key: value for key, _, value in (word.partition("=") for word in told)}

    def until(self, condition: Callable[[], bool], seconds: float, what: str) -> float:
        """Wait for it to become true; returns the seconds that took."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds, f"waited {seconds} s for {what}; {self.told()}"
            time.sleep(0.1)
        return time.monotonic() - began

    def told(self) -> str:
        """What the controller and the nodes wrote last, for a failed test."""
        tails = [
            f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in (self.conf.parent / "log").iterdir()
        ]
        return "\n".join([self.run("squeue", "-l", check=False), *tails])

    def _start_munge(self) -> None:
        folder = self.conf.parent / "munge"
        folder.chmod(0o755)
        key = folder / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        words = [f"--{name}={folder / file}" for name, file in _MUNGE.items()]
        self._daemon("munged", "--force", "--foreground", *words)
        self.until((folder / "socket").exists, 20, "munge")

    def _daemon(self, *words: str) -> None:
        with (self.conf.parent / "log" / words[0]).open("ab") as log:
            self._daemons.append(subprocess.Popen(words, stdout=log, stderr=log, env=self.environment))

    def _connect(self, name: str) -> None:
        space, number, cable = self._space(name), NODES.index(name) + 1, f"{self._bridge}{name}"
        for words in (
            f"netns add {space}",
            f"link add {cable} type veth peer name eth0 netns {space}",
            f"link set {cable} master {self._bridge} up",
            f"-n {space} addr add {self._ip(number)}/24 dev eth0",
            f"-n {space} link set eth0 up",
            f"-n {space} link set lo up",
            f"-n {space} route add default via {self._ip(254)}",
        ):
            self._ip_command(words)

    def _ip_command(self, words: str) -> None:
        subprocess.run(["ip", *words.split()], check=True, capture_output=True, env=self.environment)

    @property
    def _bridge(self) -> str:
        return f"tl{self.net}"

    def _space(self, name: str) -> str:
        return f"tldist-{self.net}-{name}"

    def _ip(self, last: int) -> str:
        return f"10.77.{self.net}.{last}"

    def _configuration(self) -> str:
        folder, host = self.conf.parent, socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={name} NodeAddr={self._ip(i + 1)} Port=6818 CPUs={CPUS} Boards=1 "
            f"SocketsPerBoard=1 CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory=2000 State=UNKNOWN"
            for i, name in enumerate(NODES)
        )
        return _CONFIGURATION.format(folder=folder, host=host, ip=self._ip(254), port=_free_port(), nodes=nodes)


_MUNGE = {
    "key-file": "key",
    "socket": "socket",
    "pid-file": "pid",
    "log-file": "log",
    "seed-file": "seed",
}

# KillWait is Slurm's default: what must end within seconds ends by itself, not because Slurm kills it.
_CONFIGURATION = """\
ClusterName=tldist
SlurmctldHost={host}({ip})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
ReturnToService=2
SlurmdTimeout=15
InactiveLimit=0
KillWait=30
MinJobAge=600
Waittime=0
JobRequeue=1
SlurmctldParameters=idle_on_node_suspend,preempt_send_user_signal
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
PlugStackConfig={folder}/plugstack.conf
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
{nodes}
"""


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """The cluster while the block runs. Its folder is not below /tmp, which each node has for itself."""
    with tempfile.TemporaryDirectory(prefix="tldist-slurm-", dir="/var/tmp", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        running = Cluster(Path(folder))
        try:
            running.start()
            yield running
        finally:
            running.stop()


if __name__ == "__main__":  # a cluster to play with: `python tests/slurm/cluster.py bash`
    with cluster() as playground:
        os.chdir(playground.shared)
        sys.exit(subprocess.run(sys.argv[1:] or ["bash"], env=playground.environment).returncode)
