"""A real SLURM of two one-CPU nodes on this machine, in a folder of its own: nothing of the system's is touched."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

NODES = ("n1", "n2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "munged")
CONFIGURATION = """
ClusterName=alter
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=5
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    """Why there can be no cluster here, or None."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if absent:
        return f"SLURM is not installed here (no {', '.join(absent)}); Debian has it as slurm-wlm and munge"
    return None if os.geteuid() == 0 else "SLURM's daemons need root"


def free_ports(number):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Cluster:
    """Starts on entering, stops on leaving; ``environment`` is for SLURM's commands and for ALTER's."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.environment = {
            **os.environ,
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "MASTER_ADDR": "127.0.0.1",  # the nodes' names are known to SLURM alone
        }
        self.daemons = {}

    def __enter__(self):
        (self.folder / "state").mkdir(parents=True)
        text = CONFIGURATION.format(host=socket.gethostname(), folder=self.folder, ports=free_ports(3))
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.folder.chmod(0o755)
        places = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "log-file": "munge.log",
                  "seed-file": "munge.seed"}  # fmt: skip
        options = [f"--{name}={self.folder / file}" for name, file in places.items()]
        try:
            self._start("munged", ["munged", "--foreground", "--force", *options])
            self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
            self._start("slurmctld", ["slurmctld", "-D"])
            for node in NODES:
                (self.folder / f"spool.{node}").mkdir()
                self.start_node(node)
            self.until_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        with contextlib.suppress(Exception):
            self.run("scancel", "--user=root")
            self._until(lambda: not self.run("squeue", "-h"), "jobs", 20)
        for name in reversed(list(self.daemons)):
            self.stop(name)

    def until_idle(self):
        self._until(lambda: self.nodes() == dict.fromkeys(NODES, "idle"), "the nodes", 60)

    def _start(self, name, command):
        with (self.folder / f"{name}.out").open("a") as log:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def start_node(self, node):
        self._start(node, ["slurmd", "-D", "-N", node])

    def stop(self, name, how=signal.SIGTERM):
        """Ends a daemon; SIGKILL is how a machine fails."""
        process = self.daemons.pop(name)
        process.send_signal(how)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def run(self, *command, seconds=60):
        """What one of SLURM's commands prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def nodes(self):
        lines = self.run("sinfo", "-h", "-N", "-o", "%N %t").splitlines()
        return {name: state.rstrip("*") for name, state in map(str.split, lines)}

    def state(self, job):
        """SLURM's word for where a job stands, such as RUNNING."""
        return self.fact(job, "JobState")

    def fail(self, node, job):
        """Lets a node die with what it runs of a job: nothing can tell the controller any more."""
        self.stop(node, signal.SIGKILL)
        marks = (f"SLURM_JOB_ID={job}", f"SLURM_CONF={self.folder / 'slurm.conf'}")
        own = [pid for pid in _processes() if set(marks) <= set(_read(pid, "environ"))]
        parents = [parent for pid in own if "slurmstepd" in " ".join(_read(parent := _parent(pid), "cmdline"))]
        for pid in dict.fromkeys([*parents, *own]):  # those that would tell first
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def fact(self, job, name):
        text = self.run("scontrol", "show", "job", str(job))
        return re.search(rf"(?:^|\s){name}=(.*?)(?=\s+[\w/:]+=|\s*$)", text, re.MULTILINE)[1]

    def wait(self, job, state="COMPLETED", seconds=240):
        """Until a job is in a state."""

        def there():
            found = self.state(job)
            assert state != "COMPLETED" or found not in ("FAILED", "CANCELLED", "TIMEOUT", "BOOT_FAIL"), self.log(job)
            return found == state

        self._until(there, f"job {job} to be {state}", seconds)

    def log(self, job):
        file = Path(self.fact(job, "StdOut"))
        return file.read_text(errors="replace")[-4000:] if file.is_file() else f"no {file}"

    def _until(self, true, what, seconds=30):
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"waited {seconds} s for {what}; see {self.folder}"
            time.sleep(0.2)


def _processes():
    return [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal()]


def _read(pid, file):
    try:
        return Path(f"/proc/{pid}/{file}").read_text(errors="replace").split("\0")
    except OSError:  # it has ended
        return []


def _parent(pid):
    status = "".join(_read(pid, "stat"))
    return int(status.rpartition(")")[2].split()[1]) if status else 0
