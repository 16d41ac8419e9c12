"""What a node of an fx graph says of itself in its metadata: its shape, and the module that ran it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

_ROOT = "_export_root"
"""What torch.export calls the model in the subgraphs of a strict export."""


def shape_of(node: fx.Node) -> tuple[tuple[int | str, ...] | None, bool]:
    """Shape and whether floating-point, from the node's metadata; (None, False) where the result is no tensor."""
    val = node.meta.get("val", node.meta.get("example_value"))
    if isinstance(val, torch.Tensor):
        shape = tuple(val.shape)
        if any(type(size) is not int for size in shape):
            shape = tuple(size if isinstance(size, int) else _size(size) for size in shape)
        return shape, val.dtype.is_floating_point
    meta: Any = node.meta.get("tensor_meta")
    if hasattr(meta, "dtype") and hasattr(meta, "shape"):
        return tuple(meta.shape), meta.dtype.is_floating_point
    return None, False


def _size(size: torch.SymInt) -> int | str:
    """A symbolic size in words; one that depends on the values of tensors is unknown, one that was found out is a number."""
    text = str(size)
    return int(text) if text.isdigit() else f"?{text}" if free_unbacked_symbols(size) else text


def discrete(node: fx.Node) -> bool:
    """Whether the result holds indices, counts or truth values. Narrow integers stand for real numbers in quantised graphs."""
    val: Any = node.meta.get("val", node.meta.get("example_value"))
    if not isinstance(val, torch.Tensor):
        val = node.meta.get("tensor_meta")
    return getattr(val, "dtype", None) in (torch.int64, torch.int32, torch.bool)


def _modules_around(node: fx.Node) -> list[tuple[Any, Any]]:
    """The modules that ran the node, from the model inwards: a key of the call, and path and class."""
    stack = node.meta.get("nn_module_stack")
    return [(key, entry) for key, entry in stack.items() if node.op != "call_module" or str(key) != str(node.target)] if stack else []


def class_of(node: fx.Node) -> str:
    """Name of the class of the module that ran the node; "" where the graph does not say."""
    entries = _modules_around(node)
    return str(entries[-1][1][1]).rpartition(".")[2].removesuffix("'>") if entries else ""


def owner_of(node: fx.Node) -> tuple[str, int, bool]:
    """Path of the module that ran the node, in which of its calls, and whether one of the modules around is a LAuReL of the model's own."""
    entries = _modules_around(node)
    if not entries:
        return "", 0, False
    existing = any("laurel" in str(cls).rpartition(".")[2].lower() for _, (_, cls) in entries)
    key, (path, _) = entries[-1]
    run = str(key).rpartition("@")[2]
    inside = str(path).removeprefix("L['self']").lstrip(".")
    inside = "" if inside == _ROOT else inside.removeprefix(f"{_ROOT}.")
    return inside, int(run) if run.isdigit() else 0, existing
