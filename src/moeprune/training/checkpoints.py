"""Checkpoints of a training run: the last two, each complete or not there at all."""

import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moeprune.errors import InputError

log = logging.getLogger(__name__)

KEPT = 2
SEEN_WITHIN_S = 60.0  # by another host
DAMAGE = (SafetensorError, OSError, KeyError, TypeError, ValueError)


@dataclass(frozen=True)
class Progress:
    """How far a run is, after ``step`` optimizer steps."""

    step: int = 0
    tokens: int = 0  # that gave a loss
    seconds: float = 0.0  # of training, in all processes that worked on the run, one after the other
    unwritten: tuple[dict[str, float], ...] = ()  # the steps since the last line of the loss curve
    best_loss: float | None = None  # on the held-out windows
    since_best: int = 0  # validations
    stopped: bool = False  # early
    scaler: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """``step_N.safetensors`` in a folder: named tensors, and the progress as JSON in the header.

    ``identity`` is what defines the run: plain values that must be the same whenever it goes on.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self._identity = folder, json.loads(json.dumps(identity))

    def save(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """Write a checkpoint under another name first; of the earlier ones, the newest stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / "unfinished.safetensors"
        header = {"progress": json.dumps(asdict(progress)), "identity": json.dumps(self._identity)}
        save_file(dict(tensors), partial, metadata=header)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(self._path(progress.step))
        # Later ones are damaged: a run goes on from the last one that is not.
        steps = {path: int(path.stem.removeprefix("step_")) for path in self._paths()}
        earlier = [path for path, step in steps.items() if step <= progress.step]
        for path in steps:
            if path not in earlier[-KEPT:]:
                path.unlink()

    def latest(self) -> tuple[dict[str, Tensor], Progress] | None:
        """The last complete checkpoint; one that is damaged is left out with a warning.

        Raises InputError when it belongs to a run with other settings.
        """
        for path in reversed(self._paths()):
            try:
                return self._read(path)
            except DAMAGE as error:
                log.warning("checkpoint %s is damaged (%s); the one before it is used", path, error)
        return None

    def of_step(self, step: int) -> tuple[dict[str, Tensor], Progress]:
        """The checkpoint that another process has found, perhaps on another host.

        Raises InputError when it cannot be read here, or belongs to a run with other settings.
        """
        path, deadline = self._path(step), time.monotonic() + SEEN_WITHIN_S
        # A shared file system may remember for a while what was in a folder.
        while path not in self._paths() and time.monotonic() < deadline:
            time.sleep(0.5)
        try:
            return self._read(path)
        except DAMAGE as error:
            raise InputError(
                f"{socket.gethostname()} cannot read the checkpoint {path} of another process ({error}).",
                change="Use a cache_dir on a file system that all nodes of the job share.",
            ) from None

    def _read(self, path: Path) -> tuple[dict[str, Tensor], Progress]:
        with safe_open(path, framework="pt") as stored:
            header, tensors = stored.metadata(), {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        identity, progress = json.loads(header["identity"]), json.loads(header["progress"])
        self._require_same(identity)
        return tensors, Progress(**{**progress, "unwritten": tuple(progress["unwritten"])})

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.safetensors"

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step_*.safetensors"))

    def _require_same(self, stored: Mapping[str, Any]) -> None:
        names = [name for name in {**stored, **self._identity} if stored.get(name) != self._identity.get(name)]
        if names:
            changes = "; ".join(f"{name}: {stored.get(name)} there, {self._identity.get(name)} now" for name in names)
            raise InputError(
                f"{self.folder} has checkpoints of another training run ({changes}).",
                change="Use the settings of that run, another folder, or delete this one.",
            )
