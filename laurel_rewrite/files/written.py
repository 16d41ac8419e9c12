"""What is written into a file of JSON: numbers alone, and the file whole or not at all. `checked.read_json` reads it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a file, which a reader, or a process that dies, never sees in part."""
    aside = path.with_name(f"{path.name}.new")
    aside.write_text(json_of(data), encoding="utf-8")
    os.replace(aside, path)


def json_of(data: Mapping[str, Any]) -> str:
    """The text of such a file."""
    return json.dumps(plain(data), indent=1, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """A value as JSON gives it back. A number that is none becomes None, and what JSON does not know its text."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)
