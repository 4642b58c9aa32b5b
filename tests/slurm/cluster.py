"""A SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd, all our own, stopped by pid."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("fluxnode1", "fluxnode2")
CONFIGURATION = """
ClusterName=flux
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=15
MinJobAge=3600
SchedulerParameters=defer,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
FirstJobId={first_job}
MpiDefault=none
NodeName={nodes[0]} NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]} CPUs=2 RealMemory=4000
NodeName={nodes[1]} NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """Two nodes of two CPUs; the partition `urgent` preempts `main` with 20 seconds of grace."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.processes: list[subprocess.Popen] = []
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        folder, host = self.folder, socket.gethostname()
        (folder / "state").mkdir()
        text = CONFIGURATION.format(
            folder=folder, host=host, nodes=NODES, ports=free_ports(3), first_job=int(time.time()) % 1_000_000 + 1
        )
        (folder / "slurm.conf").write_text(text)
        hosts = Path("/etc/hosts").read_text()
        (folder / "hosts").write_text(f"{hosts}\n127.0.0.1 {host} {' '.join(NODES)}\n")
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        self.daemon(
            "munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed",
        )  # fmt: skip
        wait_for(lambda: (folder / "munge.socket").exists(), 20, "munged")
        self.daemon("slurmctld", "-D", "-i", "-f", f"{folder}/slurm.conf")
        for node in NODES:
            (folder / f"spool-{node}").mkdir()
            self.daemon("slurmd", "-D", "-N", node, "-f", f"{folder}/slurm.conf")
        wait_for(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").split()[:1] == ["2"], 60, "both nodes")

    def daemon(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}.out").open("a")
        path = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        assert path is not None
        # In a mount namespace of its own the cluster has its own /etc/hosts: names that don't resolve make jobs hang.
        inside = f"mount --bind {self.folder}/hosts /etc/hosts && exec {shlex.join([path, *command[1:]])}"
        process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", inside], stdout=log, stderr=log, env=self.environment
        )
        self.processes.append(process)

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()

    def run(self, *command: str, timeout: float = 60) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=self.environment)
        return done.stdout if done.returncode == 0 else f"{done.stdout}{done.stderr}"

    # ---- jobs ----

    def submit(self, script: Path, *arguments: str, options: tuple[str, ...] = (), **variables: str) -> str:
        """The job's id."""
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(script), *arguments],
            capture_output=True, text=True, timeout=60, env=self.environment | variables,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().partition(";")[0]

    def show(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job)))

    def state(self, job: str) -> str:
        return self.show(job).get("JobState", "")

    def wait_until(self, job: str, *states: str, timeout: float) -> dict[str, str]:
        wait_for(lambda: self.state(job) in states, timeout, f"job {job} to be {' or '.join(states)}", self.log)
        return self.show(job)

    def log(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("job-*.out"))
        )


def wait_for(condition, timeout: float, what: str, log=lambda: "") -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:.0f} s for {what}\n{log()}")
        time.sleep(0.3)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def missing() -> str:
    """Why there can be no cluster here; "" where there can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
    if os.geteuid() != 0:
        return "slurmctld and slurmd of a test cluster need root"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        return "a test cluster needs a mount namespace of its own, and `unshare --mount` is refused here"
    return ""
