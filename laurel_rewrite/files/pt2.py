"""Exported programs in `.pt2` files. PyTorch's loader is made for files that one trusts: what it would run is looked at first.

The archive must be a whole zip file of sizes that fit on the disk, its tensors are read without unpickling anything else, and the sizes in
its graph, which the loader evaluates as Python, must be plain arithmetic.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import importlib.util
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from laurel_rewrite.errors import FOREIGN, CaptureError
from laurel_rewrite.files.checked import shown
from laurel_rewrite.graph.capture import quiet

_EXPANSION = 200  # times the file's own size; weights hardly shrink
_JSON_BYTES = 256 << 20
_OBJECTS = re.compile(r"/(custom|opaque)_obj")
_ARITHMETIC = (
    ast.Expression, ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Call, ast.keyword, ast.operator, ast.unaryop,
    ast.boolop, ast.cmpop,
)  # fmt: skip
_MOST_POWER = 64
_CLASS = re.compile(r"Deserializing (transformers(?:\.\w+)+)\.\w+ in pytree is not registered")


def read_program(path: Path) -> torch.export.ExportedProgram:
    """An exported program.

    Raises:
        CaptureError: there is none, it cannot be read, or it holds more than tensors and a graph.
    """
    label = f"{path} could not be read as an exported program"
    try:
        _check_archive(path)
        program = _loaded(path)
        _check_metadata(program, path)
        return program
    except CaptureError:
        raise
    except FOREIGN as error:  # zipfile's, json's, torch's and the file system's
        reason = next(iter(str(error).strip().splitlines()), "")[:300]
        raise CaptureError(f"{label}: {type(error).__name__}: {reason}") from error


def _loaded(path: Path) -> torch.export.ExportedProgram:
    """The program; where it returns a class of transformers, that is imported, for it says how."""
    known: set[str] = set()
    while True:
        heard = _Heard()
        logger = logging.getLogger("torch.export")
        try:
            with quiet(), _tensors_alone():
                logging.disable(logging.NOTSET)  # PyTorch says why in its log alone
                logger.addFilter(heard)
                return torch.export.load(path)
        except RuntimeError as error:
            named = _CLASS.search(heard.text)
            if named is None or named[1] in known or importlib.util.find_spec("transformers") is None:
                reason = next((line for line in reversed(heard.text.splitlines()) if line.strip()), "")
                raise RuntimeError(reason or str(error)) from error
            known.add(named[1])
            with contextlib.suppress(ImportError), quiet():
                importlib.import_module(named[1])
        finally:
            logger.removeFilter(heard)


class _Heard(logging.Filter):
    """What would be logged, as one text."""

    text = ""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        self.text += f"{record.getMessage()}\n" + (f"{type(error).__name__}: {error}\n" if error is not None else "")
        return False


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        size = sum(entry.file_size for entry in entries)
        if size > _EXPANSION * path.stat().st_size:
            raise CaptureError(f"{path} would be {size:,} bytes when unpacked, {_EXPANSION} times its own size.")
        damaged = archive.testzip()
        if damaged is not None:
            raise CaptureError(f"{path} is damaged: {shown(damaged)} is not what was written.")
        for entry in entries:
            if _OBJECTS.search(entry.filename):
                raise CaptureError(f"{path} holds the pickled object {shown(entry.filename)}, which is not unpickled.")
            if entry.filename.endswith(".json") and entry.file_size <= _JSON_BYTES:
                _check_sizes(json.loads(archive.read(entry)), path)


def _check_metadata(program: torch.export.ExportedProgram, path: Path) -> None:
    """Raise CaptureError where what a node says of its origin is of another type than an export writes."""
    for graph in (module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)):
        for node in graph.nodes:
            stack = node.meta.get("nn_module_stack", {})
            good = isinstance(stack, dict) and all(isinstance(entry, tuple) and len(entry) == 2 for entry in stack.values())
            if not (good and isinstance(node.meta.get("custom", {}), dict) and isinstance(node.meta.get("stack_trace") or "", str)):
                raise CaptureError(f"{path} is damaged: the metadata of the node {shown(node.name)} is not what an export writes.")


def _check_sizes(data: Any, path: Path) -> None:
    """Raise CaptureError unless the symbolic sizes in a graph's JSON are arithmetic over names and numbers."""
    stack = [data]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack += item
        elif isinstance(item, dict):
            stack += item.values()
            text = item.get("expr_str")
            if isinstance(text, str) and not _is_arithmetic(text):
                raise CaptureError(f"{path}: {shown(text)} is no size.")


def _is_arithmetic(text: str) -> bool:
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval"))) if len(text) < 20_000 else []
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return bool(nodes) and all(_is_plain(node) for node in nodes)


def _is_plain(node: ast.AST) -> bool:
    match node:
        case ast.Name(id=name):
            return not name.startswith("_") and (not hasattr(builtins, name) or name in ("True", "False"))
        case ast.Constant(value=value):
            if isinstance(value, str):  # the name of a symbol
                return re.fullmatch(r"\w{1,100}", value) is not None
            return isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 1 << 64)
        case ast.BinOp(op=ast.Pow(), right=power):
            return _is_small(power)
        case ast.BinOp(op=ast.LShift() | ast.RShift() | ast.MatMult()):
            return False
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return len(arguments) == 2 and _is_small(arguments[1]) if "Pow" in name else name not in ("Integral", "Product", "Sum")
        case ast.Call():
            return False
        case _:
            return isinstance(node, _ARITHMETIC)


def _is_small(power: ast.expr) -> bool:
    """Whether an exponent is a number, as it is or as Integer(n), that does not take for ever to compute."""
    match power:
        case ast.UnaryOp(operand=inner) | ast.Call(func=ast.Name(id="Integer"), args=[inner]):
            return _is_small(inner)
        case ast.Constant(value=int() | float() as value):
            return abs(value) <= _MOST_POWER
        case _:
            return False


@contextlib.contextmanager
def _tensors_alone() -> Iterator[None]:
    """PyTorch unpickles tensors and nothing else for a while, whatever its loader asks for."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before
