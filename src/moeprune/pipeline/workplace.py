"""Where a stage is computed until it is complete, so that whoever else tries the same can never mix with it.

    CACHE/statistics/.partial-3f2a...-TOKEN/owner.json    whose it is
    CACHE/statistics/.partial-3f2a...-TOKEN/content/      what becomes CACHE/statistics/3f2a...
    CACHE/statistics/.fenced-3f2a...-TOKEN/               what its owner lost or left, for the next one to go on from

Every computation has a token and so a folder of its own. Who takes over from a process that may only sleep renames
that one's folder first: when the sleeper wakes, nothing lies where it writes, and what it may write there again lacks
``owner.json``, which it looks for before it publishes. Publishing is one rename of ``content``. So of two processes
that believe the stage theirs, in whatever order they stop and go on, each result that appears is all of one of them.
"""

import errno
import logging
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from moeprune.pipeline.disk import last_written
from moeprune.pipeline.lease import Owner, holder, lease_folder, take

log = logging.getLogger(__name__)

PARTIAL, FENCED, DAMAGED, REMOVED = ".partial-", ".fenced-", ".damaged-", ".removed-"
_OWNER = "owner.json"
_LEFT = "left.json"  # the same, of an owner that has finished with the folder
_CONTENT = "content"


class TakenOverError(Exception):
    """Another process took this one for dead and computes the stage in its place."""


class Workplace:
    """A folder for one computation of the stage that is to be in ``final``."""

    def __init__(self, final: Path, owner: Owner) -> None:
        self._final = final
        self._owner = owner
        self._folder = final.with_name(f"{PARTIAL}{final.name}-{owner.token}")
        self.content = self._folder / _CONTENT

    def open(self) -> None:
        """Make the folder, empty."""
        try:
            self.content.mkdir(parents=True)
            (self._folder / _OWNER).write_text(self._owner.as_json())
        except OSError:
            self.discard()
            raise

    def fence_others(self) -> None:
        """From here on nobody who began this stage before can publish it."""
        for partial in self._others(PARTIAL):
            # Without a word on its owner it is what a fenced process wrote after it woke.
            if (partial / _OWNER).exists():
                with suppress(OSError):  # another process was faster
                    partial.rename(partial.with_name(partial.name.replace(PARTIAL, FENCED, 1)))
            else:
                shutil.rmtree(partial, ignore_errors=True)

    def clear_others(self, go_on: bool) -> None:
        """Remove what others have left, after it was fenced. If asked to ``go_on``, keep here what was written last."""
        left = sorted(self._others(FENCED), key=lambda folder: last_written(folder / _CONTENT))
        if left and go_on:
            with suppress(FileNotFoundError):  # another process was faster
                self._adopt(left[-1])
        for folder in [*left, *self._others(DAMAGED), *self._others(REMOVED)]:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self) -> None:
        """Give the content its final name. Raises TakenOverError when another process has the stage now."""
        if self.is_lost():
            raise TakenOverError
        try:
            self.content.rename(self._final)
        except FileNotFoundError as error:
            raise TakenOverError from error
        except OSError as error:
            # Who had the stage before us finished it after all; that result is as good as ours.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        self.discard()

    def is_lost(self) -> bool:
        """Whether another process has fenced the folder."""
        with suppress(OSError):
            os.listdir(self._final.parent)  # a file server's client asks anew
        return not (self._folder / _OWNER).exists()

    def leave(self, to_go_on: bool) -> None:
        """Leave the content to whoever wants the stage next and can go on from it; else remove the folder."""
        if os.getpid() != self._owner.process.pid:
            return
        if not to_go_on or self.is_lost() or not any(self.content.iterdir()):
            self.discard()
            return
        fenced = self._folder.with_name(self._folder.name.replace(PARTIAL, FENCED, 1))
        with suppress(OSError):  # then it stays under its name, which serves as well
            self._folder.rename(fenced)
            (fenced / _OWNER).rename(fenced / _LEFT)

    def discard(self) -> None:
        """Remove the folder; a process that was forked from its owner does nothing."""
        if os.getpid() == self._owner.process.pid:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _others(self, kind: str) -> list[Path]:
        start = f"{kind}{self._final.name}-"
        names = [name for name in os.listdir(self._final.parent) if name.startswith(start)]
        return [self._final.with_name(name) for name in names if name != self._folder.name]

    def _adopt(self, fenced: Path) -> None:
        """Move what ``fenced`` holds here; copy it where its owner may still have files of it open for writing."""
        try:
            left = (fenced / _LEFT).exists()
            owner = Owner.read((fenced / (_LEFT if left else _OWNER)).read_bytes())
        except FileNotFoundError:
            return
        if left or (owner is not None and owner.process.gone):
            (fenced / _CONTENT).rename(self.content)
        else:
            copy = self._folder / "copy"
            shutil.copytree(fenced / _CONTENT, copy)
            copy.rename(self.content)
        log.info("going on from what %s left", owner)


def set_aside(final: Path) -> Path:
    """Take a finished stage's name from it, in one step; the next computation of the stage removes it for good."""
    aside = final.with_name(f"{DAMAGED}{final.name}-{uuid.uuid4().hex[:8]}")
    final.rename(aside)
    return aside


def clear_away(final: Path) -> None:
    """Remove what a process left that was killed just before or after it had published ``final``."""
    leases, owner = lease_folder(final), Owner.here()
    with suppress(OSError):  # a read-only cache stays as it is
        held = holder(leases)
        if held is not None and not (held.owner is not None and held.owner.process.gone):
            return
        lease = take(leases, owner, over=held)
        if lease is not None:
            work = Workplace(final, owner)
            work.fence_others()
            work.clear_others(go_on=False)
            lease.give_back()
