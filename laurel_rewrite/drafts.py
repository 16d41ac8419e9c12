"""Output folders: results are made aside and appear when all is done, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from laurel_rewrite.errors import ConfigError


class replacing:
    """A folder that is filled aside and then put in its place file by file, so that a failure leaves nothing half-written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Path:
        try:
            self.created = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.draft = Path(tempfile.mkdtemp(prefix=".laurel-", dir=self.folder))
        except OSError as error:
            raise ConfigError(f"The output folder {self.folder} cannot be written: {error.strerror}. Choose another with --out.") from error
        return self.draft

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        try:
            if kind is None:
                for file in sorted(self.draft.rglob("*")):
                    if file.is_file():
                        target = self.folder / file.relative_to(self.draft)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        os.replace(file, target)
        finally:
            shutil.rmtree(self.draft, ignore_errors=True)
            if kind is not None and self.created and not any(self.folder.iterdir()):
                self.folder.rmdir()


def writable(out: Path) -> None:
    """Say at once that the results could not be written, not after minutes."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"The output folder {out} is a file. Choose another with --out.")
    existed = out.exists()
    with replacing(out):
        pass
    if not existed:
        out.rmdir()
