"""What processes of a job do in tests of how they find, hear and end each other; starts at once, without PyTorch."""

import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path

from moeprune.errors import BudgetError, InputError
from moeprune.training.processes import Order
from moeprune.training.tasks import follow, lead, work_together

TASKS = 3


class OwnError(InputError):
    """That of somebody's plug-in."""


def leave_mark(folder: Path, name: str) -> None:
    """The variables of this process, and its number."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
    said = {name: os.environ[name] for name in names} | {"pid": os.getpid(), "parent": os.getppid()}
    partial = folder / f"{name}-{os.environ['RANK']}.partial"
    partial.write_text(json.dumps(said))
    partial.rename(partial.with_suffix(".json"))


def marks(folder: Path, name: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-*.json"))]


def waits_for(folder: Path, name: str) -> None:
    """At work until a file says to end."""
    leave_mark(folder, name)
    while not (folder / f"{name}.go").exists():
        time.sleep(0.01)


def fails_in(rank: int, error: Exception) -> None:
    """One fails; the others are at work for ever."""
    if int(os.environ["RANK"]) == rank:
        raise error
    time.sleep(600)


def fails_after_another(rank: int) -> None:
    """The first is killed, and the others notice at once, as by a broken connection."""
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    raise ConnectionResetError("by peer")


def says_a_mistake_late(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        time.sleep(0.5)
        raise BudgetError("what the user can change")
    raise ConnectionResetError("by peer")


def together(function, *arguments, world: int = TASKS) -> None:
    work_together(Order(pickle.dumps((function, arguments)), world, port=1234))


def job(folder: Path, orders: list) -> None:
    """What task 0 does: one order after the other, none while there is a file ``hold``; leaves what was raised."""
    with lead(folder):
        while (folder / "hold").exists():
            time.sleep(0.01)
        for function, *arguments in orders:
            try:
                together(function, *arguments)
            except Exception as error:
                (folder / "raised.json").write_text(json.dumps([type(error).__name__, str(error)]))
                raise


def main() -> None:
    """``light_work.py FOLDER``: a task of a job, as SLURM's variables say; orders are in a file."""
    folder = Path(sys.argv[1])
    if os.environ["SLURM_PROCID"] != "0":
        follow(folder)
    else:
        signal.signal(signal.SIGUSR2, lambda *_: sys.exit(-1))
        signal.signal(signal.SIGTERM, lambda *_: None)
        job(folder, pickle.loads((folder / "orders.pickle").read_bytes()))


if __name__ == "__main__":
    # Functions are found by the name of this module.
    import light_work

    light_work.main()
