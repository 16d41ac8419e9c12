"""What is read from a file, checked by type: a table says what each key may hold, and everything else is a ConfigError.

SITE = {"id": text(), "rank": whole(1), "turns": optional(whole(), 0)}
row = checked(data, SITE, "plan.toml, site 3")
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from laurel_rewrite.errors import ConfigError, nearest

WHOLE = 2**31 - 1
"""The largest size, count or position that a file may name."""
TEXT = 65536
"""Characters of the longest text that a file may hold under one key."""
FILE_BYTES = 64 << 20
"""The largest plan or configuration that is read."""
_MOST_PARTS = 100
_STRINGS = re.compile(r'"(?:[^"\\\n]|\\.)*+"?|\'[^\'\n]*+\'?')
_DOTTED = re.compile(r'(?<![\w-])(?:(?:[\w-]++|"")[ \t]*+\.[ \t]*+)++')
_REQUIRED = object()


@dataclass(frozen=True)
class Kind:
    """What a key may hold, in words and as a test; `default` where the key may be missing."""

    words: str
    test: Callable[[Any], bool]
    default: Any = _REQUIRED


def text(pattern: str = "", words: str = "a text") -> Kind:
    """A string without control characters that matches a pattern."""

    def test(value: Any) -> bool:
        return isinstance(value, str) and len(value) <= TEXT and value.isprintable() and (not pattern or bool(re.fullmatch(pattern, value)))

    return Kind(words, test)


def whole(low: int = 0, high: int = WHOLE) -> Kind:
    """A whole number in a range, both ends included."""
    return Kind(f"a whole number from {low} to {high}", lambda value: is_whole(value) and low <= value <= high)


def one_of(*values: Any) -> Kind:
    """One of a few values; 1 is not True."""
    words = f"one of {', '.join(map(str, values))}"
    return Kind(words, lambda value: any(type(value) is type(known) and value == known for known in values))


def list_of(*kinds: Kind, most: int = WHOLE) -> Kind:
    """A list, each of whose elements is of one of the kinds."""
    words = f"a list of {' or '.join(kind.words for kind in kinds)}"
    return Kind(words, lambda value: isinstance(value, list) and len(value) <= most and all(any(k.test(v) for k in kinds) for v in value))


def mapping(key: Kind, value: Kind) -> Kind:
    """A table whose keys and values are of these kinds."""
    words = f"a table from {key.words} to {value.words}"
    return Kind(words, lambda given: isinstance(given, dict) and all(key.test(k) and value.test(v) for k, v in given.items()))


def anything(kind: type) -> Kind:
    """Any value of a type."""
    return Kind(f"a {kind.__name__}", lambda value: isinstance(value, kind))


def optional(kind: Kind, default: Any) -> Kind:
    """A key that may be missing."""
    return Kind(kind.words, kind.test, default)


def is_whole(value: Any) -> bool:
    """Whether a value is an integer, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def inner_name(value: Any) -> bool:
    """Whether a value names a file inside a folder: a relative path without "..", that every file system takes, and none of our scratch."""
    if not isinstance(value, str) or not value.isprintable() or "\\" in value or len(value.encode(errors="replace")) > 1000:
        return False
    parts = value.split("/")
    return not PurePosixPath(value).is_absolute() and all(
        part not in ("", ".", "..") and len(part.encode(errors="replace")) <= 255 and not part.startswith(".laurel-") for part in parts
    )


INNER_NAME = Kind("a file's name inside the folder", inner_name)


def checked(data: Any, table: Mapping[str, Kind], label: str) -> dict[str, Any]:
    """The values of a table's keys, with defaults where keys may be missing.

    Raises:
        ConfigError: every unknown or missing key and every value of another kind, at once.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{label} must be a table, not {shown(data)}.")
    problems = [f"unknown key {shown(key)}. {nearest(str(key), table)}" for key in data if key not in table]
    found: dict[str, Any] = {}
    for key, kind in table.items():
        if key not in data:
            found[key] = kind.default
            if kind.default is _REQUIRED:
                problems.append(f"the key {key!r} is missing.")
        elif kind.test(data[key]):
            found[key] = data[key]
        else:
            problems.append(f"{key} must be {kind.words}, not {shown(data[key])}.")
    if problems:
        more = [f"And {len(problems) - 5} more."] if len(problems) > 5 else []
        raise ConfigError(f"{label}: " + " ".join(problems[:5] + more))
    return found


def shown(value: Any) -> str:
    """A value in a message, cut short."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    written = ascii(value) if isinstance(value, str | bytes) and not str(value).isprintable() else repr(value)
    return written if len(written) <= 80 else f"{written[:77]}..."


def read_text(path: Path, what: str) -> str:
    """A file's text; ConfigError where there is none, it is too large, or it is not UTF-8."""
    return decoded(read_bytes(path, what), f"{what} {path}")


def read_bytes(path: Path, what: str, most: int = FILE_BYTES) -> bytes:
    """A regular file's bytes; ConfigError where it cannot be read or is too large."""
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{what} {path} is no file.")
        with path.open("rb") as file:
            data = file.read(most + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what} {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if len(data) > most:
        raise ConfigError(f"{what} {path} is larger than {most >> 20} MiB.")
    return data


def decoded(data: bytes, label: str) -> str:
    """Bytes as UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{label} is no text in UTF-8: byte {error.start} is 0x{data[error.start]:02x}.") from error


def toml_of(text: str, origin: str) -> dict[str, Any]:
    """The tables of a TOML text; ConfigError where it is none."""
    # The parser's time grows with the square of the parts of one dotted key.
    if any(key[0].count(".") >= _MOST_PARTS for key in _DOTTED.finditer(_STRINGS.sub('""', text))):
        raise ConfigError(f"{origin} is not valid TOML here: a key has more than {_MOST_PARTS} parts.")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of numbers with thousands of digits, of a thousand brackets
        raise ConfigError(f"{origin} is not valid TOML: {str(error)[:200]}") from error


def read_json(path: Path, what: str) -> Any:
    """What a JSON file holds; ConfigError where it is damaged."""
    try:
        return json.loads(read_text(path, what), parse_constant=_no_constant, object_pairs_hook=_no_twice)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:  # of numbers with thousands of digits, too
        raise ConfigError(f"{path} is damaged: {type(error).__name__}: {str(error)[:200]}") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _no_twice(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} stands twice")
        found[key] = value
    return found


def require_file(path: Path) -> None:
    """Raise ConfigError unless there is this file; the message lists the nearest of its kind."""
    try:
        if path.is_file():
            return
        if path.is_dir():
            raise ConfigError(f"{path} is a directory, not a file.")
        folder = path.parent if path.parent.is_dir() else Path()
        near = nearest(path.name, (p.name for p in folder.glob("*") if p.suffix == path.suffix and p.is_file()))
    except OSError as error:
        raise ConfigError(f"The file {str(path)[:80]}... cannot be read: {error.strerror}.") from error
    raise ConfigError(f"There is no file {path}. {near}")
