"""The registry of residual operators: what is known of each by its name.

Operators come from the families of this package, from plugins (installed packages with an entry point in the group `laurel_rewrite.operators`)
and from files (`load_operators`, `--operator-file`); all of them go through `register_operator`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import re
import sys
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from laurel_rewrite.errors import FOREIGN, ConfigError, nearest
from laurel_rewrite.operators.config import FACTS, SiteConfig
from laurel_rewrite.operators.families import FAMILIES

if TYPE_CHECKING:
    from laurel_rewrite.operators.config import Option
    from laurel_rewrite.operators.counting import Counts
    from laurel_rewrite.operators.protocol import Connection

GROUP = "laurel_rewrite.operators"
_NAME = re.compile(r"[a-z][a-z0-9]*([-+_][a-z0-9]+)*")
_RESERVED = frozenset(
    """
    variant plan plan_out dry_run unsupported seed out force profile_seconds precision max_time train fail_if onnx_functions target skip_pass
    weights inputs external_data emit_torch verify set include exclude verbose quiet json version help operator_file extra_turns id kind owner
    threads provider prompt past with_past print_config allow_inference_graph
    where shape axis dim stream index calls turns holder side repeats model site stream rule config options
    """.split()
)
"""What an option of an operator cannot be called: options of the command and keys of a plan."""
_log = logging.getLogger(__name__)
C = TypeVar("C", bound="type[Connection]")


@dataclass(frozen=True)
class Operator:
    """One residual operator.

    Attributes:
        name: on the command line and in plans.
        formula, paper, start: see `laurel_rewrite.operators.protocol.Connection`, which also says what the others are.
        connection: its module.
        options: its options by name.
        file: the file that it was loaded from with `load_operators`; None for what is installed.
    """

    name: str
    formula: str
    paper: str
    start: str
    needs: frozenset[str]
    reader: str
    connection: type[Connection]
    options: Mapping[str, Option] = field(default_factory=dict)
    file: Path | None = None

    @property
    def uses_history(self) -> bool:
        return bool(self.reader)

    @property
    def uses_maps(self) -> bool:
        """Whether it needs a feature axis that linear maps fit."""
        return "maps" in self.needs

    @property
    def additive(self) -> bool:
        """Whether a further branch can be added to what there is."""
        return self.connection.defines("branch")

    @property
    def needs_input(self) -> bool:
        """Whether it reads what the branch reads."""
        return "branch input" in self.needs

    @property
    def reads_links(self) -> bool:
        """Whether it is asked again behind a norm or activation between two connections."""
        return self.connection.defines("read")

    @property
    def prepares(self) -> bool:
        """Whether it changes the weights of its branch when it is put in."""
        return self.connection.defines("prepare_branch")

    @property
    def separate(self) -> bool:
        """Whether it gives queries, keys and values what they read apart."""
        return self.connection.separate

    def prepare(self, config: SiteConfig) -> SiteConfig:
        """The configuration with every option, and with what this operator ignores set to nothing."""
        missing = {name: option.default for name, option in self.options.items() if name not in config.options}
        return config.but(**missing, **({} if self.uses_history else {"lags": 0}))

    def class_of(self, config: SiteConfig) -> type[Connection]:
        """The class of its connections with these options: annealing is one of its own."""
        from laurel_rewrite.operators import annealing

        connection: Any = self.connection
        made: type[Connection] = annealing.annealed(connection) if annealing.is_annealed(config.options) else connection
        return made

    def start_of(self, config: SiteConfig) -> str:
        """The start with these options."""
        return self.class_of(config).start_of(config)

    def parameters(self, config: SiteConfig) -> int:
        """Number of new parameters of one site."""
        connection: Any = self.connection
        return _parameters(connection, config)

    def counts(self, config: SiteConfig) -> Counts:
        """What its ops compute, move and leave for the next connection, of a site whose state is like that which it leaves; `Plan.counts` knows
        each site's own."""
        connection: Any = self.connection
        return _counted(connection, config)


@cache
def _parameters(connection: type[Connection], config: SiteConfig) -> int:
    return sum(parameter.numel() for parameter in connection(config, device="meta").parameters())


@cache
def _counted(connection: type[Connection], config: SiteConfig) -> Counts:
    from laurel_rewrite.operators.counting import counted

    return counted(connection(config, device="meta").eval())


_registry: dict[str, Operator] = {}
_failed: dict[str, str] = {}
_loaded: list[str] = []


@overload
def register_operator(connection: C) -> C: ...
@overload
def register_operator(
    connection: C, *, name: str, formula: str = "", needs: Collection[str] | None = None, reader: str | None = None
) -> C: ...


def register_operator(
    connection: C, *, name: str = "", formula: str = "", needs: Collection[str] | None = None, reader: str | None = None
) -> C:
    """Make an operator known by its name; as a decorator, or called.

    Args:
        connection: the class; its class data say all that is known of it.
        name, formula, needs, reader: instead of the class data, where one class serves several operators.

    Returns:
        The class.

    Raises:
        ConfigError: it is no operator, a name is taken or no name, or what it declares cannot be; the message has the place in its file.
    """
    from laurel_rewrite.operators.protocol import Connection as Base

    if not isinstance(connection, type) or not issubclass(connection, Base):
        raise ConfigError(f"{_place(connection)}: an operator is a subclass of laurel_rewrite.Connection, and {connection!r} is none.")
    operator = Operator(
        name=name or connection.name,
        formula=formula or connection.formula,
        paper=connection.paper,
        start=connection.start,
        needs=connection.needs if needs is None else frozenset(needs),
        reader=connection.reader if reader is None else reader,
        connection=connection,
        options=connection.declared,
        file=_FILE[-1] if _FILE else None,
    )
    problem = _problem(operator)
    if problem:
        raise ConfigError(f"{_place(connection)}: the operator {operator.name or connection.__name__!r} cannot be registered: {problem}")
    _registry[operator.name] = operator
    return connection


_FILE: list[Path] = []


def _problem(operator: Operator) -> str:
    """Why an operator cannot be registered; "" where it can."""
    from laurel_rewrite.operators.protocol import NEEDS, STARTS

    cls = operator.connection
    if not _NAME.fullmatch(operator.name):
        return "its name must be lower-case letters and digits, with - + _ between them"
    known = _registry.get(operator.name)
    if known is not None and (known.connection.__module__, known.connection.__qualname__) != (cls.__module__, cls.__qualname__):
        return f"the name is taken by {known.connection.__module__}.{known.connection.__qualname__}"
    shadowing = [name for name in operator.options if name in _RESERVED | FACTS]
    if shadowing:
        return f"its option {shadowing[0]!r} has the name of one of ours"
    for name, option in operator.options.items():
        if problem := option.problem(name, option.default):
            return f"the default of its own: {problem}"
    if operator.start not in STARTS:
        return f"start must be one of {', '.join(STARTS)}, not {operator.start!r}"
    if unknown := operator.needs - set(NEEDS):
        return f"needs are {', '.join(NEEDS)}, not {sorted(unknown)[0]!r}"
    halves = [cls.defines("skip"), cls.defines("branch")]
    if not cls.defines("step") and not all(halves):
        return "it defines neither step nor skip and branch"
    if cls.defines("step") and any(halves):
        return "it defines both step and one of skip and branch"
    if operator.separate and all(halves):
        return "it gives no Reads (separate): skip and branch are added, and only step can return them"
    if (operator.reads_links or operator.separate) and not (operator.reader and "whole stream" in operator.needs):
        what = "read" if operator.reads_links else "separate"
        return f'with {what} it must see its whole stream: needs has "whole stream", and reader says what reads the state'
    return ""


def _place(cls: Any) -> str:
    import inspect

    try:
        return f"{inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]}"
    except (OSError, TypeError):
        return getattr(cls, "__module__", "an operator")


def _all() -> dict[str, Operator]:
    """The registry, with families and plugins loaded."""
    if not _loaded:
        _loaded.append(GROUP)
        for family in FAMILIES:
            importlib.import_module(f"laurel_rewrite.operators.families.{family}")
        order = {f"laurel_rewrite.operators.families.{family}": place for place, family in enumerate(FAMILIES)}
        ours = sorted(_registry.items(), key=lambda item: order.get(item[1].connection.__module__, len(order)))
        _registry.clear()
        _registry.update(ours)
        for entry in importlib.metadata.entry_points(group=GROUP):
            try:
                entry.load()
            except FOREIGN as error:  # whatever the import of a plugin raises
                _failed[entry.name] = f"{type(error).__name__}: {str(error)[:300]}"
                _log.warning("the plugin %s (%s) was left out: %s", entry.name, entry.value, _failed[entry.name])
    return _registry


def load_operators(path: Path | str) -> list[str]:
    """Import a file that registers operators, and give their names. The file is imported once.

    Raises:
        ConfigError: there is no such file, it raises, or it registers nothing.
    """
    path = Path(path).resolve()
    _all()
    if not path.is_file():
        raise ConfigError(f"There is no operator file {path}.")
    found = [name for name, operator in _registry.items() if operator.file == path]
    if found:
        return found
    name = f"laurel_operators_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _FILE.append(path)
    try:
        spec.loader.exec_module(module)
    except ConfigError:
        del sys.modules[name]
        raise
    except FOREIGN as error:  # whatever the file raises
        del sys.modules[name]
        raise ConfigError(f"{path} could not be imported: {type(error).__name__}: {error}") from error
    finally:
        _FILE.pop()
    found = [name for name, operator in _registry.items() if operator.file == path]
    if not found:
        raise ConfigError(f"{path} registers no operator. Put @laurel_rewrite.register_operator above its class.")
    return found


def operators() -> dict[str, Operator]:
    """All operators by name, in the order of registration."""
    return dict(_all())


def forget(names: Iterable[str]) -> None:
    """Take operators out of the registry again."""
    for name in names:
        _registry.pop(name, None)


def canonical(name: str) -> str:
    """The registered spelling of an operator's name: terms may come in any order and any case.

    Raises:
        ConfigError: there is no such operator; the message lists what there is.
    """
    known = _all()
    spelled = str(name).strip().lower()
    if spelled in known:
        return spelled
    for other in known:
        if sorted(other.split("+")) == sorted(spelled.split("+")):
            return other
    failed = "".join(f" The plugin {plugin} could not be loaded: {why}." for plugin, why in _failed.items())
    raise ConfigError(f"Unknown variant {name!r}. Choose one of {', '.join(known)}. {nearest(spelled, known)}{failed}")


def operator(name: str) -> Operator:
    """The operator of a name, in any spelling that `canonical` takes."""
    return _all()[canonical(name)]


def checked_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an operator, what is not given at its default.

    Raises:
        ConfigError: every mistake at once: options that it has not, and values that they cannot have.
    """
    from laurel_rewrite.operators import annealing

    options = operator(name).options
    problems = [f"{name} has no option {key!r}. {nearest(key, options) or 'It has none.'}" for key in given if key not in options] + [
        problem for key, value in given.items() if key in options and (problem := options[key].problem(key, value))
    ]
    if problems:
        raise ConfigError(" ".join(problems))
    found = {key: given.get(key, option.default) for key, option in options.items()}
    if why := annealing.problem(found):
        raise ConfigError(why)
    return found
