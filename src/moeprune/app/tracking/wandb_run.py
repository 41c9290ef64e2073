"""The thread that owns a W&B run: what is told to it is logged in order, late or not at all, and delays nobody."""

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from moeprune.app.tracking.state import TrackedState

log = logging.getLogger(__name__)

Task = Callable[["WandbRun"], None]
POLL_SECONDS = 5.0
GRACE_SECONDS = 30.0


class WandbRun:
    """A W&B run that is opened, fed and closed by one thread of its own.

    W&B talks to a service process, and that to a server: either may be slow, hang or die while the road goes on. A
    server that cannot be reached at the start makes the run an offline one. After any other error one warning is logged
    and the rest is left out. ``init`` are the arguments of ``wandb.init``, its settings as plain values; ``poll``
    is called every few seconds.
    """

    def __init__(self, init: Mapping[str, Any], state: TrackedState, run_dir: Path, poll: Task) -> None:
        self.run: Any = None
        self.state = state
        self.run_dir = run_dir
        self.failed = False
        self._init = dict(init)
        self._poll = poll
        self._tasks: queue.Queue[Task | None] = queue.Queue()
        self._exit_code = 0
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def do(self, task: Task) -> None:
        """Have ``task`` called by the thread; returns at once."""
        if not self.failed:
            self._tasks.put(task)

    def log(self, row: Mapping[str, Any], recovery_step: int | None = None) -> None:
        """Log a history row, and remember that it was, and of which step of a recovery; for tasks.

        Its step follows those of earlier attempts, also where W&B cannot know them because it is offline.
        """
        step = max(self.state.next_row, self.run.step)
        self.run.log(dict(row), step=step, commit=True)  # without, a row waits for the next one
        recovered = self.state.recovery_step if recovery_step is None else recovery_step
        self.state = replace(self.state, next_row=step + 1, recovery_step=recovered)
        self.state.save(self.run_dir)

    def close(self, exit_code: int, timeout_s: float) -> None:
        """Log what is left and end the run; gives up after ``timeout_s`` seconds."""
        self._exit_code = exit_code
        self.do(self._poll)
        self._tasks.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.failed = True
            log.warning("W&B does not answer and is left out; what it wrote stays in %s.", self.run_dir / "wandb")
            _end_service()
            self._thread.join(GRACE_SECONDS)

    def _work(self) -> None:
        try:
            self.state.save(self.run_dir)
            with _staged_in(self.run_dir / "wandb"):
                self.run = self._opened()
                while (task := self._next()) is not None:
                    task(self)
                self.run.finish(exit_code=self._exit_code)
        except Exception as error:
            if not self.failed:
                log.warning("W&B logging failed and is left out: %s", str(error) or type(error).__name__)
            self.failed = True
            _forget_service()

    def _next(self) -> Task | None:
        """The next task; None at the end of the run."""
        while True:
            try:
                return self._tasks.get(timeout=POLL_SECONDS)
            except queue.Empty:
                self._poll(self)

    def _opened(self) -> Any:
        import wandb  # takes a second, and some runs do not use it

        logging.getLogger("wandb").setLevel(logging.CRITICAL)  # tracebacks of a service that died
        settings = wandb.Settings(**self._init.pop("settings"))
        try:
            return wandb.init(**self._init, settings=settings)
        except wandb.errors.CommError as error:
            if self._init["mode"] != "online":
                raise
            log.warning("W&B cannot be reached, so the run is kept offline: %s", error)
            _forget_service()  # which still holds the run's id
            return wandb.init(**{**self._init, "mode": "offline"}, settings=settings)


@contextmanager
def _staged_in(folder: Path) -> Iterator[None]:
    """What waits to be sent lies in ``folder``, not in the user's home, unless WANDB_DATA_DIR says so."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]


def _forget_service() -> None:
    """After an error the next run of this process gets a new service, and the end of Python asks nothing of the old."""
    with suppress(Exception):
        import wandb

        wandb.teardown()


def _end_service() -> None:
    """End the service of this process: W&B would wait for it without end when Python exits."""
    for child in psutil.Process().children():
        if "wandb-core" in child.name():
            child.kill()
