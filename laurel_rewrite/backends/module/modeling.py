"""The text of `modeling_laurel.py`: the rewritten classes as a module that can be imported where their originals can."""

from __future__ import annotations

import ast
import importlib
import io
import operator
import tokenize
from collections.abc import Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any

from laurel_rewrite import __version__
from laurel_rewrite.backends.module.containers import methods_of, view_of
from laurel_rewrite.backends.module.functions import Function, Rewritten, mangled, without_fast_path
from laurel_rewrite.backends.module.surgery import Rewriting
from laurel_rewrite.errors import ConfigError, RewriteError

_HEADER = '''"""{name} with LAuReL, written by laurel-rewrite {version}.

Each class below is its base class with the sums of its residual connections replaced by calls of LAuReL modules; everything else is
the original's own text. `laurel_rewrite.load(folder)` builds the model from it. Edit it as you like: this file is what is loaded.
"""

'''
_Swap = tuple[int, int, int, str]  # line, column, length and new text, in UTF-8 bytes


def module_text(rewritten: Iterable[Rewritten], header: str) -> tuple[str, dict[Rewritten, str]]:
    """The text of a module with all rewritten classes, and the name of each there.

    Raises:
        RewriteError: a class cannot be imported (it was defined inside a function, or in a session without a file).
    """
    writer = _ModuleWriter()
    names = {}
    blocks: list[str] = []
    for item in rewritten:
        text, name = writer.write(item)
        blocks.append(text)
        names[item] = name
    return header + writer.imports() + "\n\n" + "\n\n\n".join(blocks), names


def source_of(record: Rewriting, name: str) -> tuple[str, dict[str, str]]:
    """The text of the rewritten classes, and the class of each owner in it."""
    if record.text is not None:
        return record.text, record.names
    if not record.classes:
        raise ConfigError("The source of the rewritten classes was lost, as it is in a pickled model.")
    header = _HEADER.format(name=name, version=__version__)
    text, by_class = module_text(dict.fromkeys(record.classes.values()), header)
    return text, {owner: by_class[rewritten] for owner, rewritten in record.classes.items()}


class _ModuleWriter:
    def __init__(self) -> None:
        self.names: dict[str, Any] = {}  # name in the module -> object
        self.lines: dict[str, str] = {}  # name -> import
        self.defined: set[str] = set()
        self.helpers: dict[Function, str] = {}

    def imports(self) -> str:
        plain = sorted(line for line in self.lines.values() if line.startswith("import "))
        grouped: dict[str, list[str]] = {}
        for line in self.lines.values():
            if line.startswith("from "):
                module, _, what = line.removeprefix("from ").partition(" import ")
                grouped.setdefault(module, []).append(what)
        parts = [*plain]
        for module, items in sorted(grouped.items()):
            line = f"from {module} import {', '.join(sorted(items))}"
            if len(line) > 100:
                line = f"from {module} import (\n" + "".join(f"    {item},\n" for item in sorted(items)) + ")"
            parts.append(line)
        return "from __future__ import annotations\n\n" + "\n".join(parts) + "\n"

    def write(self, item: Rewritten) -> tuple[str, str]:
        base = self._import_class(item.base)
        helpers = []
        renames: dict[str, str] = {}
        for helper in item.helpers:
            known = helper in self.helpers  # it serves another class already
            renames[helper.name] = self.helpers.setdefault(helper, "") or self._define(helper.name)
            self.helpers[helper] = renames[helper.name]
            if not known:
                helpers.append(self._function(helper, renames, "", None))
        name = self._define(item.base.__name__)
        body = "\n".join(self._function(method, renames, "    ", name) for method in item.methods)
        for method in item.methods:
            aliases = [alias for alias in method.aliases if alias not in (method.name, mangled(method.name, method.owner))]
            body += "".join(f"\n    {alias} = {method.name}\n" for alias in aliases)
        extra = (
            "\n    # Its fused kernel for eval mode knows no LAuReL.\n    activation_relu_or_gelu = property(lambda self: 0)\n"
            if without_fast_path(item.base)
            else ""
        )
        view = view_of(item.base)
        if view is not None:
            holder = self._import_class(view)
            extra += "\n    # LAuReL is no element of the container.\n"
            extra += "".join(f"    {method} = {holder}.{method}\n" for method in methods_of(item.base))
        return "\n\n".join([*helpers, f"class {name}({base}):\n{body}{extra}"]), name

    def _define(self, name: str) -> str:
        """A name for a definition of the module, numbered where it is taken."""
        chosen, count = name, 1
        while chosen in self.defined or chosen in self.names:
            count += 1
            chosen = f"{name}_{count}"
        self.defined.add(chosen)
        return chosen

    def _import_class(self, cls: type) -> str:
        return self._import(f"_{cls.__name__.lstrip('_')}", cls, cls.__module__, cls.__qualname__)

    def _import(self, wanted: str, thing: Any, module: str, attribute: str) -> str:
        if "<locals>" in attribute:
            raise RewriteError(
                f"{module}.{attribute} is defined inside a function, so that it cannot be imported again; move it to the module's top level"
            )
        if not isinstance(thing, ModuleType):
            try:
                operator.attrgetter(attribute)(importlib.import_module(module))
            except (ImportError, AttributeError) as error:
                raise RewriteError(
                    f"{module}.{attribute} was made while the program ran, as a parametrisation makes classes, so that it cannot be imported again; "
                    "take that off the module that adds, or leave its sites out"
                ) from error
        name, count = wanted, 1
        while (name in self.names and self.names[name] is not thing) or name in self.defined:
            count += 1
            name = f"{wanted}_{count}"
        self.names[name] = thing
        if "." in attribute:
            outer, _, inner = attribute.partition(".")
            holder = self._import(f"_{outer}", getattr(importlib.import_module(module), outer), module, outer)
            self.lines[name] = self.lines[holder]
            self.names[f"{holder}.{inner}"] = thing
            return f"{holder}.{inner}"
        if isinstance(thing, ModuleType):
            path, _, last = thing.__name__.rpartition(".")
            if thing.__name__ == name:
                self.lines[name] = f"import {name}"
            elif last == name and path:
                self.lines[name] = f"from {path} import {name}"
            else:
                self.lines[name] = f"import {thing.__name__} as {name}"
        else:
            self.lines[name] = f"from {module} import {attribute}" + ("" if attribute == name else f" as {name}")
        return name

    def _function(self, function: Function, renames: dict[str, str], indent: str, cls: str | None) -> str:
        """The function's text with every name of its surroundings bound by an import, and with what stands for its class said by name."""
        text = reindented(function.text, "")
        tree = ast.parse(text)
        swaps = [*self._names(function, tree, renames), *self._class_words(function, tree)]
        if function.owner is not None and (cls is None or cls.lstrip("_") != function.owner.lstrip("_")):
            swaps += _private(tree, function.owner)
        text = reindented(_swapped(text, swaps), indent)
        return "".join(f"{indent}{decorator}\n" for decorator in self._decorators(function)) + text

    def _decorators(self, function: Function) -> Iterator[str]:
        for decorator in function.decorators:
            stub = f"{decorator}\ndef f(): ..."
            swaps = self._names(function, ast.parse(stub), {})
            yield _swapped(stub, swaps).rpartition("\n")[0]

    def _names(self, function: Function, tree: ast.Module, renames: dict[str, str]) -> list[_Swap]:
        original = function.original.function()
        scope, holder = original.__globals__, function.original.holder
        free = dict(zip(original.__code__.co_freevars, original.__closure__ or (), strict=True))
        local = _local_names(tree)
        defaults = {id(n) for f in tree.body for d in _defaults(f) for n in ast.walk(d)}
        swaps: list[_Swap] = []
        if any(isinstance(node, ast.Global) for node in ast.walk(tree)):
            raise RewriteError(f"{original.__qualname__} sets a global variable of its module, so that it cannot be saved")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name in renames and node in tree.body and not function.method:
                at = len(f"{'async ' if isinstance(node, ast.AsyncFunctionDef) else ''}def ")
                swaps.append((node.lineno, node.col_offset + at, len(node.name.encode()), renames[node.name]))
            if not isinstance(node, ast.Name) or (node.id in local and id(node) not in defaults):
                continue
            new = None
            if node.id in renames:
                new = renames[node.id]
            elif id(node) in defaults and isinstance(holder, type) and node.id in vars(holder):
                new = f"{self._import_class(holder)}.{node.id}"
            elif node.id in free and node.id != "__class__":
                new = self._captured(original, node.id, free[node.id].cell_contents)
            elif node.id in scope:
                new = self._import(node.id, scope[node.id], scope["__name__"], node.id)
            if new is not None and new != node.id:
                swaps.append((node.lineno, node.col_offset, len(node.id.encode()), new))
        return swaps

    def _captured(self, original: FunctionType, name: str, thing: Any) -> str:
        if isinstance(thing, type):
            return self._import_class(thing)
        if isinstance(thing, FunctionType) and "<" not in thing.__qualname__:
            return self._import(thing.__name__, thing, thing.__module__, thing.__qualname__)
        raise RewriteError(f"{original.__qualname__} uses {name} from the function around it, so that it cannot be saved")

    def _class_words(self, function: Function, tree: ast.Module) -> list[_Swap]:
        """`super()` and `__class__` mean the class that the original was written in."""
        holder = function.original.holder
        swaps: list[_Swap] = []
        this = function.original.function().__code__.co_varnames[:1]
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id == "__class__" and isinstance(holder, type):
                swaps.append((node.lineno, node.col_offset, len("__class__"), self._import_class(holder)))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args:
                assert isinstance(holder, type) and node.end_lineno is not None and node.end_col_offset is not None
                swaps.append((node.end_lineno, node.end_col_offset - 1, 0, f"{self._import_class(holder)}, {this[0]}"))
        return swaps


def _defaults(node: ast.stmt) -> list[ast.expr]:
    arguments = getattr(node, "args", None)
    return [d for d in (*arguments.defaults, *arguments.kw_defaults) if d is not None] if arguments is not None else []


def _local_names(tree: ast.AST) -> set[str]:
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    return names | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}


def _private(tree: ast.Module, owner: str) -> list[_Swap]:
    """Private names as the class that the text comes from knew them."""
    swaps: list[_Swap] = []
    for node in ast.walk(tree):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        new = mangled(name, owner)
        if new != name and isinstance(node, ast.expr):
            assert node.end_lineno is not None and node.end_col_offset is not None
            length = len(name.encode())
            swaps.append((node.end_lineno, node.end_col_offset - length, length, new))
    return swaps


def _swapped(text: str, swaps: Iterable[_Swap]) -> str:
    data = text.encode()
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line.encode()) + 1)
    for number, column, length, new in sorted(set(swaps), reverse=True):
        at = starts[number - 1] + column
        data = data[:at] + new.encode() + data[at + length :]
    return data.decode()


def reindented(text: str, indent: str) -> str:
    """A definition at another indentation; the lines of strings that run over several lines stay as they are."""
    lines = text.split("\n")
    had = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    if had == indent:
        return text
    inside = _inside_strings(("if 1:\n" if had else "") + text)
    shift = 1 if had else 0
    for number, line in enumerate(lines):
        if number + 1 + shift not in inside and line.strip():
            lines[number] = indent + line.removeprefix(had) if line.startswith(had) else line
    return "\n".join(lines)


def _inside_strings(text: str) -> set[int]:
    """Numbers of the lines that begin inside a string."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.STRING or tokenize.tok_name[token.type].startswith("FSTRING"):
            found |= set(range(token.start[0] + 1, token.end[0] + 1))
    return found
