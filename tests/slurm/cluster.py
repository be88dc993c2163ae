"""Run a real Slurm of several nodes on one machine, isolated from the machine itself. It needs Debian packages:

    apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2 util-linux

Everything runs below one process in its own pid, mount, network and hostname namespaces. Ending it ends the cluster.
Each node is a child process with its own pid namespace and hostname. Its address lies on the loopback interface; node
n1 has 10.99.0.1. A node that crashes therefore takes its daemon, its steps and their connections with it. Without root,
a user namespace surrounds everything.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
CONTROL_PORT, NODE_PORT = 17817, 17818
START_LIMIT_S = 60
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
SYSTEM_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

CONFIGURATION = """\
ClusterName=test
SlurmctldHost=control(10.99.0.254)
SlurmctldPort={control_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
MessageTimeout=10
KillWait=5
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,requeue_delay=0
GresTypes=gpu
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Start a cluster on entry to a `with` block, and end it on exit.

    Args:
        folder: holds configuration, logs and sockets. Keep its path short: a socket's path has at most 107 bytes.
        num_nodes: nodes n1, n2, ..., each with 16 pretended cores and 8 pretended GPUs.
    """

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder, self.num_nodes = folder, num_nodes

    def __enter__(self) -> "Cluster":
        for name in ("munge", "state", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        user_namespace = [] if os.getuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
        command = ["unshare", *user_namespace, "--pid", "--mount", "--net", "--uts", "--fork", "--kill-child"]
        inside = [sys.executable, __file__, str(self.folder), str(self.num_nodes)]
        self._log = (self.folder / "log" / "cluster").open("w")
        self._holder = subprocess.Popen(
            [*command, "--mount-proc", *inside],
            stdin=subprocess.PIPE,  # the cluster ends when this pipe closes
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "PATH": SYSTEM_PATH},
        )
        try:
            self._wait(lambda: (self.folder / "ready").exists(), START_LIMIT_S, "the cluster to start")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.kill()  # --kill-child ends the first process of the namespace; the kernel ends the others
        self._holder.communicate()
        self._log.close()

    def run(self, *command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """Return the output of a command inside the cluster, for example `squeue`; raises CalledProcessError."""
        (first,) = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()[:1]
        user_namespace = [] if os.getuid() == 0 else ["--user", "--preserve-credentials"]
        enter = ["nsenter", "--target", first, *user_namespace, "--mount", "--net", "--pid", "--uts"]
        environment = {**os.environ, "PATH": SYSTEM_PATH, "SLURM_CONF": str(self.folder / "slurm.conf"), **(env or {})}
        where = [f"--wd={cwd or Path.cwd()}"]
        done = subprocess.run([*enter, *where, *command], env=environment, capture_output=True, text=True, timeout=180)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    def query(self, *command: str) -> str:
        """Like `run`, for commands that only read: tries again if a busy controller drops the connection."""
        for _ in range(3):
            try:
                return self.run(*command)
            except subprocess.CalledProcessError:
                time.sleep(1)
        return self.run(*command)

    def submit(self, script: str, *arguments: str, options: list[str], env: dict[str, str], cwd: Path) -> int:
        """Submit a job and return its number."""
        return int(self.run("sbatch", "--parsable", *options, script, *arguments, cwd=cwd, env=env))

    def state(self, job: int) -> str:
        """Return PENDING, RUNNING, ... as scontrol reports it; for an array, of a task that has not ended."""
        states = re.findall(r"JobState=(\w+)", self.query("scontrol", "show", "job", str(job)))
        return next((state for state in states if state not in ENDED), max(states))

    def job_nodes(self, job: int) -> list[str]:
        listed = self.query("squeue", "--noheader", "--jobs", str(job), "--format=%N").strip()
        return self.query("scontrol", "show", "hostnames", listed).split() if listed else []

    def wait_for_end(self, job: int, limit_s: float) -> str:
        """Wait until the job has ended and return its last state."""
        self._wait(lambda: self.state(job) in ENDED, limit_s, f"job {job} to end")
        return self.state(job)

    def crash(self, node: str) -> None:
        """Kill a node and everything that runs on it."""
        self._ask("crash", node)

    def boot(self, node: str) -> None:
        self._ask("boot", node)

    def kill(self, text: str) -> int:
        """Send SIGKILL to the processes inside whose command line contains the text; return how many there were."""
        return int(self._ask("kill", text))

    def _ask(self, *words: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.folder / "control"))
            connection.sendall(json.dumps(words).encode())
            connection.shutdown(socket.SHUT_WR)
            answer = connection.makefile().read()
        assert answer.startswith("ok "), answer
        return answer[3:]

    def _wait(self, condition: Callable[[], bool], limit_s: float, what: str) -> None:
        end = time.monotonic() + limit_s
        while not condition():
            assert self._holder.poll() is None, f"the cluster ended:\n{(self.folder / 'log/cluster').read_text()}"
            assert time.monotonic() < end, f"waited {limit_s} s for {what}\n{self._logs()}"
            time.sleep(0.2)

    def _logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in (self.folder / "log").iterdir())


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]


def may_make_namespaces() -> bool:
    """Return whether this user may start a cluster here; some containers forbid it."""
    user_namespace = [] if os.getuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    command = ["unshare", *user_namespace, "--pid", "--mount", "--net", "--uts", "--fork", "--mount-proc", "true"]
    return subprocess.run(command, capture_output=True).returncode == 0


class Inside:
    """First process of the cluster's namespaces: starts the daemons and nodes, then serves requests."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder, self.num_nodes = folder, num_nodes
        self.nodes: dict[str, subprocess.Popen] = {}
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")

    def start(self) -> None:
        socket.sethostname("control")
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        for number in (*range(1, self.num_nodes + 1), 254):  # names do not resolve if 127.0.0.0/8 is the only address
            subprocess.run(["ip", "address", "add", f"10.99.0.{number}/24", "dev", "lo"], check=True)
        self._name_hosts()
        self._configure()
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(256))
        (munge / "key").chmod(0o400)
        munge.chmod(0o711)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._spawn("munged", "-F", "--force", *(f"--{key}={munge / name}" for key, name in files.items()))
        _until(lambda: (munge / "socket").exists())
        self._spawn("slurmctld", "-D", "-c")
        _until(lambda: subprocess.run(["scontrol", "ping"], capture_output=True).returncode == 0)
        for number in range(1, self.num_nodes + 1):
            self.boot(f"n{number}")
        _until(
            lambda: self._output("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle"] * self.num_nodes
        )
        (self.folder / "ready").touch()

    def serve(self) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(self.folder / "control"))
            server.listen()
            while True:
                connection, _ = server.accept()
                with connection:
                    action, argument = json.loads(connection.makefile().read())
                    result = getattr(self, action)(argument)
                    connection.sendall(f"ok {result}".encode())

    def boot(self, node: str) -> None:
        script = f"hostname {node}; exec slurmd -D -N {node}"
        command = ["unshare", "--pid", "--uts", "--mount", "--fork", "--kill-child", "--mount-proc"]
        self.nodes[node] = self._spawn(*command, "bash", "-c", script)

    def crash(self, node: str) -> None:
        self.nodes[node].kill()
        self.nodes[node].wait()

    def kill(self, text: str) -> int:
        killed = 0
        for process in (
            path for path in Path("/proc").iterdir() if path.name.isdigit() and int(path.name) != os.getpid()
        ):
            try:
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if text in line and not line.startswith(("srun", "bash", "slurm", "/bin/bash")):
                    os.kill(int(process.name), signal.SIGKILL)
                    killed += 1
            except OSError:
                continue
        return killed

    def _name_hosts(self) -> None:
        lines = ["127.0.0.1 localhost", "10.99.0.254 control"]
        lines += [f"10.99.0.{number} n{number}" for number in range(1, self.num_nodes + 1)]
        hosts = self.folder / "hosts"
        hosts.write_text("\n".join(lines) + "\n")
        subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True)

    def _configure(self) -> None:
        nodes = [
            f"NodeName=n{number} NodeAddr=10.99.0.{number} NodeHostname=n{number} Port={NODE_PORT + number} CPUs=16 "
            "RealMemory=16000 Gres=gpu:8 State=UNKNOWN"
            for number in range(1, self.num_nodes + 1)
        ]
        values: dict[str, Any] = {
            "folder": self.folder,
            "user": self._output("id", "-un").strip(),
            "control_port": CONTROL_PORT,
            "nodes": "\n".join(nodes),
        }
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
        devices = "File=/dev/tty[0-7]" if Path("/dev/tty7").exists() else "Count=8"
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-{self.num_nodes}] Name=gpu {devices}\n")

    def _spawn(self, *command: str) -> subprocess.Popen:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def _output(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True).stdout


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + START_LIMIT_S / 2
    while not condition():
        assert time.monotonic() < end, "a daemon does not come up"
        time.sleep(0.1)


if __name__ == "__main__":
    threading.Thread(target=lambda: os._exit(len(sys.stdin.read())), daemon=True).start()
    inside = Inside(Path(sys.argv[1]), int(sys.argv[2]))
    inside.start()
    inside.serve()
