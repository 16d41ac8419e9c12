"""`laurel.toml`: options of the command that a folder keeps, a table for each verb. Only click and the reader of TOML are imported."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from laurel_rewrite.errors import ConfigError, nearest
from laurel_rewrite.files.checked import Kind, anything, is_whole, read_text, shown, text, toml_of

FILE = "laurel.toml"
"""Is read where it lies in the working folder and `--config` names no other."""
MAIN = "rewrite"
"""The table of the main job, whose options may stand above all tables, too."""
RENAMED = {"min-time": "profile-seconds"}
"""Options that had another name, by it."""
_DEFAULT = "default"
_NUMBER = Kind("a number", lambda value: isinstance(value, float) or is_whole(value))
_TRUTH = Kind("true or false", lambda value: isinstance(value, bool))


@dataclass(frozen=True)
class ConfigFile:
    """What a file says of one verb.

    Attributes:
        path: of the file.
        verb: the command's name.
        values: by the names of options, without their dashes, as the file has them.
        content: its text.
    """

    path: Path
    verb: str
    values: Mapping[str, Any]
    content: str

    def defaults(self, parameters: Iterable[click.Parameter]) -> dict[str, Any]:
        """The values by the names of click's parameters, for `default_map`.

        Raises:
            ConfigError: an option that the verb has not, or a value of another type.
        """
        known = _keys(parameters)
        found: dict[str, Any] = {}
        for key, value in self.values.items():
            if key not in known:
                near = f"It is called {RENAMED[key]} now." if RENAMED.get(key) in known else nearest(key, known)
                raise ConfigError(f"{self.place(key)}: {self.verb} has no option {shown(key)}. {near}")
            option, kind = known[key], _kind(known[key])
            several = option.multiple or getattr(option.type, "several", False)
            given = value if several and isinstance(value, list) else [value]
            if not all(map(kind.test, given)):
                raise ConfigError(f"{self.place(key)}: {key} must be {kind.words}{', or a list of such' * several}, not {shown(value)}.")
            found[str(option.name)] = given if option.multiple else ",".join(map(str, given)) if several else value
        return found

    def refused(self, option: click.Parameter, reason: str) -> ConfigError:
        """The error for a value that the option does not take."""
        key = _long_name(option)
        return ConfigError(f"{self.place(key)}: {key}: {reason}")

    def place(self, key: str) -> str:
        """The file, and the line where a key of the verb stands."""
        tables = ("", self.verb) if self.verb == MAIN else (self.verb,)
        table = ""
        for number, line in enumerate(self.content.splitlines(), start=1):
            if header := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
                table = header[1].strip("\"'")
            elif table in tables and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
                return f"{self.path}, line {number}"
        return str(self.path)


def read_config(given: str | None, verb: str, verbs: Sequence[str]) -> ConfigFile | None:
    """What the file says of a verb; None where nobody names one and the working folder has none.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or has a table of no verb.
    """
    path = Path(given if given is not None else FILE)
    if given is None and not path.is_file():
        return None
    content = read_text(path, "The configuration")
    data = toml_of(content, str(path))
    tables = {name: value for name, value in data.items() if isinstance(value, dict)}
    for name in tables:
        if name not in verbs:
            raise ConfigError(f"{path}: there is no command {shown(name)} for the table [{name}]. {nearest(name, verbs)}")
    above = {name: value for name, value in data.items() if name not in tables}
    if verb != MAIN:
        return ConfigFile(path, verb, tables.get(verb, {}), content)
    for name in above.keys() & tables.get(MAIN, {}).keys():
        raise ConfigError(f"{path}: {name} stands above all tables and in [{MAIN}], which are the same.")
    return ConfigFile(path, verb, {**above, **tables.get(MAIN, {})}, content)


def _keys(parameters: Iterable[click.Parameter]) -> dict[str, click.Option]:
    """The options that a file may set, by their long names."""
    return {_long_name(one): one for one in parameters if isinstance(one, click.Option) and one.expose_value}


def _long_name(option: click.Parameter) -> str:
    return next((name.removeprefix("--") for name in option.opts if name.startswith("--")), str(option.name))


def _kind(option: click.Option) -> Kind:
    """What one value of an option may be in a file."""
    if option.is_flag:
        return _TRUTH
    kind = getattr(option.type, "kind", option.type)
    if isinstance(kind, click.types.BoolParamType):
        return _TRUTH
    if isinstance(kind, click.types.IntParamType):
        return Kind("a whole number", is_whole)
    if isinstance(kind, click.types.FloatParamType):
        return _NUMBER
    if isinstance(kind, click.types.StringParamType | click.Choice | click.Path):
        return text()
    return Kind("a number or a text", lambda value: _NUMBER.test(value) or anything(str).test(value))


@dataclass(frozen=True)
class Effective:
    """One option as a command would use it; `value` is None where it is left to what runs."""

    name: str
    value: Any
    source: str


def effective(context: click.Context, file: ConfigFile | None, planned: Mapping[str, Any], plan: str) -> list[Effective]:
    """All options of a command with their values and where each came from: option, plan, file or default, in this order.

    Args:
        context: whose parameters were read.
        file: the configuration.
        planned: what a plan says of options, by their names.
        plan: the plan's name.
    """
    found = []
    for key, option in _keys(context.command.get_params(context)).items():
        if option.hidden:
            continue
        source = context.get_parameter_source(str(option.name))
        value = context.params[str(option.name)]
        if source is ParameterSource.COMMANDLINE:
            found.append(Effective(key, value, "option"))
        elif key in planned:
            found.append(Effective(key, planned[key], plan))
        elif source is ParameterSource.DEFAULT_MAP and file is not None:
            found.append(Effective(key, value, str(file.path)))
        else:
            found.append(Effective(key, getattr(option, "usual", None) if value is None else value, _DEFAULT))
    return found


def as_toml(verb: str, values: Sequence[Effective]) -> str:
    """What `laurel.toml` would say to the same effect, with the source of each value beside it; what has none is a comment."""
    lines = [f"[{verb}]"]
    width = max(len(one.name) + len(_toml(one.value)) for one in values) if values else 0
    for one in values:
        written = f"{one.name} = {_toml(one.value)}" if one.value is not None else f"# {one.name}"
        lines.append(f"{written:<{min(width + 3, 44)}}  # {one.source}")
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """A value as TOML and JSON have it."""
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)


def _toml(value: Any) -> str:
    return json.dumps(plain(value), ensure_ascii=False) if value is not None else ""
