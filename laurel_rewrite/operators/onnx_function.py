"""A connection as an ONNX local function, made from its own `step`: torch exports it with its parameters as inputs.

One body serves all sites where the same is computed; it is known by what torch traces, not by names and files. Bodies are kept in the user's
cache folder (`LAUREL_REWRITE_CACHE` names another, 0 none), for an export takes about a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from laurel_rewrite.errors import ExportError
from laurel_rewrite.graph.capture import quiet
from laurel_rewrite.operators.config import SiteConfig, Watched
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.reads import parted
from laurel_rewrite.operators.state import FED

DOMAIN = "laurel_rewrite"
DOMAIN_VERSION = 1
CALL = "laurel_rewrite.call"
"""Key of what a node computes, a `Call`, in its `metadata_props`: a file can be lowered without its plan."""
ENDS = {"whole": "", "skip": "_skip", "branch": "_branch", "read": "_read"}
"""How the name of a function ends, by what part of an operator it is."""
IR_VERSION = 10
"""The first with `metadata_props` at nodes; functions came with 8."""
MADE_IN = 20
"""The opset in which the exporter writes bodies: in a graph of a later one they are as they are."""
_CACHE = "LAUREL_REWRITE_CACHE"
_SIZES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)  # of dimensions that nothing is known of
_STEADY = {
    "Add": 7, "Mul": 7, "Sub": 7, "Div": 7, "MatMul": 9, "Gemm": 9, "Transpose": 1, "Softmax": 1, "Sigmoid": 6, "Tanh": 6, "Neg": 6, "Sqrt": 6,
    "Exp": 6, "Relu": 6, "Cast": 9, "Constant": 9, "Slice": 9, "Gather": 1, "Reshape": 5, "Shape": 1, "Flatten": 9, "Conv": 1, "Concat": 4,
    "Identity": 1, "Expand": 8, "Reciprocal": 6,
}  # fmt: skip
"""Operators that meant the same since these versions, in the forms in which the exporter writes them or `_older` can: a Softmax of vectors."""


@dataclass(frozen=True)
class Call:
    """What one function node computes.

    Attributes:
        config: operator, place and options.
        part: "whole" (the sum), "skip" (what the skip brings, for a node that adds by itself), "branch" (what a branch brings) or "read"
            (what is read behind a norm or activation).
        branches: how many branches it is given.
        states: how many states it is given.
        reads: it is given what the branch reads, behind the states.
    """

    config: SiteConfig
    part: str = "whole"
    branches: int = 1
    states: int = 0
    reads: bool = False

    @property
    def operand_count(self) -> int:
        """How many operands there are, before the parameters."""
        return (self.part != "branch") + self.branches + self.states + self.reads

    @property
    def fed(self) -> int:
        """How many values at the head of the states given are what the branch reads apart."""
        return FED if self.config.fed and self.part != "read" else 0

    @property
    def leaves(self) -> int:
        """How many values at the head of the state behind it are that of the next branch."""
        return FED if self.config.separate and self.config.linked == (self.part == "read") else 0

    def to_json(self) -> str:
        return json.dumps({**vars(self), "config": self.config.to_dict()})

    @staticmethod
    def from_json(text: str) -> Call:
        data = json.loads(text)
        return Call(SiteConfig(**data.pop("config")), **data)

    def run(self, connection: Connection, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The value, and the state behind it."""
        if self.part == "branch":
            return (connection.branch(operands[0]),)
        n = operands[-1] if self.reads else None
        count = len(operands) - self.states - self.reads
        given, states = operands[:count], operands[count : count + self.states]
        if self.part == "read":
            value, left = connection.connect_behind(given[0], states)
            return value, *left
        if self.part == "skip":
            value, left = parted(connection.skip(given[0], *states, **({"n": n} if self.reads else {})))
            return value, *left
        value, left = connection.connect(*given, state=states, n=n)
        return value, *left

    def operands(self, connection: Connection, dtype: torch.dtype) -> list[Tensor]:
        """Operands of some sizes: the skip, or none for one branch alone; branches; states, as the connection itself leaves them."""
        config = self.config
        taken = {config.dim, *(size for value in connection.state_dict().values() for size in value.shape)}
        shape = [size for size in _SIZES if size not in taken][: config.ndim]  # all different, so that none is taken for another
        if config.dim:
            shape[config.axis] = config.dim
        drawn = [torch.randn(shape, dtype=dtype) for _ in range((self.part != "branch") + self.branches)]
        lead: tuple[int, ...] = ()
        if self.states and connection.lead:
            zeros = torch.zeros(shape, dtype=dtype)
            _, left = connection.connect(zeros, zeros, state=(zeros,) * self.fed, n=zeros)
            lead = tuple(left[-1].shape[: connection.lead])
        states = [torch.randn(*(lead if place >= self.fed else ()), *shape, dtype=dtype) for place in range(self.states)]
        return [*drawn, *states, *(torch.randn(shape, dtype=dtype) for _ in range(self.reads))]


@dataclass(frozen=True)
class StepFunction:
    """A call as an ONNX function. Its inputs are the operands and then the parameters; its outputs the value and what of the state it computes.

    Attributes:
        body: the function, without a name.
        parameters: names of the module's parameters and buffers, in the order of the inputs.
        handed_on: for each state left behind, the position of the operand that it is; None where it is the next output.
    """

    body: onnx.FunctionProto
    parameters: tuple[str, ...]
    handed_on: tuple[int | None, ...]

    @cached_property
    def opset(self) -> int:
        """The first opset in which the body can be written."""
        return max((_since(node) for node in self.body.node), default=1)

    def named(self, name: str, opset: int) -> ir.Function:
        """The function under a name, in an opset from `opset` on."""
        proto = onnx.FunctionProto()
        proto.CopyFrom(self.body)
        proto.domain, proto.name = DOMAIN, name
        del proto.opset_import[:]
        proto.opset_import.append(onnx.helper.make_opsetid("", opset))
        if opset < 13:
            _older(proto, opset)
        return ir.serde.deserialize_function(proto)


class _Step(nn.Module):
    """A call with the parameters of its connection as inputs; it gives what it computes, and not what it is given."""

    def __init__(self, connection: Connection, call: Call, names: Sequence[str], kept: Sequence[int] | None = None) -> None:
        super().__init__()
        self._connection = [connection]  # no child: its parameters are inputs
        self.call, self.names, self.kept = call, names, kept

    def forward(self, *operands: Tensor) -> tuple[Tensor, ...]:
        count = len(operands) - len(self.names)
        module = _Whole(self._connection[0], self.call)
        state = {f"connection.{name}": value for name, value in zip(self.names, operands[count:], strict=True)}
        found: tuple[Tensor, ...] = torch.func.functional_call(module, state, operands[:count])
        return found if self.kept is None else tuple(found[i] for i in self.kept)


class _Whole(nn.Module):
    def __init__(self, connection: Connection, call: Call) -> None:
        super().__init__()
        self.connection = connection
        self.call = call

    def forward(self, *operands: Tensor) -> tuple[Tensor, ...]:
        return self.call.run(self.connection, operands)


def step_function(connection: Connection, call: Call, dtype: torch.dtype) -> StepFunction:
    """The function of a call.

    Args:
        connection: of the site; its parameters' types and sizes count, their values do not.
        call: what of it.
        dtype: of the operands.

    Raises:
        ExportError: torch cannot export what it computes.
    """
    types = tuple((name, str(value.dtype)) for name, value in connection.state_dict().items())
    cls: Any = type(connection)
    return _step_function(cls, replace(call, config=_looked_at(cls, call)), str(dtype), types)


@cache
def _looked_at(cls: type[Connection], call: Call) -> SiteConfig:
    """The configuration as far as it makes a difference to what is computed: sites that differ in their position alone share a function, unless
    their operator looks at it. Found by a run without values, which is quick; a trace is not."""
    watched = Watched(call.config)
    try:
        with torch.no_grad(), torch.device("meta"):
            connection = cls(watched, device="meta").eval()
            call.run(connection, call.operands(connection, torch.float32))
    except Exception:  # an operator that needs values is traced at every site
        return call.config
    config = watched.read_alone()
    # The operands are made by these, whoever looks at them.
    return config.but(axis=call.config.axis, ndim=call.config.ndim)


@cache
def _step_function(cls: type[Connection], call: Call, dtype: str, types: tuple[tuple[str, str], ...]) -> StepFunction:
    from torch.fx.experimental.proxy_tensor import make_fx

    connection = cls(call.config, device="cpu").eval()
    kinds = {name: getattr(torch, kind.removeprefix("torch.")) for name, kind in types}
    with torch.no_grad():
        operands = call.operands(connection, getattr(torch, dtype.removeprefix("torch.")))
    state = {name: value.detach().to(kinds[name]) for name, value in connection.state_dict().items()}
    try:
        with torch.no_grad():
            graph = make_fx(_Step(connection, call, [*state]), tracing_mode="symbolic")(*operands, *state.values())
    except Exception as error:  # whatever an operator raises
        raise ExportError(f"{call.config.variant} cannot be traced: {type(error).__name__}: {str(error)[:300]}") from error
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    outputs: Any = graph.graph.output_node().args[0]
    handed_on = tuple(inputs.index(node) if node in inputs else None for node in outputs[1:])
    kept = [0, *(place for place, source in enumerate(handed_on, start=1) if source is None)]
    read = [name for name, node in zip(state, inputs[len(operands) :], strict=True) if node.users]
    given = [*operands, *(state[name] for name in read)]
    key = _digest(
        graph, [*inputs[: len(operands)], *(node for node in inputs[len(operands) :] if node.users)], given, [outputs[i] for i in kept]
    )
    body = _cached(key)
    if body is None:
        body = _exported(_Step(connection, call, read, kept), given, call)
        _keep(key, body)
    return StepFunction(body, tuple(read), handed_on)


def _digest(graph: torch.fx.GraphModule, nodes: Sequence[torch.fx.Node], inputs: Sequence[Tensor], outputs: Sequence[torch.fx.Node]) -> str:
    """What is computed, whatever the names and whatever else was traced, and what computes the body from it.

    Args:
        graph: as traced.
        nodes, inputs: the placeholders that the body has, and their tensors.
        outputs: what it gives.
    """
    found = hashlib.sha256()
    needed, stack = {*outputs}, [*outputs]
    while stack:
        operands = [node for node in stack.pop().all_input_nodes if node not in needed]
        needed.update(operands)
        stack += operands
    names = {node: f"in_{place}" for place, node in enumerate(nodes)}
    for node in graph.graph.nodes:
        if node in needed and node not in names:
            if node.op == "get_attr":
                constant = getattr(graph, str(node.target)).detach().cpu().contiguous()
                found.update(f"{constant.dtype} {list(constant.shape)}".encode() + constant.numpy().tobytes())
            given: Any = (node.args, node.kwargs)
            operands = torch.fx.node.map_arg(given, lambda operand: names[operand])
            found.update(f"{node.op} {node.target if node.op != 'get_attr' else ''} {operands!r}\n".encode())
            names[node] = f"v_{len(names)}"
    versions = torch.__version__, version("onnxscript"), onnx.__version__
    # torch takes sizes of 0 and 1 for constants, and may take equal sizes for one.
    sizes = [size for tensor in inputs for size in tensor.shape]
    pattern = [size if size < 2 else 2 + sizes.index(size) for size in sizes]
    facts = [[str(t.dtype), t.ndim] for t in inputs], pattern, [names[node] for node in outputs], versions
    found.update(json.dumps(facts).encode() + Path(__file__).read_bytes())
    return found.hexdigest()


def _exported(step: _Step, inputs: list[Tensor], call: Call) -> onnx.FunctionProto:
    dynamic = [dict.fromkeys(range(tensor.ndim), torch.export.Dim.AUTO) for tensor in inputs]
    try:
        with quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            program = torch.export.export(step, tuple(inputs), dynamic_shapes=(tuple(dynamic),), strict=False)
            exported = torch.onnx.export(program, (), dynamo=True, optimize=True, verbose=False)
        assert exported is not None
    except Exception as error:  # what the exporters raise is not documented
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        raise ExportError(f"{call.config.variant} cannot be exported to ONNX: {reason}") from error
    return _as_function(exported.model)


def _as_function(model: ir.Model) -> onnx.FunctionProto:
    """The body of a function from an exported graph: its constants become nodes, and values have plain names."""
    graph = ir.to_proto(model).graph
    if model.functions:
        raise ExportError(f"its ONNX graph needs functions of its own: {', '.join(str(key[1]) for key in model.functions)}")
    names: dict[str, str] = {}
    for index, info in enumerate(graph.input):
        names[info.name] = f"in_{index}"
    constants = [onnx.helper.make_node("Constant", [], [tensor.name], value=_nameless(tensor)) for tensor in graph.initializer]
    nodes = _products([*constants, *graph.node])
    nodes = _without_zero_biases(nodes, {info.name for info in graph.output})
    given = set(names)
    outputs = []
    for index, info in enumerate(graph.output):
        if info.name in given or info.name in outputs:  # what is handed on as it is
            nodes.append(onnx.helper.make_node("Identity", [info.name], [f"out_{index}"]))
            outputs.append(f"out_{index}")
        else:
            outputs.append(info.name)
    for index, node in enumerate(nodes):
        for place, name in enumerate(node.output):
            names[name] = f"v_{index}" if not place else f"v_{index}_{place}"
    function = onnx.FunctionProto()
    for node in nodes:
        clean = function.node.add()
        clean.op_type, clean.domain = node.op_type, node.domain
        clean.input.extend(names.get(name, name) for name in node.input)
        clean.output.extend(names[name] for name in node.output)
        clean.attribute.extend(node.attribute)
    function.input.extend(names[info.name] for info in graph.input)
    function.output.extend(names[name] for name in outputs)
    function.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items() if not domain)
    return function


def _products(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """A product of rows as one of any number of dimensions is written, so that both are one body: a Gemm needs a bias before opset 11."""
    found: list[onnx.NodeProto] = []
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        plain = attributes.get("alpha", 1.0) == 1.0 and not attributes.get("transA", 0)
        if node.op_type != "Gemm" or len(node.input) != 2 or not plain:
            found.append(node)
            continue
        left, right = node.input
        if attributes.get("transB", 0):
            found.append(onnx.helper.make_node("Transpose", [right], [f"{node.output[0]}.transposed"], perm=[1, 0]))
            right = f"{node.output[0]}.transposed"
        found.append(onnx.helper.make_node("MatMul", [left, right], [node.output[0]]))
    return found


def _without_zero_biases(nodes: list[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    """The exporter gives a convolution without bias one of zeros, of a size that it computes."""
    made = {name: node for node in nodes for name in node.output}

    def zero(name: str) -> bool:
        node = made.get(name)
        if node is not None and node.op_type == "Expand":
            return zero(node.input[0])
        return node is not None and node.op_type == "Constant" and not onnx.numpy_helper.to_array(node.attribute[0].t).any()

    for node in nodes:
        if node.op_type == "Conv" and len(node.input) == 3 and zero(node.input[2]):
            del node.input[2:]
    kept: list[onnx.NodeProto] = []
    needed = set(outputs)
    for node in reversed(nodes):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    return kept[::-1]


def _nameless(tensor: onnx.TensorProto) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.ClearField("name")
    return copy


# Older opsets


def _since(node: onnx.NodeProto) -> int:
    if node.op_type in _STEADY:
        return _STEADY[node.op_type]
    return int(onnx.defs.get_schema(node.op_type, MADE_IN, node.domain).since_version)


def _older(function: onnx.FunctionProto, opset: int) -> None:
    """Write nodes as they were before opset 13: whole numbers of a Constant as a tensor, the bounds of a Slice as attributes."""
    constants: dict[str, onnx.TensorProto] = {}
    for node in function.node:
        if node.op_type == "Constant":
            attribute = node.attribute[0]
            if attribute.name in ("value_ints", "value_int"):
                array = list(attribute.ints) if attribute.name == "value_ints" else attribute.i
                tensor = onnx.numpy_helper.from_array(np.asarray(array, np.int64))
                node.ClearField("attribute")
                node.attribute.append(onnx.helper.make_attribute("value", tensor))
            elif attribute.name in ("value_float", "value_floats"):
                array = list(attribute.floats) if attribute.name == "value_floats" else attribute.f
                node.ClearField("attribute")
                node.attribute.append(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(np.asarray(array, np.float32))))
            constants[node.output[0]] = node.attribute[0].t
        elif node.op_type == "Reshape":
            for attribute in [a for a in node.attribute if a.name == "allowzero"]:
                node.attribute.remove(attribute)
        elif node.op_type == "Slice" and opset < 10:
            for name, value in zip(("starts", "ends", "axes"), list(node.input)[1:4], strict=False):
                node.attribute.append(onnx.helper.make_attribute(name, onnx.numpy_helper.to_array(constants[value]).reshape(-1).tolist()))
            del node.input[1:]


# Bodies on disk


def cache_folder() -> Path | None:
    """Where bodies are kept; None for nowhere."""
    given = os.environ.get(_CACHE)
    if given == "0":
        return None
    base = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "laurel_rewrite"
    return base / "functions"


def _cached(key: str) -> onnx.FunctionProto | None:
    """A body that was kept whole; what is torn is made anew."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        data = (folder / f"{key}.onnx").read_bytes()
    except OSError:
        return None
    digest, content = data[:32], data[32:]
    if hashlib.sha256(content).digest() != digest:
        return None
    function = onnx.FunctionProto()
    function.ParseFromString(content)
    return function


def _keep(key: str, function: onnx.FunctionProto) -> None:
    folder = cache_folder()
    if folder is None:
        return
    content = function.SerializeToString(deterministic=True)
    with contextlib.suppress(OSError):  # a folder that cannot be written is no reason to fail
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{key}.{os.getpid()}"
        part.write_bytes(hashlib.sha256(content).digest() + content)
        part.replace(folder / f"{key}.onnx")
