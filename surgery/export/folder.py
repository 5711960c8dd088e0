"""Writing a folder or a file as a whole: it stands at its path complete, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import ExportError, describe

MARK = "surgery.json"
"""The file by which a folder is known to be an export, that another export may replace."""
BESIDE = (MARK, "surgery.safetensors", "README.md")
"""What an export has beside the files that it lists."""


@contextmanager
def written(path: str | Path, only: Collection[str] | None = None) -> Iterator[Path]:
    """A new folder beside `path`, which takes its name when the block ends well and goes away when it does not.

    An export that stands at `path` already is replaced; until the last moment it stays as it is. Raises ExportError, before
    the block, where a file or a folder of anything else stands there. only: as in `require_free`.
    """
    path = require_free(path, only)
    with _beside(path) as new:
        new.chmod(0o777 & ~_umask())
        yield new
        require_free(path, only)
        _replace(path, new)


@contextmanager
def written_file(path: str | Path) -> Iterator[Path]:
    """A path for one new file, which takes the name of `path` when the block ends well and goes away when it does not.

    It has the name already, in a folder of its own: some formats keep the name inside. A file at `path` is replaced
    after the block, and stays as it is until then. Raises ExportError, before the block, where a folder stands there.
    """
    path = Path(path).resolve()
    if path.is_dir():
        raise ExportError(describe(f"{str(path)!r}", "a folder", "no file or an earlier one", "Choose another path."))
    with _beside(path) as folder:
        new = folder / path.name
        yield new
        new.replace(path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A new folder in the folder of `path`, so on the same disk; what is still in it after the block goes away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def require_free(path: str | Path, only: Collection[str] | None = None) -> Path:
    """The path, links followed, if a folder can be written there. Raises ExportError for one that is taken.

    only: an earlier export is replaced if it has no other files than these; None: than those that it lists.
    """
    path = Path(path).resolve()
    if not path.exists():
        return path
    names = {file.name for file in path.iterdir()} if path.is_dir() else set()
    known = {*_recorded(path / MARK), *BESIDE} if only is None else set(only)
    if not path.is_dir() or (names and MARK not in names):
        kind = "a folder of other files" if path.is_dir() else "a file"
        expected = "no folder, an empty one or an earlier export"
        raise ExportError(describe(f"{str(path)!r}", kind, expected, "Choose another path."))
    if more := sorted(names - known):
        found = f"an export with more in it: {', '.join(more[:5])}"
        do = "Choose another path, or move these away."
        raise ExportError(describe(f"{str(path)!r}", found, "no other files than an export's own, which are replaced", do))
    return path


def _recorded(path: Path) -> list[str]:
    """The names of files and folders that an export says that it has."""
    try:
        return [name.partition("/")[0] for name in json.loads(path.read_text(encoding="utf-8"))["files"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


def _replace(path: Path, new: Path) -> None:
    old = new.with_suffix(".old")
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    """The process's mask of permissions, which a temporary folder ignores."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
