"""How the tasks of a SLURM job find each other: a file says where the first one listens, and the key that proves it.

A connection costs nothing while nothing is said, and says when the other end is gone.
"""

import hmac
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from moeprune.errors import LostProcessError

# The tasks of a job start together, but a busy file system lets Python take its time.
ALL_COME_WITHIN_S = 15 * 60.0
ADMITTED_WITHIN_S = 30  # who says nothing is none of ours
LOOKS_EVERY_S = 0.5
KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 20, "TCP_KEEPCNT": 3}  # s, s, times


@dataclass(frozen=True)
class Place:
    """Which task this is, of how many, and what tells one start of the job from another."""

    rank: int
    device: int
    tasks: int
    start: str

    @classmethod
    def of_slurm(cls) -> "Place":
        """As SLURM's variables say; outside of SLURM the only task."""
        job, restart = (os.environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))
        names = ("SLURM_PROCID", "SLURM_LOCALID")
        rank, device = (int(os.environ.get(name, 0)) for name in names)
        # Not SLURM_NTASKS, which a script of many tasks also has where it runs on one.
        return cls(rank, device, int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)), f"{job}-{restart}")


class Listener:
    """Where the first task hears the others."""

    def __init__(self, heard: socket.socket, key: bytes) -> None:
        self._heard, self._key = heard, key

    def next_task(self, deadline: float) -> tuple[Connection, int, str] | None:
        """The connection to a task that has not come before, its rank and its host; None after the deadline."""
        while (left := deadline - time.monotonic()) > 0:
            self._heard.settimeout(left)
            try:
                peer, _ = self._heard.accept()
            except TimeoutError:
                break
            if told := _admitted(peer, self._key):
                return told
        return None


@contextmanager
def listening(folder: Path, place: Place) -> Iterator[Listener]:
    """Within the context other tasks can come, on any of the host's addresses; later ones learn that all is over."""
    file, key = _file(folder, place), secrets.token_bytes(32)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(("", 0), family=family, backlog=place.tasks, dualstack_ipv6=both) as heard:
        _write(file, {"host": socket.gethostname(), "port": heard.getsockname()[1], "key": key.hex()})
        try:
            yield Listener(heard, key)
        finally:
            with suppress(OSError):  # on a full disk what matters is why the job ended
                _write(file, {})


def connect(folder: Path, place: Place) -> tuple[Connection, str] | None:
    """A connection to task 0, and its address; None when it has ended.

    Raises LostProcessError when it does not begin, or its host cannot be reached.
    """
    file = _file(folder, place)
    deadline, error = time.monotonic() + ALL_COME_WITHIN_S, "it has not begun"
    while time.monotonic() < deadline:
        meeting = _read(file)
        if meeting == {}:
            return None
        if meeting:
            address = "localhost" if meeting["host"] == socket.gethostname() else meeting["host"]
            try:
                peer = socket.create_connection((address, meeting["port"]), timeout=ADMITTED_WITHIN_S)
            except ConnectionRefusedError:
                return None
            except OSError as reason:
                error = f"{address} cannot be reached: {reason}"
            else:
                leader = _connection(peer)
                return (leader, address) if _is_admitted(leader, bytes.fromhex(meeting["key"]), place) else None
        time.sleep(LOOKS_EVERY_S)
    raise LostProcessError(f"Task {place.rank} waited {ALL_COME_WITHIN_S / 60:.0f} minutes for task 0: {error}.")


def _admitted(peer: socket.socket, key: bytes) -> tuple[Connection, int, str] | None:
    """The connection to a task, its rank and its host; None for whatever else has called."""
    said = _connection(peer, answers_within_s=ADMITTED_WITHIN_S)
    try:
        if _knows(key, said, own=b"leader", other=b"follower"):
            task = json.loads(said.recv_bytes(1000))
            _answer_within(said.fileno(), 0)
            return said, task["rank"], task["host"]
    except (EOFError, OSError):
        pass
    said.close()
    return None


def _is_admitted(leader: Connection, key: bytes, place: Place) -> bool:
    """Introduce this task; returns when task 0 has its first order for it, or (False) has ended."""
    try:
        if _knows(key, leader, own=b"follower", other=b"leader"):
            leader.send_bytes(json.dumps({"rank": place.rank, "host": socket.gethostname()}).encode())
            return True
    except (EOFError, OSError):
        pass
    leader.close()
    return False


def _knows(key: bytes, said: Connection, own: bytes, other: bytes) -> bool:
    """Whether who is at the other end has the key, which neither sends: orders are code to run."""
    challenge = secrets.token_bytes(32)
    said.send_bytes(challenge)
    said.send_bytes(hmac.digest(key, own + said.recv_bytes(32), "sha256"))
    return hmac.compare_digest(said.recv_bytes(32), hmac.digest(key, other + challenge, "sha256"))


def _connection(peer: socket.socket, answers_within_s: int = 0) -> Connection:
    """Says within minutes when the other end's host is gone."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEP_ALIVE.items():
        peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)  # Linux has them
    _answer_within(peer.fileno(), answers_within_s)
    return Connection(peer.detach())


def _answer_within(descriptor: int, seconds: int) -> None:
    """Let reading fail after so many seconds; 0: never."""
    with socket.socket(fileno=os.dup(descriptor)) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))


def _file(folder: Path, place: Place) -> Path:
    return folder / f"tasks-{place.start}.json"


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """Readable by this user alone, as it has the key."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        json.dump(content, stream)
    partial.replace(file)


def _read(file: Path) -> dict[str, Any] | None:
    """None while there is nothing. The folder is listed, as a shared one may remember for long that a file is not."""
    if not file.parent.is_dir() or file.name not in os.listdir(file.parent):
        return None
    return json.loads(file.read_text())
