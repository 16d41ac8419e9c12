"""What an ONNX graph computes in onnxruntime: its outputs, and the values at its sites."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, numpy_helper

from laurel_rewrite.files.onnx import external

if TYPE_CHECKING:
    import onnxruntime

Feeds = Mapping[str, np.ndarray]
Values = dict[str, np.ndarray]
HALVES = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})
FLOAT32 = (1e-4, 1e-5)
"""rtol and atol of a graph in float32."""
_LAST_PLACE: Mapping[int, float] = {
    TensorProto.DOUBLE: 2.0**-52,
    TensorProto.FLOAT: 2.0**-23,
    TensorProto.FLOAT16: 2.0**-10,
    TensorProto.BFLOAT16: 2.0**-7,
}
"""The distance of 1 and the next number, by type."""
_TYPES = frozenset({"to", "dtype", "output_dtype", "stash_type", "softmax_precision"})
"""Attributes that name a type."""
_PROTO_BYTES = 1_900_000_000  # protobuf ends at 2 GiB
_MEMORY = 4
"""A graph is run where the memory that is free is so many times its weights: two sessions, and what they make of the weights."""


IN_FLOAT32 = "onnxruntime has no kernel for this graph in half precision; it was verified and profiled as a copy in float32."


class NotRun(Exception):
    """A graph cannot be run here, for a reason that is no fault of the graph."""


@dataclass(frozen=True)
class Ran:
    """What a model computed on some sets of inputs.

    Attributes:
        draws: the inputs of each run, by name.
        plain: values by name of each run without optimisation: the outputs, and the values asked for. A graph in half precision is run
            as a copy in float32 here: onnxruntime's CPU computes some of its ops in float32, and which casts between them it drops
            depends on the graph around.
        optimised: the outputs of each run of the graph as it is, optimised.
        rtol, atol: what its coarsest type lets differ, of each number and of a tensor's largest magnitude.
        half: the graph is in half precision, at least in part.
        in_float32: onnxruntime has no kernel for the graph as it is, and `optimised` is of a float32 copy.
    """

    draws: Sequence[Feeds]
    plain: Sequence[Values]
    optimised: Sequence[Values]
    rtol: float
    atol: float
    half: bool = False
    in_float32: bool = False
    noise: Mapping[str, float] = field(default_factory=dict)
    """How far plain and optimised are apart, by output: what the model shows against itself."""


def run_graph(source: Path | ir.Model, draws: Sequence[Feeds], values: Collection[str] = ()) -> Ran:
    """Run a file, or a model in memory.

    Args:
        source: a path; or a model, whose external tensors lie where they say.
        draws: sets of inputs. Floating-point ones are cast to what the graph takes.
        values: names of inner values to see; those that it has not are left out.

    Raises:
        NotRun: there is no kernel, not even in float32, or not enough memory.
        Exception: onnxruntime's, where it does not load the graph, or the graph does not run with these inputs.
    """
    proto, folder = _proto(source)
    half = _uses_half(proto)
    rtol, atol = tolerance(proto)
    wide = in_float32(proto, folder) if half else proto
    plain = _run(_with_outputs(wide, values), folder, draws, optimised=False)
    try:
        optimised, copied = _run(source if isinstance(source, Path) else proto, folder, draws, optimised=True), False
    except Exception as error:
        if not half or not no_kernel(error):
            raise
        optimised, copied = _run(wide, folder, draws, optimised=True), True
    noise: dict[str, float] = {}
    for one, other in zip(plain, optimised, strict=True):
        for name, array in other.items():
            noise[name] = max(noise.get(name, 0.0), apart(array, one[name]))
    return Ran(draws, plain, optimised, rtol, atol, half, copied, noise)


def run_shaken(source: Path | ir.Model, draws: Sequence[Feeds], values: Collection[str] = ()) -> Ran:
    """`run_graph` with every weight moved in its last place, which shows how far rounding alone moves what a graph computes.

    Raises:
        NotRun: its weights are more than protobuf can hold.
        Exception: as `run_graph`.
    """
    given, folder = _proto(source)
    proto = _whole(given, folder)
    if proto.ByteSize() > _PROTO_BYTES:
        raise NotRun(f"its copy with other weights would be of {proto.ByteSize() >> 20:,} MiB")
    generator = np.random.default_rng(0)
    for tensor in _tensors(proto):
        if tensor.data_type in _LAST_PLACE:
            array = numpy_helper.to_array(tensor)
            moved = shaken(array.astype(np.float64), _LAST_PLACE[tensor.data_type], generator)
            tensor.CopyFrom(numpy_helper.from_array(moved.astype(array.dtype), tensor.name))
    return run_graph(ir.from_proto(proto), draws, values)


def shaken(array: np.ndarray, eps: float, generator: np.random.Generator) -> np.ndarray:
    """Every element moved by eps of it, up or down, but whole numbers, which masks and sizes are made of.

    Where eps is that of the type (1 and the next number's distance), these are one or two units in the last place.
    """
    return np.asarray(np.where(array == np.rint(array), array, array * (1 + eps * generator.choice([-1, 1], array.shape))))


def run_onnx(path: Path, feeds: Feeds, *, optimised: bool) -> list[np.ndarray]:
    """The outputs of a file."""
    return list(_run(path, path.parent, [feeds], optimised=optimised)[0].values())


def session_of(source: Path | onnx.ModelProto, folder: Path | None = None, *, optimised: bool = True) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU that says nothing below errors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    given = str(source) if isinstance(source, Path) else source.SerializeToString()
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def no_kernel(error: BaseException) -> bool:
    """Whether onnxruntime says that it lacks a kernel for a graph, which it found right otherwise."""
    return type(error).__name__ == "NotImplemented" or "NOT_IMPLEMENTED" in str(error)


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference; a NaN is equal to a NaN, and infinitely far from a number."""
    return float(differences(one, other).max(initial=0.0))


def differences(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """|one - other|, in float64; infinity where one is a number and the other is not, or their shapes or kinds differ."""
    if one.shape != other.shape or one.dtype.kind not in "fiub" or other.dtype.kind not in "fiub":
        return np.asarray(0.0 if np.array_equal(one, other) else np.inf)
    a, b = one.astype(np.float64), other.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    return np.asarray(np.where(np.isnan(difference), np.inf, difference))


def tolerance(proto: onnx.ModelProto) -> tuple[float, float]:
    """rtol and atol by a graph's coarsest type: a quantised value may round to the next step, float16 has 11 bits, bfloat16 has 8."""
    nodes = [node for graph in _graphs(proto) for node in graph.node]
    if any("Quantize" in node.op_type or node.op_type.startswith("QLinear") for node in nodes):
        return 0.0, 5e-2
    types = _types(proto)
    if TensorProto.BFLOAT16 in types:
        return 8e-2, 16e-3
    return (1e-2, 2e-3) if TensorProto.FLOAT16 in types else FLOAT32


# Half precision


def write_in_float32(source: Path, target: Path) -> Path:
    """Write the copy in float32 of a file, for a runtime without kernels for half precision."""
    target.write_bytes(in_float32(onnx.load(source, load_external_data=False), source.parent).SerializeToString())
    return target


def in_float32(proto: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """A copy of a graph that computes in float32 where it computed in half precision.

    Raises:
        NotRun: it would be larger than protobuf can hold.
    """
    copy = _whole(proto, folder)
    for tensor in _tensors(copy):
        _widen(tensor)
    for graph in _graphs(copy):
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            if attribute.name in _TYPES and attribute.i in HALVES:
                attribute.i = TensorProto.FLOAT
        for info in _infos(graph):
            for kind in _tensor_types(info.type):
                kind.elem_type = TensorProto.FLOAT if kind.elem_type in HALVES else kind.elem_type
    if copy.ByteSize() > _PROTO_BYTES:
        raise NotRun(f"its copy in float32 would be of {copy.ByteSize() >> 20:,} MiB")
    return copy


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in HALVES:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


def _uses_half(proto: onnx.ModelProto) -> bool:
    return bool(_types(proto) & HALVES)


def _types(proto: onnx.ModelProto) -> set[int]:
    """The types that are written in a graph."""
    found: set[int] = set()
    for graph in _graphs(proto):
        found |= {tensor.data_type for tensor in getattr(graph, "initializer", ())}
        attributes = [attribute for node in graph.node for attribute in node.attribute]
        found |= {attribute.i for attribute in attributes if attribute.name in _TYPES}
        found |= {attribute.t.data_type for attribute in attributes if attribute.HasField("t")}
        found |= {kind.elem_type for info in _infos(graph) for kind in _tensor_types(info.type)}
    return found


def _graphs(proto: onnx.ModelProto) -> Iterator[Any]:
    """The graph, its subgraphs and the functions."""
    stack: list[Any] = [proto.graph, *proto.functions]
    while stack:
        graph = stack.pop()
        yield graph
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            stack += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Initializers and constants."""
    for graph in _graphs(proto):
        yield from getattr(graph, "initializer", ())
        yield from (attribute.t for node in graph.node for attribute in node.attribute if attribute.HasField("t"))


def _whole(proto: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """A copy that holds its external weights itself."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    onnx.load_external_data_for_model(copy, str(folder))
    return copy


def _infos(graph: Any) -> Iterator[onnx.ValueInfoProto]:
    for kind in ("input", "output", "value_info"):
        yield from (info for info in getattr(graph, kind, ()) if isinstance(info, onnx.ValueInfoProto))


def _tensor_types(kind: onnx.TypeProto) -> Iterator[Any]:
    """The tensors inside sequences, optionals and maps."""
    while kind.WhichOneof("value") in ("sequence_type", "optional_type", "map_type"):
        inner = getattr(kind, str(kind.WhichOneof("value")))
        kind = inner.value_type if hasattr(inner, "value_type") else inner.elem_type
    if kind.WhichOneof("value") == "tensor_type":
        yield kind.tensor_type


# Running


def _proto(source: Path | ir.Model) -> tuple[onnx.ModelProto, Path]:
    """The graph without its external weights, and the folder that these lie in."""
    if isinstance(source, Path):
        proto, folder = onnx.load(source, load_external_data=False), source.parent
        weights = proto.ByteSize() + sum(file.stat().st_size for file in {Path(t.path) for t in external(_placed(proto, folder))})
    else:
        given = external(source)
        own = sum(
            v.const_value.nbytes for v in source.graph.initializers.values() if v.const_value is not None and v.const_value not in given
        )
        if own > _PROTO_BYTES:
            raise NotRun(f"it has {own >> 20:,} MiB of weights in memory; write it, and verify the file")
        weights = own + sum(tensor.nbytes for tensor in given)
        proto, folder = ir.to_proto(source), Path(given[0].base_dir) if given else Path()
    free = _free_memory()
    if weights * _MEMORY > free:
        raise NotRun(f"its weights take {weights >> 20:,} MiB, and {free >> 20:,} MiB of memory are free")
    return proto, folder


def _placed(proto: onnx.ModelProto, folder: Path) -> ir.Model:
    model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, folder)
    return model


def _free_memory() -> int:
    """Bytes that are free, as far as the system says so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 62


def _with_outputs(proto: onnx.ModelProto, values: Collection[str]) -> onnx.ModelProto:
    """A copy with inner values as further outputs, whose types onnxruntime infers."""
    made = {name for node in proto.graph.node for name in node.output} - {info.name for info in proto.graph.output}
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values if name in made)
    return copy


def _run(source: Path | onnx.ModelProto, folder: Path, draws: Sequence[Feeds], *, optimised: bool) -> list[Values]:
    """Values by name for each set of inputs; random operators draw the same numbers in every call."""
    import onnxruntime

    onnxruntime.set_seed(0)
    session = session_of(source, folder if isinstance(source, onnx.ModelProto) else None, optimised=optimised)
    kinds = {info.name: _NUMPY.get(info.type) for info in session.get_inputs()}
    names = [info.name for info in session.get_outputs()]
    found = []
    for feeds in draws:
        cast = {
            name: array.astype(kinds[name]) if kinds.get(name) is not None and array.dtype != kinds[name] else array
            for name, array in feeds.items()
        }
        found.append(dict(_flat(names, session.run(None, cast))))
    return found


_NUMPY: dict[str, Any] = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(double)": np.float64}


def _flat(names: Sequence[str], results: Sequence[Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Outputs by name, sequences and maps taken apart."""
    stack = list(zip(names, results, strict=True))[::-1]
    while stack:
        name, value = stack.pop()
        if isinstance(value, list | dict):
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            stack += [(f"{name}[{key}]", part) for key, part in parts][::-1]
        elif value is not None:  # an optional that is not there
            yield name, np.asarray(value)
