"""What a scorer may ask for beyond the statistics of routed tokens: a calibration pass of its own."""

from pathlib import Path
from typing import Any, ClassVar, Protocol

from moeprune.calibration.windows import TokenWindows
from moeprune.models.layers.streaming import Model
from moeprune.models.layers.workspace import Workspace


class PassResult(Protocol):
    """What a pass found: a frozen dataclass of tensors."""

    def save(self, path: Path) -> None: ...


class CalibrationPass(Protocol):
    """A costlier look at the model on the calibration windows; run once, cached, and only when a scorer asks for it.

    A frozen dataclass: its fields are part of the cache key. ``stage`` names it in the cache and in reports; raise
    ``version`` when its result changes for the same settings. A scorer asks by ``passes: tuple[CalibrationPass, ...]``
    (class variable or property) and is called with ``scorer(statistics, *results)``, in that order. A pass that says
    ``needs_whole_model`` (default False) cannot go through a model layer by layer.
    """

    stage: ClassVar[str]
    version: ClassVar[int]

    def __call__(self, model: Model, windows: TokenWindows, batch_size: int, workspace: Workspace) -> PassResult:
        """The model is left as it was. Sums in float64; padding does not count.

        ``workspace``, for `walk_layers`, is new: hidden states that do not fit into memory go there.
        """
        ...

    def load(self, path: Path) -> Any:
        """What `PassResult.save` wrote."""
        ...
