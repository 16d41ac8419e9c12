"""`laurel_manifest.json`: which files make up a folder of results, with their digests, and what wrote them.

It is written last. So a folder whose files have these digests is whole, and a file with another digest is not ours any more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from laurel_rewrite.errors import ConfigError
from laurel_rewrite.files.checked import INNER_NAME, checked, mapping, one_of, read_json, text

MANIFEST = "laurel_manifest.json"
KINDS = ("files", "profile", "compare", "rewrite", "save")
"""What writes a folder, from what is made again most easily to a model that was trained: a later kind may take the place of an earlier
one, not the other way round."""
_FORMAT = 1
_TABLE = {
    "format": one_of(_FORMAT),
    "kind": one_of(*KINDS),
    "files": mapping(INNER_NAME, text(r"[0-9a-f]{64}", "a SHA-256 in hexadecimal")),
}


@dataclass(frozen=True)
class Manifest:
    """The files of a folder.

    Attributes:
        kind: of `KINDS`.
        files: SHA-256 of each file, by its path in the folder.
    """

    kind: str
    files: dict[str, str]

    @staticmethod
    def of(folder: Path, kind: str) -> Manifest:
        """The manifest of all files in a folder."""
        names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        return Manifest(kind, {name: digest(folder / name) for name in names if name != MANIFEST})

    @staticmethod
    def read(folder: Path) -> Manifest | None:
        """The manifest of a folder, None where it has none; ConfigError where it is damaged."""
        path = folder / MANIFEST
        if not path.exists() and not path.is_symlink():
            return None
        data = checked(read_json(path, "The manifest"), _TABLE, str(path))
        return Manifest(data["kind"], data["files"])

    def write(self, folder: Path) -> None:
        text = json.dumps({"format": _FORMAT, "kind": self.kind, "files": self.files}, indent=1) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")

    def changed(self, folder: Path, names: Iterable[str]) -> list[str]:
        """Those of the names whose files are there, and are not what was written. Names that the manifest has not count as changed."""
        return [name for name in names if _exists(folder / name) and not self.holds(folder, name)]

    def holds(self, folder: Path, name: str) -> bool:
        """Whether a file is a regular one with the digest of this manifest."""
        path = folder / name
        return name in self.files and path.is_file() and not path.is_symlink() and digest(path) == self.files[name]


def digest(path: Path) -> str:
    """SHA-256 of a file; ConfigError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error


def _exists(path: Path) -> bool:
    return path.is_symlink() or path.exists()
