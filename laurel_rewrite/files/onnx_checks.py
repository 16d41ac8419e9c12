"""What is asked of an ONNX file before other libraries see it, and what onnx's checker and onnxruntime say of it.

These two are written in C++ and trust what they read: a file that is nested deep, or that they disagree about, is shown to them in a process
of its own, with a time limit. A file of a usual exporter is checked in this one, which takes no start.

    python -m laurel_rewrite.files.onnx_checks FILE      is that process: it prints its verdict as JSON
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx

from laurel_rewrite.errors import CaptureError
from laurel_rewrite.files.checked import shown

MOST_DEPTH = 64
"""Functions in functions, and subgraphs in subgraphs."""
MOST_NODES = 1_000_000
"""Nodes after all functions are written out."""
FILE_BYTES = (1 << 31) - 1
"""protobuf ends at 2 GiB; what is larger has its weights in other files."""
_USUAL_DEPTH = 8
_USUAL_NODES = 20_000
_PATIENCE = 60  # seconds for the process; the largest graph that was tried took 9
_MESSAGE, _STRING = 11, 9  # types of protobuf's fields
_EXTERNAL = onnx.TensorProto.EXTERNAL


def read_proto(path: Path) -> onnx.ModelProto:
    """The file as protobuf, whose text is text, whose names stand once and whose functions come to an end.

    Raises:
        CaptureError: what is wrong, in one sentence.
    """
    try:
        if path.stat().st_size > FILE_BYTES:
            raise CaptureError(f"{path} is larger than 2 GiB, which is no ONNX file. Its weights belong into files of their own.")
        proto = onnx.load(path, load_external_data=False)
    except CaptureError:
        raise
    except Exception as error:  # protobuf's, the file system's
        raise CaptureError(f"{path} could not be read as an ONNX graph: {first_line(error)}. Is the file complete?") from error
    _check_texts(proto, path)
    _check_names(proto, path)
    _check_functions(proto, path)
    for tensor in _tensors(proto):
        _check_tensor(tensor, path)
    return proto


def is_unusual(proto: onnx.ModelProto) -> bool:
    """Whether functions are nested, or multiply, as no usual exporter lets them."""
    depth, nodes = _extent(proto)
    return depth > _USUAL_DEPTH or (bool(proto.functions) and nodes > _USUAL_NODES)


def complaints(path: Path, *, apart: bool, foreign: bool) -> tuple[str, str | None]:
    """What onnx's checker says against a file, and what onnxruntime, which is asked where the checker complains or cannot judge.

    Args:
        path: of the file.
        apart: ask both in a process of their own.
        foreign: the file has operators that the checker does not know.

    Returns:
        The checker's complaint, or ""; onnxruntime's refusal, None where it loads the file or was not asked.
    """
    if apart:
        return _asked_apart(path, "checker", "runtime")
    complaint = _checker(path)
    if not complaint:
        return "", refused(path) if foreign else None
    return complaint, _asked_apart(path, "runtime")[1]


def _asked_apart(path: Path, *whom: str) -> tuple[str, str | None]:
    command = [sys.executable, "-m", __name__, str(path.absolute()), *whom]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_PATIENCE, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return "", f"no answer within {_PATIENCE} seconds"
    try:
        complaint, refusal = json.loads(done.stdout.decode().rpartition("\n")[2])
    except (ValueError, TypeError):
        return "", f"its process ended with status {done.returncode}"
    return complaint, refusal


def _checker(path: Path) -> str:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker's, the inference's, protobuf's
        return f"{first_line(error)}. "
    return ""


def refused(path: Path) -> str | None:
    """What onnxruntime says against a file; None where it loads it, or found it right and lacks a kernel for it.

    It knows operators and types that onnx's checker does not, and wants names of nodes to be unique.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        return None if "NOT_IMPLEMENTED" in str(error) else first_line(error)
    return None


# The protobuf


def _check_texts(message: Any, path: Path) -> None:
    """Raise CaptureError unless every text is one: protobuf gives bytes for what is no UTF-8."""
    for field, value in message.ListFields():
        if field.type == _MESSAGE:
            for part in value if field.is_repeated else (value,):
                _check_texts(part, path)
        elif field.type == _STRING:
            for word in value if field.is_repeated else (value,):
                if type(word) is not str:
                    raise CaptureError(f"{path}: {message.DESCRIPTOR.name}.{field.name} is no text in UTF-8: {shown(word)}.")


def _check_names(proto: onnx.ModelProto, path: Path) -> None:
    graph = proto.graph
    for kind, names in (
        ("node", [node.name for node in graph.node]),
        ("value", [name for node in graph.node for name in node.output] + [value.name for value in graph.input]),
        ("initializer", [tensor.name for tensor in graph.initializer]),
        ("function", [f"{f.domain}::{f.name}" + (f":{f.overload}" if f.overload else "") for f in proto.functions]),
    ):
        twice = [name for name, count in Counter(names).items() if name and count > 1]
        if twice and not (kind == "node" and refused(path) is None):  # what is read gives nodes names of their own
            raise CaptureError(f"{path} has {len(twice)} {kind} names that stand twice, the first {shown(twice[0])}.")


def _check_functions(proto: onnx.ModelProto, path: Path) -> None:
    depth, nodes = _extent(proto)
    if depth > MOST_DEPTH:
        raise CaptureError(f"{path}: functions or subgraphs are nested more than {MOST_DEPTH} deep, or a function calls itself.")
    if nodes > max(MOST_NODES, len(proto.graph.node)):
        raise CaptureError(f"{path}: written out, the functions are more than {MOST_NODES:,} nodes.")


def _extent(proto: onnx.ModelProto) -> tuple[int, int]:
    """How deep functions and subgraphs are nested, and how many nodes there are when all functions are written out."""
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    known: dict[tuple[str, str, str], tuple[int, int]] = {}

    def measure(nodes: Iterable[onnx.NodeProto], depth: int) -> tuple[int, int]:
        deepest, count = depth, 0
        for node in nodes:
            count += 1
            key = (node.domain, node.op_type, node.overload)
            if key in functions and depth <= MOST_DEPTH:
                if key not in known:
                    known[key] = (MOST_DEPTH + 1, 0)  # of a function that calls itself
                    known[key] = measure(functions[key].node, depth + 1)
                    known[key] = (known[key][0] - depth, known[key][1])
                deepest, count = max(deepest, depth + known[key][0]), count + known[key][1]
            for graph in _subgraphs(node):
                inner = measure(graph.node, depth + 1)
                deepest, count = max(deepest, inner[0]), count + inner[1]
        return deepest, count

    return measure(proto.graph.node, 0)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    stack: list[Any] = [proto.graph, *proto.functions]
    while stack:
        graph = stack.pop()
        yield from getattr(graph, "initializer", ())
        for sparse in getattr(graph, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        for node in graph.node:
            stack += _subgraphs(node)
            for attribute in node.attribute:
                yield from ([attribute.t] if attribute.HasField("t") else [])
                yield from attribute.tensors


def _check_tensor(tensor: onnx.TensorProto, path: Path) -> None:
    label = f"{path}: the tensor {shown(tensor.name)}"
    known = onnx.TensorProto.DataType.values()
    if tensor.data_type == onnx.TensorProto.UNDEFINED or tensor.data_type not in known:
        raise CaptureError(f"{label} is of the unknown type {tensor.data_type}.")
    if any(not 0 <= size < 1 << 40 for size in tensor.dims):
        raise CaptureError(f"{label} has the impossible shape {shown(list(tensor.dims))}.")
    if tensor.data_location != _EXTERNAL:
        return
    entries = {entry.key: entry.value for entry in tensor.external_data}
    for key in ("offset", "length"):
        if key in entries and not re.fullmatch("[0-9]{1,18}", entries[key]):
            raise CaptureError(f"{label} lies in another file at the impossible {key} {shown(entries[key])}.")
    location = entries.get("location", "")
    if not location or not location.isprintable():
        raise CaptureError(f"{label} lies in another file of the impossible name {shown(location)}.")


def first_line(error: BaseException) -> str:
    """The start of a message without its colours, contexts and places in a runtime's source."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(
        r"\x1b\[\d+m|\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from \S+ failed:|/onnxruntime_src/.*\)( const)? ", "", str(error)
    )
    text = re.sub(r", however input '(.*)' of node:", r", and \1 is not", text).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("==>")]
    return (lines[0] if lines else type(error).__name__)[:400].rstrip(".")


if __name__ == "__main__":
    file = Path(sys.argv[1])
    said = _checker(file) if "checker" in sys.argv[2:] else ""
    print("\n" + json.dumps([said, refused(file)]), end="")
