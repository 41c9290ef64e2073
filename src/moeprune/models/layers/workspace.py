"""Where a walk over the layers keeps hidden states, and how far it has come."""

import hashlib
import math
import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from moeprune.errors import InputError
from moeprune.models.layers.stored import stored_tensors

IDENTITY = "walk.txt"
_FINISHED = "layers-"
_HIDDEN = "hidden_BSH"


@dataclass(frozen=True)
class Workspace:
    """A folder for one walk over the layers of one model; without a folder everything is in memory, none resumed.

    ``folder/layers-N`` says that N layers are finished and holds the hidden states that enter the next one, a
    safetensors file per batch. It is written under another name and renamed when it is complete, so that a killed
    process goes on at the first unfinished layer. ``activations_gib`` is how much of the hidden states is kept in
    memory besides, in GiB (2^30 bytes).

    Raises InputError for a limit without a folder.
    """

    folder: Path | None = None
    activations_gib: float = math.inf

    def __post_init__(self) -> None:
        if not self.activations_gib >= 0:
            raise InputError(f"activations_gib={self.activations_gib} is not possible.", change="Use a number like 4.")
        if self.folder is None and self.activations_gib != math.inf:
            raise InputError(
                "Hidden states beyond a limit go to files, and there is no folder for them.", change="Give a folder."
            )

    @property
    def depth(self) -> int:
        """Number of finished layers."""
        if self.folder is None or not self.folder.exists():
            return 0
        names = [entry.name.removeprefix(_FINISHED) for entry in self.folder.glob(f"{_FINISHED}*")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    def begin(self, described: Iterable[object]) -> None:
        """Note whose walk this is, by what describes it.

        Raises InputError when the folder holds the state of another walk.
        """
        if self.folder is None:
            return
        digest = hashlib.sha256()
        for part in described:
            digest.update(part if isinstance(part, bytes) else repr(part).encode())
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / IDENTITY
        if not file.exists():
            partial = file.with_suffix(".partial")  # a full disk would leave an empty file, which fits no walk
            partial.write_text(digest.hexdigest())
            partial.rename(file)
        elif file.read_text() != digest.hexdigest():
            raise InputError(
                f"{self.folder} holds the state of a walk over another model, other batches, or for another purpose.",
                change="Use an empty folder.",
            )

    def finish(self, depth: int) -> None:
        """Note that ``depth`` layers are finished, with the hidden states put into `unfinished` before."""
        if self.folder is None:
            return
        unfinished = self.unfinished(depth)
        unfinished.mkdir(exist_ok=True)
        unfinished.rename(self.finished(depth))
        shutil.rmtree(self.finished(depth - 1), ignore_errors=True)

    def finished(self, depth: int) -> Path:
        """The folder of the hidden states that leave ``depth`` finished layers."""
        assert self.folder is not None
        return self.folder / f"{_FINISHED}{depth}"

    def unfinished(self, depth: int) -> Path:
        """The same folder before all of them are there."""
        return self.finished(depth).with_suffix(".partial")


IN_MEMORY = Workspace()


class HiddenStates:
    """The hidden states of all batches between two layers; several threads may read and write."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._depth = workspace.depth
        self._entering: dict[int, Tensor] = {}
        self._leaving: dict[int, Tensor] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def read(self, batch: int) -> Tensor:
        """What enters the layer, on the CPU. Raises KeyError where nothing is kept: before the first layer."""
        with self._lock:
            held = self._entering.get(batch)
        if held is not None:
            return held
        if self._depth == 0 or self._workspace.folder is None:
            raise KeyError(batch)
        return stored_tensors(self._workspace.finished(self._depth) / f"{batch}.safetensors")[_HIDDEN].read()

    def write(self, batch: int, hidden_BSH: Tensor) -> None:
        """Keep what leaves the layer; what entered it is forgotten, unless a file holds it."""
        hidden_BSH = hidden_BSH.detach().cpu()
        if self._workspace.folder is not None:
            folder = self._workspace.unfinished(self._depth + 1)
            folder.mkdir(exist_ok=True)  # without parents: should another process have taken them, better fail now
            save_file({_HIDDEN: hidden_BSH.contiguous()}, folder / f"{batch}.safetensors")
        with self._lock:
            entered = self._entering.pop(batch, None)
            self._bytes -= 0 if entered is None else entered.nbytes
            if self._bytes + hidden_BSH.nbytes <= self._workspace.activations_gib * 2**30:
                self._leaving[batch] = hidden_BSH
                self._bytes += hidden_BSH.nbytes

    def finish_layer(self) -> None:
        """What left the layer now enters the next one."""
        self._depth += 1
        self._workspace.finish(self._depth)
        self._entering, self._leaving = self._leaving, {}
