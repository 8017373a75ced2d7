"""Publishing: a version of an index becomes visible whole or not at all.

A version is written under a name no reader looks at (`versions/.building-*`), every file and directory is fsynced, it
is renamed to `versions/<name>`, and last the link `CURRENT` is replaced by rename, which POSIX makes atomic. A builder
killed at any point leaves the old CURRENT and the old files; what it left behind is removed by the next one. Links
`manifest.json`, `catalog.parquet`, ... beside CURRENT let plain tools read the current version.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from astroclip.errors import InputError
from index.manifest import MANIFEST

__all__ = ["KEEP", "alone", "publish", "publish_plain", "staging"]

KEEP = 2  # versions kept: the current one and the one before, which a running server may still be opening
_BUILDING = ".building-"


@contextmanager
def alone(folder: Path, busy: str, code: str) -> Iterator[None]:
    """One process at a time in `folder`, which exists. Raises InputError (`busy`, `code`) where another is at work."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{busy}; wanted one at a time; wait for it", code=code) from None
        yield


@contextmanager
def staging(root: Path) -> Iterator[Path]:
    """An empty directory to write a version in; one builder at a time a root, leftovers of dead ones removed.

    Removed on leaving unless it was published. Raises InputError if another builder is at work.
    """
    versions = root / "versions"
    versions.mkdir(parents=True, exist_ok=True)
    with alone(root, f"another process is building {root}", "index_busy"):
        for leftover in versions.glob(f"{_BUILDING}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        folder = versions / f"{_BUILDING}{os.getpid()}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def publish(root: Path, folder: Path, name: str, keep: int = KEEP) -> Path:
    """Make the staged `folder` the current version under `name`; older than the newest `keep` are removed."""
    _sync_tree(folder)
    final, before = root / "versions" / name, (root / "CURRENT").resolve()
    if final.exists():  # renamed by a builder that died before it could swap CURRENT
        shutil.rmtree(final)
    os.rename(folder, final)
    _sync(final.parent)
    _link(root / "CURRENT", Path("versions") / name)
    for entry in sorted(final.iterdir()):
        _link(root / entry.name, Path("CURRENT") / entry.name)
    for link in root.iterdir():
        if link.is_symlink() and not link.exists():
            link.unlink()  # a file that the new version does not have
    _sync(root)
    old = [path for path in final.parent.iterdir() if path.is_dir() and path != final]
    # The newest are kept, and before all the one that was current: a builder that died may have left a newer one that
    # never was, and a server may still be opening the one that was.
    old.sort(key=lambda path: (path.resolve() == before, path.name))
    for path in old[: max(0, len(old) - (keep - 1))]:
        shutil.rmtree(path, ignore_errors=True)
    return final


def publish_plain(out: Path, folder: Path) -> Path:
    """Move the staged `folder` to `out` as a plain index directory (to ship or copy), replacing an index there."""
    _sync_tree(folder)
    aside = out.with_name(f".{out.name}.old-{os.getpid()}")
    if out.exists():
        if any(out.iterdir()) and not (out / MANIFEST).is_file():
            raise InputError(f"{out} exists and is no index; wanted a new or an index directory", code="not_an_index")
        os.rename(out, aside)
    os.rename(folder, out)
    _sync(out.parent)
    shutil.rmtree(aside, ignore_errors=True)
    return out


def _link(path: Path, target: Path) -> None:
    """Point a symbolic link at `target`, replacing what was there in one step."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    os.symlink(target, fresh)
    os.replace(fresh, path)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
