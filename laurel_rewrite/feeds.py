"""Inputs for an ONNX graph: drawn to fit its types and ranges, or a user's own."""

from __future__ import annotations

import ast
import itertools
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from laurel_rewrite.errors import ConfigError

_SAME_NUMBERS = frozenset("Cast Reshape Unsqueeze Squeeze Identity Transpose Slice Concat Expand Flatten Clip Max Min Tile".split())
"""Operators behind which an id is still that id."""
_REACH = 64  # values looked at behind an input
_IMAGE_SIDE = 64
_PAST = 4
_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


def draw_feeds(
    model: ir.Model, *, seed: int = 0, batch: int = 2, length: int = 16, sizes: Mapping[str, int] | None = None
) -> dict[str, np.ndarray]:
    """Random values for every input of a graph that has no default.

    Floating-point inputs are normal; ids lie below the size of the table that they are looked up in; masks are ones; bytes are a
    picture's; other integers are 0 or 1. Sizes that the graph leaves open: `batch` for the first dimension, 64 for the sides of
    pictures, 4 for a cache, and else `length`; a size given as a sum of others is that sum. `sizes` says other ones, by the names of
    `open_sizes`.

    Raises:
        ConfigError: an input of a type for which there is nothing to draw.
    """
    generator = np.random.default_rng(seed)
    known = dict(sizes or {})
    for name, (position, value) in open_sizes(model).items():
        known.setdefault(name, _size(name, position, value.shape, batch, length))
    return {str(value.name): _draw(value, _shape(value, known, batch, length), generator) for value in _inputs(model)}


def open_sizes(model: ir.Model) -> dict[str, tuple[int, ir.Value]]:
    """The sizes that a graph leaves open, by name, with the axis and the input that has it first."""
    found: dict[str, tuple[int, ir.Value]] = {}
    for value in _inputs(model):
        for position, dim in enumerate(value.shape or ()):
            name = dim.value if isinstance(dim, ir.SymbolicDim) else None
            if name is not None and re.fullmatch(r"[\w.]+", name):
                found.setdefault(name, (position, value))
    return found


def shape_grid(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    """Every combination of sizes, by the full names of the graph's open sizes.

    Args:
        model: an ONNX graph.
        shapes: sizes by name, or by how the name begins: {"batch": [1, 8], "seq": [128, 512]}.

    Raises:
        ConfigError: the graph has no such open size, or a size is not positive.
    """
    names = list(open_sizes(model))
    full: dict[str, Sequence[int]] = {}
    for name, sizes in shapes.items():
        matches = [known for known in names if known == name] or [known for known in names if known.startswith(name)]
        if not matches:
            raise ConfigError(f"The graph has no open size {name!r}. " + (f"It has: {', '.join(names)}." if names else "All are fixed."))
        if not sizes or any(size < 1 for size in sizes):
            raise ConfigError(f"The sizes of {name!r} must be 1 or more, not {list(sizes)}.")
        full |= dict.fromkeys(matches[:1], sizes)
    return [dict(zip(full, sizes, strict=True)) for sizes in itertools.product(*full.values())]


def _inputs(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def read_feeds(file: Path) -> dict[str, np.ndarray]:
    """Inputs by name from an .npz file."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # numpy's, zipfile's and the file system's
        raise ConfigError(f"The inputs {file} could not be read as .npz: {error}") from error


def check_feeds(model: ir.Model, feeds: Mapping[str, np.ndarray], origin: object) -> None:
    """Raise ConfigError unless these are the inputs of the graph, of its types and ranks."""
    inputs = {str(value.name): value for value in _inputs(model)}
    if set(inputs) != set(feeds):
        raise ConfigError(f"{origin} takes the inputs {sorted(inputs)}, not {sorted(feeds)}.")
    for name, value in inputs.items():
        given, wanted = feeds[name], _numpy_type(value)
        if wanted is not None and given.dtype != wanted:
            raise ConfigError(f"{origin}: the input {name!r} is of type {wanted}, not {given.dtype}.")
        dims = [d if isinstance(d, int) else None for d in value.shape] if value.shape is not None else None
        if dims is not None and (
            len(dims) != given.ndim or any(d is not None and d != size for d, size in zip(dims, given.shape, strict=True))
        ):
            raise ConfigError(f"{origin}: the input {name!r} is of shape {value.shape}, not {list(given.shape)}.")


def _size(name: str, position: int, shape: ir.Shape | None, batch: int, length: int) -> int:
    rank = len(shape or ())
    if "past" in name:
        return _PAST
    if "total" in name:
        return _PAST + length
    if position == 0:
        return batch
    return _IMAGE_SIDE if rank == 4 and position >= rank - 2 else length


def _shape(value: ir.Value, sizes: Mapping[str, int], batch: int, length: int) -> list[int]:
    shape: list[int] = []
    for position, dim in enumerate(value.shape or ()):
        if isinstance(dim, int):
            shape.append(dim)
            continue
        size = sizes.get(dim.value) or _evaluate(dim.value, sizes) if dim.value is not None else None
        shape.append(size if size is not None else _size("", position, value.shape, batch, length))
    return shape


def _evaluate(expression: str, sizes: Mapping[str, int]) -> int | None:
    """The value of a size such as "past_sequence + sequence"; None where it is not arithmetic over known sizes."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Name):
            return sizes[node.id]
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.BinOp):
            return int(_ARITHMETIC[type(node.op)](value(node.left), value(node.right)))
        raise KeyError

    try:
        return value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, KeyError, ZeroDivisionError):
        return None


def _numpy_type(value: ir.Value) -> np.dtype | None:
    """The type of an input in numpy; float32 for bfloat16, which no runtime takes from numpy: such a graph is run as a copy in float32."""
    if value.dtype == ir.DataType.BFLOAT16:
        return np.dtype(np.float32)
    try:
        return value.dtype.numpy() if value.dtype is not None and value.dtype is not ir.DataType.STRING else None
    except TypeError:  # a type that numpy does not have
        return None


def _draw(value: ir.Value, shape: list[int], generator: np.random.Generator) -> np.ndarray:
    kind = _numpy_type(value)
    if kind is None or kind.kind not in "fiub":
        raise ConfigError(f"The input {value.name!r} is of type {value.type}, for which no values are drawn; give them with --inputs.")
    if kind.kind == "f":
        return generator.standard_normal(shape).astype(kind)
    bound = _table_size(value)
    if bound is not None:
        return generator.integers(0, bound, shape).astype(kind)
    if kind.kind == "b" or "mask" in str(value.name):
        return np.ones(shape, kind)
    return generator.integers(0, 256 if kind == np.uint8 else 2, shape).astype(kind)


def _table_size(value: ir.Value) -> int | None:
    """The number of rows of the smallest table that ids are looked up in."""
    bounds: list[int] = []
    queue = [value]
    for current in queue:
        if len(queue) > _REACH:
            break
        for node, position in current.uses():
            if node.op_type == "Gather" and position == 1:
                table, axis = node.inputs[0], node.attributes.get_int("axis", 0)
                rows = table.shape[axis] if table is not None and table.shape is not None and axis is not None else None
                bounds += [rows] if isinstance(rows, int) else []
            elif node.op_type == "EmbedLayerNormalization" and position < 2:
                table = node.inputs[2 if position == 0 else 4]
                bounds += [table.shape[0]] if table is not None and table.shape is not None and isinstance(table.shape[0], int) else []
            elif node.op_type in _SAME_NUMBERS:
                queue += [output for output in node.outputs if output not in queue]
    return min(bounds, default=None)
