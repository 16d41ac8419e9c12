"""Where models come from: a file for each library."""

from __future__ import annotations

import importlib

import pytest

from laurel_rewrite import ConfigError, MissingPackageError
from laurel_rewrite.sources import is_graph, is_onnx, libraries
from laurel_rewrite.sources.built import Built
from laurel_rewrite.sources.models import build

NAMES = {"hf": "gpt2", "timm": "test_resnet", "torchvision": "resnet18"}


def test_the_files_are_the_libraries():
    assert libraries() == tuple(NAMES)
    with pytest.raises(ConfigError, match=r"hf:NAME, timm:NAME or torchvision:NAME"):
        build("nothing")


@pytest.mark.parametrize("prefix", NAMES)
def test_a_library_makes_models_and_names_the_nearest(prefix, monkeypatch):
    built = build(f"{prefix}:{NAMES[prefix]}", device="meta")
    assert isinstance(built, Built)
    assert built.model.training
    assert all(parameter.is_meta for parameter in built.model.parameters())
    assert (built.args, built.kwargs) != ((), {})
    with pytest.raises(ConfigError, match=NAMES[prefix]):
        build(f"{prefix}:{NAMES[prefix]}x")
    package = importlib.import_module(f"laurel_rewrite.sources.libraries.{prefix}").PACKAGE
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest))
    with pytest.raises(MissingPackageError, match=f"This needs {package}"):
        build(f"{prefix}:{NAMES[prefix]}")


def test_graphs_are_known_by_their_files():
    assert is_onnx("a/b.onnx")
    assert is_graph("b.pt2")
    assert not is_onnx("b.pt2")
    assert not is_graph("model.py:factory")
