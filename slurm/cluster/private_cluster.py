"""A SLURM of one's own on one Debian machine, as root: two emulated nodes, no accounting, no systemd, no cgroups.

Everything lies in one folder (its root) and listens on ports of its own, so that several clusters may stand beside each
other and beside a real one. ``up``, ``down`` and ``disturb`` are the commands; this file is what they share. Only the
standard library is used.
"""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
BINARIES = ("slurmctld", "slurmd", "sinfo", "munged")
STAND_INS = Path(__file__).resolve().parent / "bin"  # an `sacct` for a cluster that keeps no accounts
PATIENCE_SECONDS = 30.0

# Scheduling is eager (tests wait for it) and nodes are declared dead after 10 s. The sizes of the nodes are invented:
# config_overrides makes SLURM believe them. Jobs go to the least loaded node (LLN), so that a sweep uses them all. Jobs
# of partition `low` make way for those of `main`.
SLURM_CONF = """\
ClusterName=moeprune
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={root}/munge/munge.socket,cred_expire=10
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=256
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=10
KillWait=2
MinJobAge=86400
JobRequeue=1
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 MaxTime=INFINITE State=UP LLN=YES PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1 MaxTime=INFINITE State=UP LLN=YES PreemptMode=REQUEUE GraceTime=5
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=100000 {gres}"


def missing_binaries() -> list[str]:
    """The programs without which no cluster can be started here."""
    return [name for name in BINARIES if _program(name) is None]


def start(nodes: int, cpus: int, gpus: int) -> Path:
    """Start a cluster of ``nodes`` nodes n1, n2, ... with so many cores and pretended GPUs each; its root."""
    # A short path: those of sockets may not exceed 108 bytes.
    root = Path(tempfile.mkdtemp(prefix="slurm."))
    root.chmod(0o755)  # munge asks for it
    names = [f"n{number}" for number in range(1, nodes + 1)]
    for folder in ("etc", "munge", "state", "log", "run", *(f"spool-{name}" for name in names)):
        (root / folder).mkdir(mode=0o755)
    host = socket.gethostname().split(".")[0]
    port, *node_ports = _free_ports(1 + nodes)
    gres = f"Gres=gpu:{gpus}" if gpus else ""
    lines = [
        NODE.format(name=name, host=host, port=its_port, cpus=cpus, gres=gres)
        for name, its_port in zip(names, node_ports, strict=True)
    ]
    conf_of(root).write_text(SLURM_CONF.format(root=root, host=host, port=port, nodes="\n".join(lines)))
    (root / "etc/gres.conf").write_text("\n".join(["AutoDetect=off", *_pretended_gpus(root, gpus)]) + "\n")
    try:
        _start_munge(root)
        start_controller(root)
        for name in names:
            start_node(root, name)
        wait_until(lambda: idle_nodes(root) == nodes, f"{nodes} idle nodes", root)
    except BaseException:
        _end_daemons(root)
        raise
    return root


def stop(root: Path) -> None:
    """Cancel what runs, end the daemons and remove the root."""
    if controller_answers(root):
        client(root, "scancel", "--user=root")
        wait_until(lambda: not client(root, "squeue", "--noheader"), "an empty queue", root, fail=False)
    _end_daemons(root)
    shutil.rmtree(root, ignore_errors=True)


def start_controller(root: Path) -> None:
    """Start slurmctld; it finds its jobs again in its state."""
    _daemon(root, "slurmctld")
    wait_until(lambda: controller_answers(root), "an answer of the controller", root)


def stop_controller(root: Path) -> None:
    """End slurmctld as an administrator does: it writes its state; jobs run on, clients get no answer."""
    _kill(_pid_in(root / "run/slurmctld.pid"), signal.SIGTERM)
    wait_until(lambda: not controller_answers(root), "end of the controller", root)


def start_node(root: Path, name: str) -> None:
    """Start slurmd of a node; the controller takes it back into service by itself."""
    _daemon(root, "slurmd", "-N", name)


def crash_node(root: Path, name: str) -> None:
    """kill -9 slurmd, its step daemons and everything these started, as if the power went.

    The controller is told, and puts the jobs back into the queue; by itself it would notice after a minute.
    """
    _kill(_pid_in(root / f"run/slurmd-{name}.pid"), signal.SIGKILL)
    daemons = list(_step_daemons(root / f"spool-{name}"))
    for pid in [*daemons, *_descendants(daemons)]:
        _kill(pid, signal.SIGKILL)
    if controller_answers(root):
        client(root, "scontrol", "update", f"nodename={name}", "state=down", "reason=crashed")


def idle_nodes(root: Path) -> int:
    return len(
        client(root, "sinfo", "--noheader", "--Node", "--partition=main", "--states=idle", "--format=%N").split()
    )


def controller_answers(root: Path) -> bool:
    return "is UP" in client(root, "scontrol", "ping")


def client(root: Path, *command: str) -> str:
    """What a SLURM client prints; nothing when it fails or does not answer."""
    try:
        done = subprocess.run(command, env=environment(root), capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip()


def conf_of(root: Path) -> Path:
    return root / "etc/slurm.conf"


def environment(root: Path) -> dict[str, str]:
    """Of a process that uses the cluster."""
    # A job's own variables would make clients believe that they run inside it.
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    return {**outside, "SLURM_CONF": str(conf_of(root)), "PATH": f"{STAND_INS}:{os.environ['PATH']}"}


def wait_until(condition: Callable[[], bool], what: str, root: Path, fail: bool = True) -> None:
    """Ask five times a second. Ends the program, naming the logs, when patience is at its end."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > end:
            if fail:
                raise TimeoutError(f"no {what} after {PATIENCE_SECONDS:.0f} s; the logs are in {root}/log")
            return
        time.sleep(0.2)


def chosen_root() -> Path:
    """The cluster that SLURM_CONF names, if `up` made it."""
    conf = Path(os.environ.get("SLURM_CONF", "/nowhere"))
    root = conf.parent.parent
    if not (conf.is_file() and root.name.startswith("slurm.") and (root / "munge").is_dir()):
        sys.exit("SLURM_CONF names no cluster that slurm/cluster/up started; eval what it printed.")
    return root


def _end_daemons(root: Path) -> None:
    for node in sorted(root.glob("spool-*")):
        crash_node(root, node.name.removeprefix("spool-"))
    for pid_file in ("run/slurmctld.pid", "munge/munged.pid"):
        _kill(_pid_in(root / pid_file), signal.SIGKILL)


def _pretended_gpus(root: Path, count: int) -> list[str]:
    """Lines of gres.conf. SLURM asks that a GPU be a device file, not which: each is another /dev/null."""
    for number in range(count):
        os.mknod(root / f"nvidia{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    return [f"Name=gpu File={root}/nvidia{number}" for number in range(count)]


def _start_munge(root: Path) -> None:
    folder = root / "munge"
    key = folder / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    names = {"key": "key", "socket": "munge.socket", "pid": "munged.pid", "log": "munged.log", "seed": "seed"}
    files = {option: folder / name for option, name in names.items()}
    _daemon(
        root, "munged", f"--key-file={files['key']}", f"--socket={files['socket']}", f"--pid-file={files['pid']}",
        f"--log-file={files['log']}", f"--seed-file={files['seed']}",
    )  # fmt: skip


def _daemon(root: Path, name: str, *arguments: str) -> None:
    """Start a program that puts itself into the background."""
    program = _program(name)
    if program is None:
        raise FileNotFoundError(name)
    command = [program, *arguments]
    # Not into pipes: the daemon would keep them open, and who reads them would wait for ever.
    said = root / f"log/start-{name}.log"
    with said.open("w") as output:
        done = subprocess.run(
            command, env=environment(root), cwd="/", stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{said.read_text()}")


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _pid_in(pid_file: Path) -> int | None:
    try:
        return int(pid_file.read_text())
    except (OSError, ValueError):
        return None


def _kill(pid: int | None, number: int) -> None:
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _step_daemons(spool: Path) -> Iterator[int]:
    """Processes that listen on a socket in the node's spool folder, as each slurmstepd does."""
    inodes = set()
    for line in Path("/proc/net/unix").read_text().splitlines():
        columns = line.split()
        if columns[-1].startswith(f"{spool}/"):
            inodes.add(f"socket:[{columns[6]}]")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(one) in inodes for one in (process / "fd").iterdir()):
                yield int(process.name)
        except OSError:  # it has just ended
            continue


def _descendants(pids: list[int]) -> list[int]:
    children: dict[int, list[int]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(process.name))
    found, left = [], list(pids)
    while left:
        young = children.get(left.pop(), [])
        found += young
        left += young
    return found
