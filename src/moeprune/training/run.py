"""A training run from its first step, or its last checkpoint, to its end."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from moeprune.errors import NumericalError
from moeprune.training.checkpoints import Checkpoints, Progress
from moeprune.training.curve import LossCurve
from moeprune.training.learner import Learner
from moeprune.training.steps import Steps, mean_loss, take_step

log = logging.getLogger(__name__)

TELL_EVERY_SECONDS = 60.0  # beside the bar, for who reads a log file


@dataclass(frozen=True)
class Schedule:
    """How long a run is and what happens between its steps; all in optimizer steps, but ``checkpoint_every_min``.

    The loss on ``held_out`` windows is measured every ``validate_every`` steps and at the end. With ``patience`` the
    run stops after so many measurements in a row without a new lowest, and in any case ends with the parameters of the
    lowest.
    """

    steps: int
    log_every: int
    checkpoint_every: int
    checkpoint_every_min: float | None = None
    held_out: Sequence[int] = ()
    validate_every: int = 1
    patience: int | None = None

    def is_at(self, every: int, step: int) -> bool:
        return step % every == 0 or step == self.steps


class Run:
    """Steps taken one after the other, with the loss curve and the checkpoints in ``folder``.

    A run that was killed at any moment goes on from its last checkpoint, and ends, where the device computes the same
    each time (a CPU does), with the same bits and the same loss curve (its seconds apart). A checkpoint has what
    trains, the optimizer's state, and the best parameters so far where there is ``patience``.
    """

    def __init__(
        self, learner: Learner, steps: Steps, schedule: Schedule, folder: Path, identity: Mapping[str, Any]
    ) -> None:
        self._learner, self._steps, self._schedule = learner, steps, schedule
        self._is_first = learner.fabric.global_rank == 0
        folder.mkdir(parents=True, exist_ok=True)
        self._curve = LossCurve(folder / "loss_curve.jsonl")
        self._checkpoints = Checkpoints(folder / "checkpoints", identity)
        self._best: dict[str, Tensor] = {}
        self._progress = self._resumed()
        self._saved = self._progress.step

    def complete(self) -> Progress:
        """Take all steps that are left. Raises NumericalError when a step does; the last checkpoint then stays."""
        schedule, start = self._schedule, time.monotonic()
        seconds_before, first, saved_at, told_at = self._progress.seconds, self._progress.step, start, start
        self._learner.module.train()
        bar = tqdm(total=schedule.steps, initial=first, desc="training", unit="step", disable=not self._is_first)
        with bar:
            while self._progress.step < schedule.steps and not self._progress.stopped:
                self._take_step(seconds_before - start)
                bar.update()
                bar.set_postfix(loss=f"{self._last_loss:.4g}")
                if self._is_first and time.monotonic() - told_at >= TELL_EVERY_SECONDS:
                    log.info("training: step %d of %d, loss %.4g", self._progress.step, schedule.steps, self._last_loss)
                    told_at = time.monotonic()
                if self._checkpoint_is_due(time.monotonic() - saved_at):
                    self._save()
                    saved_at = time.monotonic()
        if self._best:
            self._learner.set_values(self._best)
        if self._progress.step > first:
            log.info(
                "training: %d steps, %d tokens, %.1f s",
                self._progress.step,
                self._progress.tokens,
                self._progress.seconds,
            )
        return self._progress

    def _take_step(self, clock_offset: float) -> None:
        progress, schedule = self._progress, self._schedule
        try:
            means = take_step(self._steps, self._learner, progress.step)
            measured = self._measured_after(progress.step)
        except NumericalError as error:
            kept = f"The checkpoint of step {self._saved} stays" if self._saved else "There is no checkpoint yet"
            raise NumericalError(f"{error}\n{kept} in {self._checkpoints.folder}.") from None
        tokens, norm = means.pop("tokens"), means.pop("gradient_norm")
        self._last_loss = means["loss"]
        step = progress.step + 1
        progress = replace(
            progress, step=step, tokens=progress.tokens + int(tokens), unwritten=(*progress.unwritten, means)
        )
        if measured:
            progress = self._validated(progress, measured["validation_loss"])
        progress = replace(progress, seconds=time.monotonic() + clock_offset, scaler=self._learner.scaler_state)
        if measured or progress.stopped or schedule.is_at(schedule.log_every, step):
            # Infinite where float16 losses were scaled too high, which JSON has no word for.
            self._write(progress, {**measured, "gradient_norm": norm if math.isfinite(norm) else None})
            progress = replace(progress, unwritten=())
        self._progress = progress

    def _measured_after(self, step: int) -> dict[str, float]:
        """The loss on the held-out windows, where it is due."""
        held_out = self._schedule.held_out
        if not held_out or not self._schedule.is_at(self._schedule.validate_every, step + 1):
            return {}
        return {"validation_loss": mean_loss(self._steps, self._learner, held_out, step)}

    def _validated(self, progress: Progress, loss: float) -> Progress:
        """Keep the parameters where the loss is the lowest so far; stop where patience ends."""
        if self._schedule.patience is None:
            return progress
        if progress.best_loss is None or loss < progress.best_loss:
            self._best = self._learner.values()
            return replace(progress, best_loss=loss, since_best=0)
        since_best = progress.since_best + 1
        return replace(progress, since_best=since_best, stopped=since_best >= self._schedule.patience)

    def _write(self, progress: Progress, measured: Mapping[str, float | None]) -> None:
        """A line of the loss curve: means over the steps since the last one."""
        if not self._is_first:
            return
        names = list(progress.unwritten[0])
        means = {name: sum(step[name] for step in progress.unwritten) / len(progress.unwritten) for name in names}
        rates = {group["name"]: group["lr"] for group in self._learner.optimizer.param_groups}
        spent = {"tokens": progress.tokens, "seconds": progress.seconds}
        self._curve.append({"step": progress.step, **means, **measured, "learning_rate": rates, **spent})

    def _checkpoint_is_due(self, seconds: float) -> bool:
        schedule, progress = self._schedule, self._progress
        if progress.stopped or schedule.is_at(schedule.checkpoint_every, progress.step):
            return True
        if schedule.checkpoint_every_min is None:
            return False
        # One clock for all processes.
        return self._learner.fabric.broadcast(seconds >= 60 * schedule.checkpoint_every_min)

    def _save(self) -> None:
        tensors = {f"parameters/{name}": value for name, value in self._learner.values().items()}
        tensors |= {f"optimizer/{name}": value for name, value in self._learner.optimizer_values().items()}
        tensors |= {f"best/{name}": value for name, value in self._best.items()}
        if self._is_first:
            self._checkpoints.save(tensors, self._progress)
        self._saved = self._progress.step
        self._learner.fabric.barrier()

    def _resumed(self) -> Progress:
        """Put everything as the last checkpoint has it, where there is one."""
        found = self._checkpoints.latest() if self._is_first else None
        step = self._learner.fabric.broadcast(found[1].step if found else None)
        if step is not None and not self._is_first:
            found = self._checkpoints.of_step(step)
        tensors, progress = found if found else ({}, Progress())
        if found:
            log.info("training goes on from step %d", progress.step)
            self._learner.set_values(_below("parameters/", tensors))
            self._learner.set_optimizer_values(_below("optimizer/", tensors))
            self._best = _below("best/", tensors)
            self._learner.fabric.strategy.precision.load_state_dict(progress.scaler)
        # No process goes on before all have read the checkpoint, and none reads what the first has begun to write.
        self._learner.fabric.barrier()
        if self._is_first:
            self._curve.take_back(progress.step)
        return progress


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
