"""The text of `modeling_laurel.py`: the rewritten classes as a module that can be imported where their originals can."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any

from laurel_rewrite.errors import RewriteError
from laurel_rewrite.source import Function, Rewritten, without_fast_path


def module_text(rewritten: Iterable[Rewritten], header: str) -> tuple[str, dict[type, str]]:
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
        names[item.cls] = name
    return header + writer.imports() + "\n\n" + "\n\n\n".join(blocks), names


class _ModuleWriter:
    def __init__(self) -> None:
        self.names: dict[str, Any] = {}  # name in the module -> object
        self.lines: dict[str, str] = {}  # name -> import
        self.defined: set[str] = set()
        self.helpers: dict[tuple[FunctionType, str], str] = {}

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
            key = (helper.original, helper.text)
            known = key in self.helpers  # it serves another class already
            renames[helper.name] = self.helpers.setdefault(key, "") or self._define(helper.name)
            self.helpers[key] = renames[helper.name]
            if known:
                continue
            helpers.append(self._function(helper, renames))
        name = self._define(item.base.__name__)
        body = "\n".join(
            "".join(f"    {line}" if line.strip() else line for line in self._function(m, renames).splitlines(True)) for m in item.methods
        )
        extra = (
            "\n    # Its fused kernel for eval mode knows no LAuReL.\n    activation_relu_or_gelu = property(lambda self: 0)\n"
            if without_fast_path(item.base)
            else ""
        )
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
        return self._import(f"_{cls.__name__}", cls, cls.__module__, cls.__qualname__)

    def _import(self, wanted: str, thing: Any, module: str, attribute: str) -> str:
        if "<locals>" in attribute:
            raise RewriteError(
                f"{module}.{attribute} is defined inside a function, so that it cannot be imported again; move it to the module's top level"
            )
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

    def _function(self, function: Function, renames: dict[str, str]) -> str:
        """The function's text with every global name bound by an import, renamed where two modules' names collide."""
        tree = ast.parse(function.text)
        scope = function.original.__globals__
        local = _local_names(tree)
        swaps: dict[str, str] = dict(renames)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id not in local and node.id not in swaps:
                if node.id in function.needs:
                    thing = function.needs[node.id]
                    if isinstance(thing, type):
                        swaps[node.id] = self._import_class(thing)
                    elif not isinstance(thing, FunctionType) or thing.__qualname__ == "" or "<locals>" in thing.__qualname__:
                        raise RewriteError(
                            f"{function.original.__qualname__} uses {node.id} from the function around it, so that it cannot be saved"
                        )
                elif node.id in scope:
                    swaps[node.id] = self._import(node.id, scope[node.id], scope["__name__"], node.id)
        return _renamed(function.text, tree, local, {a: b for a, b in swaps.items() if a != b})


def _local_names(tree: ast.AST) -> set[str]:
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    return names | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}


def _renamed(text: str, tree: ast.AST, local: set[str], swaps: dict[str, str]) -> str:
    if not swaps:
        return text
    data = text.encode()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    for node in sorted(_names(tree), key=lambda n: (n.lineno, n.col_offset), reverse=True):
        name = node.id if isinstance(node, ast.Name) else node.name
        if name in swaps and name not in local:
            at = starts[node.lineno - 1] + node.col_offset
            if isinstance(node, ast.FunctionDef):
                at = data.index(name.encode(), at + 4)
            data = data[:at] + swaps[name].encode() + data[at + len(name.encode()) :]
    return data.decode()


def _names(tree: ast.AST) -> Iterator[ast.Name | ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Name | ast.FunctionDef))
