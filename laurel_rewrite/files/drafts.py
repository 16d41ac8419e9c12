"""Output folders: results are made aside and appear when all is done, or not at all.

    draft     `.laurel-xxxxxxxx`, locked by its process: one whose process has died is removed by the next run
    ready     the finished draft under its second name, which decides: whoever comes next puts its files in their places
    places    each file by a rename, then what the earlier result had and this one has not is removed, the manifest last

So a process may die anywhere: before the second name everything is as it was, after it everything will be as it should be. Locks are those
of the system on the folders themselves, which end with their process and leave no file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from laurel_rewrite.errors import ConfigError
from laurel_rewrite.files.checked import INNER_NAME, list_of, read_json
from laurel_rewrite.files.manifest import KINDS, MANIFEST, Manifest, digest

READY = ".laurel-ready"
_STALE = ".laurel-stale"
_SCRATCH = re.compile(r"(\.laurel-[a-z0-9_]{8})(-.*)?")
_PATIENCE = 60.0  # seconds that a run waits for another one, which only moves files meanwhile
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class replacing:
    """A folder of results that is filled aside, and then put in its place as a whole.

    Args:
        folder: is created.
        kind: what writes it, of `manifest.KINDS`; it gets a manifest. "files" are single files that somebody named, which get none.
        force: replace files that are not our own earlier results, too.
        keep: files that are never replaced nor removed: what the run reads.

    Raises:
        ConfigError: the folder cannot be written, or holds files that must not be replaced, which are named; nothing has changed then.
    """

    def __init__(self, folder: Path, kind: str = "files", *, force: bool = False, keep: Iterable[Path] = ()) -> None:
        self.folder = Path(os.path.abspath(folder))  # the model's code may change the working directory
        self.shown, self.kind, self.force = folder, kind, force
        self.keep = {path.resolve() for path in keep}

    def __enter__(self) -> Path:
        with _errors_named(self.shown):
            self.created = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder):
                _settle(self.folder)
                _remove_dead(self.folder)
                self.draft = Path(tempfile.mkdtemp(prefix=".laurel-", dir=self.folder))
                self.lock = _lock(self.draft)
        return self.draft

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            if kind is None:
                with _errors_named(self.shown):
                    self._place()
        finally:
            _unlock(self.lock)
            shutil.rmtree(self.draft, ignore_errors=True)  # it is there no more under this name once it was ready
            for path in self.created:
                with contextlib.suppress(OSError):  # not empty
                    path.rmdir()
        if isinstance(error, OSError) and error.errno in _FULL:
            raise ConfigError(f"The results could not be written to {self.shown}: {error.strerror}. The folder is as it was.") from error

    def _place(self) -> None:
        new = Manifest.of(self.draft, self.kind) if self.kind != "files" else Manifest("files", dict.fromkeys(_names(self.draft), "0" * 64))
        new.write(self.draft)
        mode = (self.draft / MANIFEST).stat().st_mode & 0o777
        for name in new.files:
            (self.draft / name).chmod(mode)  # some writers make files that nobody else may read
        with _locked(self.folder):
            _settle(self.folder)
            stale = _checked_places(self.folder, new, self.draft, self.shown, force=self.force, keep=self.keep)
            (self.draft / _STALE).write_text(json.dumps(stale))
            self.draft.rename(self.folder / READY)
            _settle(self.folder)


def check_out(out: Path, kind: str, names: Iterable[str], *, force: bool = False) -> None:
    """Say at once that the results could not be written, not after minutes.

    Args:
        out: the folder for the results.
        kind, force: see `replacing`.
        names: the files that the run will write, as far as they are known.

    Raises:
        ConfigError: the folder cannot be written, or holds files that must not be replaced.
    """
    with _errors_named(out):
        if out.exists() and not out.is_dir():
            raise ConfigError(f"The output folder {out} is a file. Choose another with --out.")
    with replacing(out):  # leaves nothing, and sees that it may
        if not force:
            _refuse_foreign(Path(out), Manifest(kind, dict.fromkeys(names, "")), out, keep=set())


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """A folder of results that nobody writes meanwhile, and whose writer, if it died at the last moment, has been finished for."""
    if (folder / READY).is_dir():
        try:
            with _locked(folder):
                _settle(folder)
        except OSError as error:
            raise ConfigError(f"{folder} is half-written, for its writer died, and cannot be finished: {error.strerror}.") from error
    with _locked(folder, fcntl.LOCK_SH) if folder.is_dir() else contextlib.nullcontext():
        yield


# Placing


def _checked_places(folder: Path, new: Manifest, draft: Path, shown: Path, *, force: bool, keep: set[Path]) -> list[str]:
    """The files of the earlier result that the new one has not. ConfigError unless every file can be placed."""
    for name in [*new.files, MANIFEST]:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            raise ConfigError(f"{shown / name} is a directory, and the results have a file of this name. Move it, or choose another --out.")
        if not path.parent.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{shown / name} leads out of the folder through a link. Remove the link, or choose another --out.")
        above = next((p for p in path.parents if p.exists()), folder)
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise ConfigError(f"{shown / name} cannot be written: {above.name} is {'no directory' if above.is_file() else 'read-only'}.")
        if path.resolve() in keep and not _same(path, draft / name):
            raise ConfigError(f"The results would replace {shown / name}, which is read. Choose another folder with --out.")
    if new.kind == "files":
        return []
    if not force:
        _refuse_foreign(folder, new, shown, keep=keep, draft=draft)
    old = _earlier(folder, force=force)
    gone = [] if old is None else [name for name in old.files if name not in new.files]
    return [name for name in gone if (folder / name).resolve() not in keep]


def _refuse_foreign(folder: Path, new: Manifest, shown: Path, *, keep: set[Path], draft: Path | None = None) -> None:
    """ConfigError where the folder holds something to be replaced or removed that is not our own earlier result, unchanged."""
    old = _earlier(folder, force=False)
    known = old or Manifest("files", {})
    touched = dict.fromkeys([*new.files, *known.files])
    foreign = [name for name in known.changed(folder, touched) if (folder / name).resolve() not in keep]
    if draft is not None:
        foreign = [name for name in foreign if not _same(folder / name, draft / name)]
    if KINDS.index(known.kind) > KINDS.index(new.kind):
        foreign = foreign or [MANIFEST]
        why = "was saved there, and may have been trained" if known.kind == "save" else "is the result of a rewrite"
        raise ConfigError(f"{shown} holds a model that {why}. Choose another folder with --out, or replace it with --force (force=True).")
    if foreign:
        names = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise ConfigError(
            f"{shown} holds files that are not an earlier result, unchanged: {names}. "
            "Choose another folder with --out, or replace them with --force (force=True)."
        )


def _earlier(folder: Path, *, force: bool) -> Manifest | None:
    try:
        return Manifest.read(folder)
    except ConfigError as error:
        if force:
            return None
        raise ConfigError(f"{error} Choose another folder with --out, or replace it with --force (force=True).") from error


def _settle(folder: Path) -> None:
    """Put the files of a finished draft in their places; again and again it comes to the same."""
    ready = folder / READY
    if not ready.is_dir() or ready.is_symlink():
        return
    new = Manifest.read(ready)
    if new is None:  # its manifest is moved last: only the scratch is left
        shutil.rmtree(ready, ignore_errors=True)
        return
    stale = read_json(ready / _STALE, "The list")
    if not list_of(INNER_NAME).test(stale):
        raise ConfigError(f"{ready / _STALE} is damaged. Remove {ready}.")
    for name in new.files:
        target, source = folder / name, ready / name
        if source.exists() or source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
    for name in stale:
        _remove(folder, name)
    if new.kind != "files":
        os.replace(ready / MANIFEST, folder / MANIFEST)
    shutil.rmtree(ready, ignore_errors=True)


def _remove(folder: Path, name: str) -> None:
    path = folder / name
    if not path.parent.resolve().is_relative_to(folder.resolve()) or path.is_dir():
        return
    path.unlink(missing_ok=True)
    for above in path.relative_to(folder).parents[:-1]:
        with contextlib.suppress(OSError):  # not empty
            (folder / above).rmdir()


def _names(draft: Path) -> list[str]:
    return sorted(str(file.relative_to(draft)) for file in draft.rglob("*") if file.is_file() and file.name != MANIFEST)


def _same(path: Path, other: Path) -> bool:
    return path.is_file() and not path.is_symlink() and other.is_file() and digest(path) == digest(other)


def _remove_dead(folder: Path) -> None:
    """Remove the drafts, and the files beside them that begin with a draft's name, of processes that live no more."""
    alive: dict[str, bool] = {}
    for path in [Path(entry.path) for entry in os.scandir(folder) if _SCRATCH.fullmatch(entry.name)]:
        found = _SCRATCH.fullmatch(path.name)
        assert found is not None
        draft = folder / found[1]
        if draft.name not in alive:
            alive[draft.name] = _is_locked(draft)
        if alive[draft.name]:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


# Locks


def _lock(folder: Path, how: int = fcntl.LOCK_EX, *, wait: float = _PATIENCE) -> int | None:
    """A lock of a folder, held until it is released or the process ends; None where the file system has none.

    Raises:
        BlockingIOError: another process has held it for so many seconds.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # it may be written and not listed
        return None
    end = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= end:
                os.close(handle)
                raise BlockingIOError(errno.EWOULDBLOCK, "another process is writing there") from error
            time.sleep(0.02)
        except OSError:
            os.close(handle)
            return None
        else:
            return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


@contextlib.contextmanager
def _locked(folder: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    # A draft is its owner's, who holds its lock already and may place files in it.
    handle = _lock(folder, how) if not _SCRATCH.fullmatch(folder.name) else None
    try:
        yield
    finally:
        _unlock(handle)


def _is_locked(draft: Path) -> bool:
    """Whether somebody works on a draft; where locks do not exist, somebody may."""
    if not draft.is_dir():
        return False
    try:
        handle = _lock(draft, wait=0)
    except OSError:
        return True
    _unlock(handle)
    return handle is None


@contextlib.contextmanager
def _errors_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"The output folder {folder} cannot be written: {why}. Choose another with --out.") from error
