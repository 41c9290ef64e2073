"""What a run tells, while it walks the road, to whoever listens: the manifest, a tracker, a test."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from moeprune.pipeline.cache import Artifact


class Progress(Protocol):
    """Is told where a run stands. Called by the thread that walks the road; must return at once."""

    def waiting(self, stage: str, key: str, owner: str) -> None:
        """Another run, ``owner`` in words, computes the stage; this one waits for it."""

    def computing(self, stage: str, key: str, folder: Path) -> None:
        """The stage is computed now, into ``folder``, where it may leave what can be followed (a loss curve)."""

    def finished(self, artifact: "Artifact") -> None:
        """A stage has its result, computed or found."""

    def evaluated(self, variant: str, metrics: Mapping[str, Any]) -> None:
        """A variant of the model (``dense``, ``pruned``, ``pruned+nf4``) has its metrics."""


class Silent:
    """Tells nobody."""

    def waiting(self, stage: str, key: str, owner: str) -> None: ...

    def computing(self, stage: str, key: str, folder: Path) -> None: ...

    def finished(self, artifact: "Artifact") -> None: ...

    def evaluated(self, variant: str, metrics: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Broadcast:
    """Tells all ``listeners``, in order."""

    listeners: Sequence[Progress]

    def waiting(self, stage: str, key: str, owner: str) -> None:
        for listener in self.listeners:
            listener.waiting(stage, key, owner)

    def computing(self, stage: str, key: str, folder: Path) -> None:
        for listener in self.listeners:
            listener.computing(stage, key, folder)

    def finished(self, artifact: "Artifact") -> None:
        for listener in self.listeners:
            listener.finished(artifact)

    def evaluated(self, variant: str, metrics: Mapping[str, Any]) -> None:
        for listener in self.listeners:
            listener.evaluated(variant, metrics)
