"""The code of a sweep's jobs: a copy of what was there when they were submitted, and a check that it is what runs.

A snapshot is a folder of the sweep's, named by its content: ``moeprune`` with ``conf`` in it, and our Hydra plug-ins.
It comes first on the jobs' ``PYTHONPATH``. The embedded models and texts are linked, not copied: their content is
checked as the code's is, and so is that of own plug-ins outside the package.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import site
import sys
import sysconfig
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

import moeprune
from moeprune.app.git import COPIED_FROM, git_state
from moeprune.app.main import config_folder
from moeprune.errors import InputError

PACKAGE = "moeprune"
LINKED = "resources"


@dataclass(frozen=True)
class Code:
    """What a job must run: files below ``snapshot`` and own plug-ins' files, each with a digest of its content."""

    snapshot: Path
    files: Mapping[str, str]
    plug_ins: Mapping[Path, str]

    def check(self) -> None:
        """Raise InputError naming the difference where this process runs other code, or the files have changed."""
        running, submitted = Path(moeprune.__file__).parent, self.snapshot / PACKAGE
        if running.resolve() != submitted.resolve():
            raise InputError(
                f"This job runs the code in {running}, but what was submitted is in {submitted}.",
                change="Let no setup line put another moeprune before the jobs' PYTHONPATH, and submit again.",
            )
        expected = {self.snapshot / name: digest for name, digest in self.files.items()} | dict(self.plug_ins)
        changed = [str(path) for path, digest in expected.items() if _digest(path) != digest]
        if changed:
            raise InputError(
                f"Changed since this job was submitted: {', '.join(changed[:5])}{' ...' if len(changed) > 5 else ''}.",
                change="Restore it, or submit again what should run now: moeprune-rerun runs the jobs left over.",
            )


def take_snapshot(sweep_dir: Path) -> tuple[Path, dict[str, str]]:
    """Copy the running code into ``sweep_dir``, once per content: the folder, and its files with their digests."""
    sources = dict(_sources())
    files = {name: _read_digest(path) for name, path in sources.items()}
    content = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
    snapshot = (sweep_dir / f"snapshot-{content[:8]}").absolute()
    if snapshot.exists() and any(_digest(snapshot / name) != digest for name, digest in files.items()):
        # Edited, or cleared away from a scratch disk. Jobs that wait for it say so; a rerun must not be stuck with it.
        snapshot = snapshot.with_name(f"{snapshot.name}-{uuid.uuid4().hex[:8]}")
    if not snapshot.exists():
        partial = snapshot.with_name(f".{snapshot.name}.{uuid.uuid4().hex[:8]}")
        for name, source in sources.items():
            if name.split("/")[:2] != [PACKAGE, LINKED]:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, partial / name)
        note = {"folder": str(Path(moeprune.__file__).parent), "git": git_state()}
        (partial / COPIED_FROM).write_text(json.dumps(note, indent=1))
        (partial / PACKAGE / LINKED).symlink_to((Path(moeprune.__file__).parent / LINKED).resolve())
        partial.rename(snapshot)
    return snapshot, files


def own_plug_ins(config: DictConfig) -> dict[Path, str]:
    """The files of the plug-ins that a config names outside this package, with their digests.

    A module counts with all of its package; what pip installed counts as not the user's own.
    """
    modules = {target.split(".")[0] for key, node in config.items() if key != "hydra" for target in _targets(node)}
    found = (_own_files(module) for module in sorted(modules - {PACKAGE}))
    return {path: _read_digest(path) for files in found for path in files}


def python_path(snapshot: Path) -> str:
    """A job's ``PYTHONPATH``: the snapshot, then where this process finds modules that are not installed."""
    package_root = Path(moeprune.__file__).parents[1]
    entries = [Path(entry).absolute() for entry in sys.path]  # an empty entry is the current directory
    own = [path for path in entries if path.is_dir() and path != package_root and not _is_installed(path)]
    return os.pathsep.join(map(str, dict.fromkeys([snapshot, *own])))


def _sources() -> Iterator[tuple[str, Path]]:
    """Every file of a snapshot: its name there, and where it lies now."""
    spec = importlib.util.find_spec(f"hydra_plugins.{PACKAGE}")
    assert spec is not None and spec.origin is not None
    folders = {
        PACKAGE: Path(moeprune.__file__).parent,
        f"{PACKAGE}/conf": config_folder(),
        f"hydra_plugins/{PACKAGE}": Path(spec.origin).parent,
    }
    for name, folder in folders.items():
        for path in sorted(_walk(folder)):
            yield f"{name}/{path.relative_to(folder).as_posix()}", path


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        yield from (Path(place) / name for name in names if not name.endswith(".pyc"))


def _targets(node: object) -> Iterator[str]:
    waiting = [OmegaConf.to_container(node)] if isinstance(node, (DictConfig, ListConfig)) else []
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            target = item.get("_target_")
            if isinstance(target, str):
                yield target
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def _own_files(module: str) -> list[Path]:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None:  # the job says that it cannot be imported
        return []
    if spec.submodule_search_locations:
        files = [
            path for place in spec.submodule_search_locations for path in _walk(Path(place)) if path.suffix == ".py"
        ]
    else:
        files = [Path(spec.origin)] if spec.has_location and spec.origin else []
    return [path.absolute() for path in files if not _is_installed(path)]


def _is_installed(path: Path) -> bool:
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")]
    return any(path.is_relative_to(place) for place in (*places, site.getusersitepackages()))


def _read_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(path: Path) -> str | None:
    try:
        return _read_digest(path)
    except OSError:
        return None
