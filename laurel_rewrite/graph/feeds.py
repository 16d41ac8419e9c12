"""Inputs for an ONNX graph: drawn to fit its types and ranges, or a user's own."""

from __future__ import annotations

import ast
import itertools
import math
import operator
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from laurel_rewrite.errors import ConfigError

_SAME_NUMBERS = frozenset("Cast Reshape Unsqueeze Squeeze Identity Transpose Slice Concat Expand Flatten Clip Max Min Tile".split())
"""Operators behind which an id is still that id."""
_REACH = 64  # values looked at behind an input
_FEW = 4  # numbers that steer a graph
_BYTES = 1 << 30  # of all drawn inputs together
MOST_BYTES = 1 << 32
"""Larger inputs are not read."""
_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


@dataclass(frozen=True)
class Guess:
    """Sizes for what a graph leaves open: the batch, a sequence, a cache, the sides of pictures."""

    batch: int = 2
    length: int = 16
    past: int = 4
    side: int = 64


GUESSES = (
    Guess(), Guess(batch=1), Guess(past=0), Guess(batch=1, past=0), Guess(length=1), Guess(batch=1, length=1), Guess(side=224),
    Guess(batch=1, side=224), Guess(batch=1, length=128), Guess(batch=1, length=4000), Guess(batch=1, length=16000),
)  # fmt: skip
"""What `fitting_feeds` tries: batches baked into a graph, decoders that take one token or no cache, classifiers, audio."""


def draw_feeds(
    model: ir.Model,
    *,
    seed: int = 0,
    batch: int = 2,
    length: int = 16,
    past: int = 4,
    side: int = 64,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """Random values for every input of a graph that has no default.

    Floating-point inputs are normal, pictures in 0 to 1; ids lie below the size of the table that they are looked up in; positions count on
    from the past, masks are ones, lengths are the lengths, bytes are a picture's; other integers are 0 or 1. Sizes that the graph leaves open go by
    their names and places: `batch` for the first dimension, `side` for the sides of pictures, `past` for a cache, and else `length`; a
    size given as a sum of others is that sum. `sizes` says other ones, by the names of `open_sizes`.

    Raises:
        ConfigError: an input of a type for which there is nothing to draw, or inputs of more than 1 GiB.
    """
    guess = Guess(batch, length, past, side)
    generator = np.random.default_rng(seed)
    known = dict(sizes or {})
    opened = open_sizes(model)
    for name in sorted(opened, key=_is_total):  # a total is of sizes that are known by then
        position, value = opened[name]
        guess = guess if not _is_total(name) else _behind(guess, known)
        known.setdefault(name, _size(name, position, value.shape, guess))
    guess = _behind(guess, known)
    start = guess.past if any("past" in name.lower() for name in opened) else 0
    shapes = {value: _shape(value, known, guess) for value in _inputs(model)}
    if sum(math.prod(shape) for shape in shapes.values()) * 8 > _BYTES:
        largest = max(shapes, key=lambda value: math.prod(shapes[value]))
        raise ConfigError(
            f"The input {largest.name!r} of shape {shapes[largest]} is too large to be drawn: more than {_BYTES >> 30} GiB. "
            "Give smaller inputs with --inputs, or smaller sizes."
        )
    return {str(value.name): _draw(value, shape, guess, generator, start) for value, shape in shapes.items()}


def fitting_feeds(
    model: ir.Model,
    run: Callable[[Mapping[str, np.ndarray]], Sequence[np.ndarray]],
    *,
    seed: int = 0,
    first: Sequence[Guess] = (),
    sizes: Mapping[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """The first inputs, of those that `GUESSES` make, which a graph runs with and has finite outputs for.

    Args:
        model: an ONNX graph.
        run: gives its outputs, and raises where it does not run.
        seed: of the numbers.
        first: what to try before.
        sizes: that are given, by the names of `open_sizes`.

    Raises:
        ConfigError: none fits, with what was said of the first; or there is nothing to draw.
    """
    tried: Counter[tuple[tuple[int, ...], ...]] = Counter()
    complaint = ""
    for number, guess in enumerate((*first, *GUESSES)):
        feeds = draw_feeds(model, seed=seed + number, sizes=sizes, **asdict(guess))
        shapes = tuple(array.shape for array in feeds.values())
        tried[shapes] += 1
        if tried[shapes] > 2:
            continue
        try:
            outputs = run(feeds)
        except Exception as error:  # onnxruntime's exceptions share no base class
            complaint = complaint or str(error)[:300]
            continue
        if all(np.isfinite(array).all() for array in outputs if isinstance(array, np.ndarray) and array.dtype.kind == "f"):
            return feeds
        complaint = complaint or "the outputs are not finite numbers"
    raise ConfigError(f"No inputs were found that the graph runs with, of {sum(tried.values())} that were drawn: {complaint}")


def scaled_feeds(model: ir.Model, feeds: Mapping[str, np.ndarray], factor: int, *, batch: bool, rest: bool) -> dict[str, np.ndarray]:
    """The same inputs, repeated along the axes that the graph leaves open: the first one (`batch`), the others (`rest`)."""

    def grown(value: ir.Value, axis: int) -> bool:
        return not isinstance(_dim(value, axis), int) and (batch if axis == 0 else rest)

    sizes: dict[str, int] = {}
    for value in _inputs(model):
        for axis, size in enumerate(feeds[str(value.name)].shape):
            name = _dim(value, axis)
            if isinstance(name, str):
                sizes.setdefault(name, size * (factor if grown(value, axis) else 1))
    result: dict[str, np.ndarray] = {}
    for value in _inputs(model):
        array = feeds[str(value.name)]
        for axis, size in enumerate(array.shape):
            name = _dim(value, axis)
            plain = not isinstance(name, str) or name.isidentifier()
            wanted = None if plain else _evaluate(str(name), sizes)
            wanted = (
                wanted
                if wanted is not None
                else sizes[str(name)]
                if isinstance(name, str)
                else size * (factor if grown(value, axis) else 1)
            )
            if size:
                array = np.take(array, np.arange(wanted) % size, axis=axis)
        if rest and array.dtype.kind in "iu" and _is_length(value):
            array = array * array.dtype.type(factor)
        result[str(value.name)] = array
    return result


def _dim(value: ir.Value, axis: int) -> int | str | None:
    dim = value.shape[axis] if value.shape is not None and axis < len(value.shape) else None
    return dim.value if isinstance(dim, ir.SymbolicDim) else dim


def open_sizes(model: ir.Model) -> dict[str, tuple[int, ir.Value]]:
    """The sizes that a graph leaves open, by name, with the axis and the input that has it first."""
    found: dict[str, tuple[int, ir.Value]] = {}
    for value in _inputs(model):
        for position, dim in enumerate(value.shape or ()):
            name = dim.value if isinstance(dim, ir.SymbolicDim) else None
            if name is not None and re.fullmatch(r"[\w.]+", name):
                found.setdefault(name, (position, value))
    return found


def has_open_sizes(model: ir.Model) -> bool:
    """Whether an input has a size that is not fixed, with or without a name."""
    return any(not isinstance(dim, int) for value in _inputs(model) for dim in value.shape or ())


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


def phases(model: ir.Model, prompt: int | None, past: int | None) -> dict[str, dict[str, int]]:
    """What a decoder with a past does: sizes by the names of its open ones, by what it is in words.

    Args:
        model: a graph whose inputs hold keys and values of earlier tokens (their names say "past").
        prompt: tokens to compute behind a past of none; None leaves that out.
        past: tokens that one more is computed behind; None leaves that out.

    Raises:
        ConfigError: the graph has no past, or leaves its length or the sequence's not open; a length is not positive.
    """
    if prompt is None and past is None:
        return {}
    for word, length in (("prompt", prompt), ("past", past)):
        if length is not None and length < 1:
            raise ConfigError(f"The {word} is to be of 1 token or more, not {length}.")
    names = [
        _open_length(model, lambda name: "past" in name),
        _open_length(model, lambda name: re.match(r"inputs?(_|$)", name) is not None),
    ]
    if None in names or names[0] == names[1]:
        raise ConfigError(
            "Prompts and pasts are measured of decoders whose graph leaves the lengths of both open: inputs for the keys and values of "
            "earlier tokens (past_key_values.0.key), and input_ids. export_onnx(..., past=True) and --with-past write such graphs."
        )
    behind, sequence = map(str, names)
    prefill = {} if prompt is None else {f"prefill, {prompt} tokens": {sequence: prompt, behind: 0}}
    return prefill | ({} if past is None else {f"decoding, 1 token behind {past}": {sequence: 1, behind: past}})


def _open_length(model: ir.Model, meant: Callable[[str], bool]) -> str | None:
    """The open size of the first input that is meant which is not its batch."""
    dims = (_dim(value, axis) for value in _inputs(model) if meant(str(value.name).lower()) for axis in range(1, len(value.shape or ())))
    return next((dim for dim in dims if isinstance(dim, str) and dim.isidentifier()), None)


def _inputs(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def read_feeds(file: Path) -> dict[str, np.ndarray]:
    """Inputs by name from an .npz file."""
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MOST_BYTES:
            raise ConfigError(f"The inputs {file} are {size:,} bytes when unpacked, more than the {MOST_BYTES:,} that are read.")
        with np.load(file, allow_pickle=False) as arrays:
            feeds = dict(arrays)
    except ConfigError:
        raise
    except Exception as error:  # numpy's, zipfile's and the file system's
        raise ConfigError(f"The inputs {file} could not be read as .npz: {' '.join(str(error).split())[:300]}") from error
    for name, array in feeds.items():
        if not isinstance(array, np.ndarray):  # numpy gives the bytes of a member that is no .npy
            raise ConfigError(f"The inputs {file} hold {name!r}, which is no array.")
    return feeds


def check_feeds(model: ir.Model, feeds: Mapping[str, np.ndarray], origin: object) -> None:
    """Raise ConfigError unless these are the inputs of the graph, of its types and ranks."""
    inputs = {str(value.name): value for value in _inputs(model)}
    if set(inputs) != set(feeds):
        raise ConfigError(f"{origin} takes the inputs {sorted(inputs)}, not {sorted(feeds)}.")
    for name, value in inputs.items():
        given, wanted = feeds[name], _numpy_type(value)
        if wanted is not None and given.dtype != wanted:
            raise ConfigError(f"{origin}: the input {name!r} is of type {wanted}, not {given.dtype}.")
        dims = [d if isinstance(d, int) and d >= 0 else None for d in value.shape] if value.shape is not None else None
        if dims is not None and (
            len(dims) != given.ndim or any(d is not None and d != size for d, size in zip(dims, given.shape, strict=True))
        ):
            raise ConfigError(f"{origin}: the input {name!r} is of shape {value.shape}, not {list(given.shape)}.")


def _is_total(name: str) -> bool:
    return "total" in name.lower()


def _behind(guess: Guess, known: Mapping[str, int]) -> Guess:
    """A guess with the sizes of the past and of the sequence behind it, where the graph has a past and they are known."""
    past = [size for name, size in known.items() if "past" in name.lower() and not _is_total(name)]
    length = [size for name, size in known.items() if re.search(r"seq|length", name.lower()) and not re.search(r"past|total", name.lower())]
    return replace(guess, past=past[0], length=(length or [guess.length])[0]) if past else guess


def _size(name: str, position: int, shape: ir.Shape | None, guess: Guess) -> int:
    rank, lower = len(shape or ()), name.lower()
    if "past" in lower:
        return guess.past
    if "total" in lower:
        return guess.past + guess.length
    if "batch" in lower:
        return guess.batch
    if "channel" in lower:
        return 3
    if re.match(r"height|width|h$|w$", lower):
        return guess.side
    if position == 0 and not re.search(r"seq|length|time|sample", lower):
        return guess.batch
    return guess.side if rank == 4 and position >= rank - 2 else guess.length


def _shape(value: ir.Value, sizes: Mapping[str, int], guess: Guess) -> list[int]:
    shape: list[int] = []
    for position, dim in enumerate(value.shape or ()):
        if isinstance(dim, int) and dim >= 0:
            shape.append(dim)
            continue
        name = dim.value if isinstance(dim, ir.SymbolicDim) else None
        size = sizes.get(name) or _evaluate(name, sizes) if name is not None else None
        shape.append(max(size, 0) if size is not None else _size("", position, value.shape, guess))
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


def _draw(value: ir.Value, shape: list[int], guess: Guess, generator: np.random.Generator, start: int) -> np.ndarray:
    """Values of one input; `start` is the first position."""
    kind, name = _numpy_type(value), str(value.name).lower()
    if kind is None or kind.kind not in "fiub":
        raise ConfigError(f"The input {value.name!r} is of type {value.type}, for which no values are drawn; give them with --inputs.")
    if kind.kind == "f":
        if "mask" in name:
            return np.ones(shape, kind)
        if _is_picture(value, name):
            return generator.random(shape).astype(kind)
        if len(shape) < 2 and math.prod(shape) <= _FEW:  # a scale, a speed
            return generator.uniform(0.5, 1.0, shape).astype(kind)
        return generator.standard_normal(shape).astype(kind)
    bound = _table_size(value)
    if "position" in name and shape:
        return np.broadcast_to((start + np.arange(shape[-1])) % (bound or start + shape[-1] or 1), shape).astype(kind)
    if bound is not None:
        return generator.integers(0, bound, shape).astype(kind)
    if kind.kind == "b" or "mask" in name:
        return np.ones(shape, kind)
    if _is_length(value):
        size = guess.past + guess.length if "total" in name else guess.past if "past" in name else guess.length
        return np.full(shape, guess.past + guess.length - 1 if name.endswith("seqlens_k") else size).astype(kind)
    if name in ("sr", "rate", "sample_rate", "sampling_rate"):
        return np.full(shape, 16000).astype(kind)
    return generator.integers(0, 256 if kind == np.uint8 else 2, shape).astype(kind)


def _is_picture(value: ir.Value, name: str) -> bool:
    dims = list(value.shape or ())
    return "pixel" in name or "image" in name or "img" in name or (len(dims) == 4 and bool({dims[1], dims[3]} & {1, 3, 4}))


def _is_length(value: ir.Value) -> bool:
    """Whether an integer input says how long others are."""
    return len(value.shape or ()) < 2 and re.search(r"len(gth)?s?(_|\d|$)|seqlens", str(value.name).lower()) is not None


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
