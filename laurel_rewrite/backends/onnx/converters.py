"""What onnx2torch converts an operator by: its own converters, and ours in its registry while a graph is converted.

Where both have one, ours is taken: it says what the standard says of the operator, at any size. Afterwards the registry is as it was, for
whoever else uses onnx2torch in this process.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import fx, nn

from laurel_rewrite.backends.onnx import sizes
from laurel_rewrite.backends.onnx.torch_operators import OPERATORS
from laurel_rewrite.errors import MissingPackageError
from laurel_rewrite.graph.capture import quiet
from laurel_rewrite.operators.onnx_function import DOMAIN
from laurel_rewrite.private import known_converters

TAKEN = {name: operator.sizes for name, operator in OPERATORS.items()}
"""Positions of the operands that an operator takes as sizes."""
_STANDARD = ("", "ai.onnx")
_CONSTANT = (torch.int64, torch.float32)  # what Python's numbers become again


class Computed(nn.Module):
    """A node: a function of its operands.

    Args:
        domain, operator: which function, by its name in the tables.
        attributes: of the node, by name; how many `outputs` it has where the function asks for that.
        fixed: operands that are constants or left out, by position. The others are forward's arguments.
        creates: the function makes tensors, and wants the device.
    """

    device: torch.Tensor

    def __init__(self, domain: str, operator: str, attributes: Mapping[str, Any], fixed: Mapping[int, Any], *, creates: bool) -> None:
        super().__init__()
        self.domain, self.operator, self.attributes, self.fixed, self.creates = domain, operator, dict(attributes), dict(fixed), creates
        if creates:
            self.register_buffer("device", torch.empty(0), persistent=False)  # moves where the module is moved

    def forward(self, *given: Any) -> Any:
        operands = list(given)
        for position, value in sorted(self.fixed.items()):
            operands.insert(position, value)
        device = {"device": self.device.device} if self.creates else {}
        return _function(self.domain, self.operator)(*operands, **self.attributes, **device)

    def extra_repr(self) -> str:
        return ", ".join([self.operator, *(f"{name}={value}" for name, value in self.attributes.items())])


def _function(domain: str, operator: str) -> Callable[..., Any]:
    return sizes.OPERATORS[operator] if domain == sizes.DOMAIN else OPERATORS[operator].compute


def _computed(node: Any, graph: Any) -> Any:
    """The converter of what our tables have."""
    from onnx2torch.utils.common import OnnxMapping, OperationConverterResult

    parameters = inspect.signature(_function(node.domain, node.operation_type)).parameters
    attributes = {attribute.name: _value(attribute) for attribute in node.proto.attribute}
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if unknown := [name for name in attributes if name not in parameters and not takes_any]:
        # Passed over, it would change what is computed in silence. Whoever converts makes an ExportError of this.
        raise NotImplementedError(f"{node.operation_type} with {', '.join(unknown)}")
    if "outputs" in parameters:
        attributes["outputs"] = len(node.output_values)
    taken = range(len(node.input_values)) if node.domain == sizes.DOMAIN else TAKEN[node.operation_type]
    fixed: dict[int, Any] = {}
    for position, name in enumerate(node.input_values):
        if not name:
            fixed[position] = None
        elif position in taken and name in graph.initializers:
            constant = graph.initializers[name].to_torch()
            if constant.dtype in _CONSTANT and constant.ndim <= 1:
                fixed[position] = constant.tolist()
    given = tuple(name for position, name in enumerate(node.input_values) if position not in fixed)
    module = Computed(node.domain, node.operation_type, attributes, fixed, creates="device" in parameters)
    return OperationConverterResult(module, OnnxMapping(given, node.output_values))


def _value(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    return torch.from_numpy(numpy_helper.to_array(value).copy()) if isinstance(value, onnx.TensorProto) else value


def _laurel(node: Any, graph: Any) -> Any:
    """A LAuReL node's converter: its parameters go into the module that will take its place."""
    from onnx2torch.utils.common import OnnxMapping, OperationConverterResult

    states = tuple(name for name in node.input_values if name not in graph.initializers)
    return OperationConverterResult(nn.Identity(), OnnxMapping(states, node.output_values))


def _layer_of(theirs: Callable[[Any, Any], Any], own: AbstractSet[str]) -> Callable[[Any, Any], Any]:
    """A layer where all its weights are its own; else they are operands: what nodes share, what does not train, and what the graph computes."""

    def convert(node: Any, graph: Any) -> Any:
        return (theirs if own >= set(node.input_values[1:]) else _computed)(node, graph)

    return convert


def onnx2torch() -> Any:
    """The package; MissingPackageError where it is not installed."""
    from laurel_rewrite.sources.built import declare_torchvision_ops

    if importlib.util.find_spec("onnx2torch") is None:
        raise MissingPackageError(
            "PyTorch modules of ONNX graphs need onnx2torch, which is not installed. Install it with: pip install 'laurel-rewrite[emit-torch]'"
        )
    declare_torchvision_ops()  # it imports torchvision
    with quiet():
        return importlib.import_module("onnx2torch")


class Registry:
    """onnx2torch's converters, by operator and version."""

    def __init__(self) -> None:
        self._convert = onnx2torch().convert
        module = importlib.import_module("onnx2torch.node_converters.registry")
        self._converters = known_converters(module)
        self._key, self._add = module.OperationDescription, module.add_converter

    def convert(self, proto: onnx.ModelProto) -> fx.GraphModule:
        module: fx.GraphModule = self._convert(proto, attach_onnx_mapping=True)
        return module

    @contextlib.contextmanager
    def extended(self, proto: onnx.ModelProto, trained: Collection[str] = ()) -> Iterator[None]:
        """With what this graph needs: LAuReL nodes, our operators, and newer versions of theirs that the graph uses as the older ones.

        Args:
            trained: names of the initializers that are parameters.
        """
        before = dict(self._converters)
        reads = Counter(name for node in proto.graph.node for name in node.input)
        own = {name for name in trained if reads[name] == 1}
        opset = _opset(proto)
        try:
            for node in proto.graph.node:
                if node.domain == DOMAIN:
                    self._put(_laurel, node.op_type, 1, DOMAIN)
                elif node.domain == sizes.DOMAIN:
                    self._put(_computed, node.op_type, 1, sizes.DOMAIN)
                elif node.domain in _STANDARD and (schema := _schema(node.op_type, opset)) is not None:
                    version = int(schema.since_version)
                    theirs = self._of(before, node, version)
                    if node.op_type == "Conv" and theirs is not None:
                        theirs = _layer_of(theirs, own)
                    elif node.op_type in OPERATORS and version >= OPERATORS[node.op_type].since:
                        theirs = _computed
                    if theirs is not None:
                        self._put(theirs, node.op_type, version, "")
            yield
        finally:
            self._converters.clear()
            self._converters.update(before)

    def _put(self, converter: Callable[[Any, Any], Any], name: str, version: int, domain: str) -> None:
        self._converters.pop(self._key(domain, name, version), None)  # it refuses a second one
        self._add(name, version, domain)(converter)

    def _of(self, converters: Mapping[Any, Any], node: onnx.NodeProto, version: int) -> Callable[[Any, Any], Any] | None:
        """Their converter of a version, or of an older one that has all that a node uses."""
        known = [key.version for key in converters if (key.domain, key.operation_type) == ("", node.op_type) and key.version <= version]
        newest = max(known, default=None)
        if newest is None or (newest < version and not _fits(node, onnx.defs.get_schema(node.op_type, newest, ""))):
            return None
        found: Callable[[Any, Any], Any] = converters[self._key("", node.op_type, newest)]
        return found

    def missing(self, proto: onnx.ModelProto) -> list[str]:
        """The operators of a graph that have no converter."""
        opset = _opset(proto)
        names: dict[str, None] = {}
        for node in proto.graph.node:
            schema = _schema(node.op_type, opset) if node.domain in _STANDARD else None
            version = schema.since_version if schema is not None else next(o.version for o in proto.opset_import if o.domain == node.domain)
            if self._key(node.domain, node.op_type, version) not in self._converters:
                names[f"{node.domain}::{node.op_type}".removeprefix("::")] = None
        return list(names)


def _opset(proto: onnx.ModelProto) -> int:
    return next(int(entry.version) for entry in proto.opset_import if entry.domain in _STANDARD)


def _schema(op: str, opset: int) -> Any:
    try:
        return onnx.defs.get_schema(op, max_inclusive_version=opset, domain="")
    except onnx.defs.SchemaError:
        return None


def _fits(node: onnx.NodeProto, schema: Any) -> bool:
    """Whether a node uses nothing that an older version of its operator does not have."""
    inputs = [name for name in node.input if name]
    return {a.name for a in node.attribute} <= set(schema.attributes) and len(inputs) <= schema.max_input
