"""What a run directory remembers of its W&B run, so that a requeued job or a rerun goes on with the same one."""

import json
import logging
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from moeprune.app.manifest import write_atomically

log = logging.getLogger(__name__)

STATE = "wandb.json"


@dataclass(frozen=True)
class TrackedState:
    """``id`` of the run; how often it was started; the step of its next history row; the last recovery step logged."""

    id: str
    attempts: int = 0
    next_row: int = 0
    recovery_step: int = 0

    @classmethod
    def of(cls, run_dir: Path, environment: Mapping[str, str], in_sweep: bool) -> "TrackedState":
        """The state that the last start left in ``run_dir``, counted as started once more; else a new one.

        The id is random and kept in the directory: a digest of the directory's path would be shared by equal paths on
        two machines, and by two runs one after the other in one place. An id in WANDB_RUN_ID is respected, a W&B
        agent's above all; but not by the many jobs of a sweep, which would all be one run.
        """
        try:
            state = cls(**json.loads((run_dir / STATE).read_text()))
        except (OSError, ValueError, TypeError):
            state = cls(uuid.uuid4().hex[:12])
        given = environment.get("WANDB_RUN_ID")
        if given and not in_sweep and given != state.id:
            state = cls(given)
        return replace(state, attempts=state.attempts + 1)

    def save(self, run_dir: Path) -> None:
        """Raises OSError."""
        write_atomically(run_dir / STATE, json.dumps(asdict(self)))
