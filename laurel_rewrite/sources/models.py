"""MODEL on the command line: a file, an importable factory, or the name of an architecture in a library."""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from laurel_rewrite.errors import ConfigError
from laurel_rewrite.sources import libraries
from laurel_rewrite.sources.built import Built, require
from laurel_rewrite.sources.code import from_code


def build(
    spec: str,
    settings: Mapping[str, Any] | None = None,
    *,
    device: str = "cpu",
    batch: int = 2,
    offered: bool = False,
    inference: bool = False,
) -> Built:
    """Build the model that a MODEL names, with random weights, in train mode.

    Args:
        spec: `model.py`, `model.py:factory`, `package.module:factory`, `hf:NAME`, `timm:NAME`, `torchvision:NAME`, or an exported program, `model.pt2`.
        settings: keyword arguments of the factory, or fields of the architecture's configuration.
        device: "meta" builds without memory; a file's own code decides for itself.
        batch: batch size of the inputs of named architectures.
        offered: the spec was read from a file, so `package.module:factory` is imported and called only where that module is written for
            us: it has `example_inputs`, and the factory is its own.
        inference: take an exported program of evaluation mode, too.

    Raises:
        ConfigError: there is no such file, factory or name.
        CaptureError: the factory or its example inputs raise.
        MissingPackageError: the package of the prefix is not installed.
    """
    given = dict(settings or {})
    prefix, _, name = spec.partition(":")
    if prefix in libraries() and name:
        library = importlib.import_module(f"{libraries.__module__}.libraries.{prefix}")
        require(library.PACKAGE)
        made: Built = library.make(name, given, device, batch)
        return made
    if spec.endswith(".pt2"):
        from laurel_rewrite.sources.programs.reading import from_program

        if given:
            raise ConfigError("--set is for models that are built; a graph has no settings.")
        return from_program(spec, inference=inference)
    return from_code(spec, given, offered=offered)


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """`["n_layer=2", "name=x"]` as `{"n_layer": 2, "name": "x"}`: Python literals, else text."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign or not key.isidentifier():
            raise ConfigError(f"--set takes NAME=VALUE, not {pair!r}.")
        try:
            settings[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # as ast raises for what is no literal, or nested too deep
            settings[key] = text
        try:
            json.dumps(settings[key], allow_nan=False)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"--set {key}: {error}, so that the configuration could not be saved.") from error
    return settings
