"""Models in Python: a file, or an importable factory."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from laurel_rewrite.errors import FOREIGN, CaptureError, ConfigError
from laurel_rewrite.files.checked import require_file
from laurel_rewrite.sources import libraries
from laurel_rewrite.sources.built import TRAINED_BY, Built, near_argument, unbuilt
from laurel_rewrite.sources.inputs import call_inputs

FACTORIES = ("build_model", "get_model", "model")


def from_code(spec: str, given: dict[str, Any], *, offered: bool) -> Built:
    """The model of `model.py`, `model.py:factory` or `package.module:factory`; see `laurel_rewrite.sources.models.build`."""
    path, _, factory = spec.rpartition(":") if ":" in spec[2:] else (spec, "", "")
    named = [f"{prefix}:NAME" for prefix in libraries()]
    with _undisturbed():
        if path.endswith(".py"):
            module, files = _load_file(Path(path))
        elif factory:
            if offered:
                check_offered(spec)
            module, files = _load_package(path), {}
        elif Path(spec).suffix:
            raise ConfigError(f"{spec}: a model is a .py file, package.module:factory, or {', '.join(named[:-1])} or {named[-1]}.")
        else:
            raise ConfigError(
                f"{spec!r} is no model: there is no such file. Give model.py, package.module:factory, {', '.join(named[:-1])} or {named[-1]}."
            )
        return _from_module(module, factory, given, spec, files)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """The working directory and the default device as they are, whatever a model's code sets; its default dtype is its own affair.

    A default device moves every tensor that anybody makes afterwards, ours included, and an output folder is meant from where the user is.
    """
    folder, device = os.getcwd(), torch.get_default_device()
    try:
        yield
    finally:
        os.chdir(folder)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)


def is_installed(name: str, file: str | None) -> bool:
    """Whether a module is Python's or an installed package's, not a file of the user's."""
    return name in sys.stdlib_module_names or file is None or "site-packages" in file or "dist-packages" in file


def _load_file(path: Path) -> tuple[ModuleType, dict[str, Path]]:
    require_file(path)
    path, shown = path.resolve(), path
    folder, name = path.parent, path.stem
    before = set(sys.modules)
    present = sys.modules.get(name)
    if present is not None and getattr(present, "__file__", None) != str(path):
        other = getattr(present, "__file__", None)
        if is_installed(name, other):
            raise ConfigError(
                f"{shown}: {name!r} is the name of a module that is imported already ({other or 'built in'}); rename the file."
            )
        del sys.modules[name]  # another model file of this name
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(name)
    except FOREIGN as error:  # whatever the user's code raises
        raise CaptureError(f"{shown} could not be imported: {type(error).__name__}: {error}") from error
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
    if Path(module.__file__ or "").resolve() != path:
        raise ConfigError(f"{shown}: Python finds another module under the name {name!r} ({module.__file__}); rename the file.")
    files = {path.name: path}
    for other in set(sys.modules) - before:
        file = getattr(sys.modules.get(other), "__file__", None)
        if file and Path(file).is_relative_to(folder) and "site-packages" not in file:
            files[str(Path(file).relative_to(folder))] = Path(file)
    return module, files


def check_offered(spec: str) -> None:
    """Raise ConfigError unless the source of "package.module:factory" defines `example_inputs`, as one that is written for us, and the
    factory itself: only such a function is called because a saved folder names it."""
    name, _, factory = spec.rpartition(":")
    if not name:
        raise ConfigError(f'{spec!r} is no factory: say "package.module:function".')
    sys.path.insert(0, "")
    try:
        found = importlib.util.find_spec(name)
        tree = (
            ast.parse(Path(found.origin).read_bytes()) if found is not None and found.origin and found.has_location else ast.Module([], [])
        )
    except FOREIGN as error:  # a package above it is imported
        raise ConfigError(f"{spec}: there is no module {name} to import: {type(error).__name__}: {error}") from error
    finally:
        if "" in sys.path:
            sys.path.remove("")
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)}
    if not {"example_inputs", factory} <= own:
        raise ConfigError(f"{spec}: {name} does not define both {factory} and example_inputs, so that it is not called for a saved folder.")


def _load_package(name: str) -> ModuleType:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"There is no module {error.name!r} to import for {name}.") from error
    except FOREIGN as error:  # whatever the user's code raises
        raise CaptureError(f"{name} could not be imported: {type(error).__name__}: {error}") from error
    finally:
        if "" in sys.path:
            sys.path.remove("")


def _from_module(module: ModuleType, factory: str, settings: dict[str, Any], spec: str, files: dict[str, Path]) -> Built:
    names = (factory,) if factory else FACTORIES
    found = next((name for name in names if hasattr(module, name)), None)
    if found is None:
        offered = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise ConfigError(
            f"{spec} has no {' or '.join(f'{name}()' if name != 'model' else name for name in names)}. "
            + (
                f"It defines {', '.join(offered)}; name one as {module.__name__}.py:FACTORY."
                if offered
                else "It defines no function or class."
            )
        )
    thing = getattr(module, found)
    model = thing if isinstance(thing, nn.Module) else _call(thing, settings, f"{spec}: {found}")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{spec}: {found} gave {type(model).__name__}, not a torch.nn.Module.")
    examples = getattr(module, "example_inputs", None)
    if examples is None:
        raise ConfigError(
            f"{spec} has no example_inputs(): a function that returns a tuple, or a dict of keyword arguments, for the model's forward."
        )
    inputs = _call(examples, {}, f"{spec}: example_inputs") if callable(examples) else examples
    args, kwargs = call_inputs(inputs)
    own: dict[str, Any] = {name: thing for name in TRAINED_BY if callable(thing := vars(module).get(name))}
    offers = {name: thing for name, thing in own.items() if thing.__module__ == module.__name__}
    return Built(model.train(), args, kwargs, spec, settings, files, offers=offers)


def _call(function: Callable[..., Any], settings: Mapping[str, Any], label: str) -> Any:
    try:
        signature = inspect.signature(function)
        signature.bind(**settings)
    except (TypeError, ValueError) as error:  # ValueError of callables that have none
        known = list(signature.parameters) if isinstance(error, TypeError) and "signature" in locals() else []
        raise ConfigError(
            f"{label}: {error}; it must be callable without arguments, or with those given by --set. {near_argument(error, known)}".rstrip()
        ) from error
    try:
        return function(**settings)
    except FOREIGN as error:  # whatever the user's code raises
        if isinstance(error, TypeError) and any(f"unexpected keyword argument {name!r}" in str(error) for name in settings):
            raise unbuilt(label, settings, error) from error  # which the function passed on
        raise CaptureError(f"{label}() raised {type(error).__name__}: {error}") from error
