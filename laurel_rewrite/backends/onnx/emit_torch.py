"""A trainable PyTorch model from a rewritten ONNX graph.

onnx2torch converts the operators; what it lacks is either a newer version of an operator that it knows, or made of others by the ONNX
standard itself. The LAuReL nodes become connections under their sites' ids.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import onnx
import onnx.inliner
import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from torch import fx, nn

from laurel_rewrite.errors import ExportError, MissingPackageError
from laurel_rewrite.graph.capture import quiet
from laurel_rewrite.graph.from_onnx import METADATA
from laurel_rewrite.operators.onnx_function import CALL, DOMAIN, Call
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.plan import Plan

_FOLDED = 1 << 30  # bytes; a graph may make its weights by ConstantOfShape
_HUGE = 1e30  # a mask's entry, no weight


def to_torch(model: ir.Model, plan: Plan) -> fx.GraphModule:
    """Convert a rewritten graph.

    Args:
        model: what `GraphRewrite.apply(plan, split=True)` left, with LAuReL as functions.
        plan: the plan.

    Returns:
        A module in train mode whose forward takes the graph's inputs by position. Its LAuReL modules lie at the ids of their sites;
        the floating-point initializers of the graph are parameters. What an export has removed, such as dropout, does not come back.

    Raises:
        MissingPackageError: onnx2torch is not installed.
        ExportError: the operators that it cannot convert, by name.
    """
    registry = _registry()
    proto = _prepared(model)
    laurels = {row.id: plan.build(row, None) for row in plan.sites}
    for name, laurel in laurels.items():
        for key, parameter in laurel.state_dict(keep_vars=True).items():
            value = model.graph.initializers.get(f"{name}.{key}")
            if value is not None and value.const_value is not None:  # else nothing reads it there
                parameter.data = torch.from_numpy(value.const_value.numpy().copy())
    with registry.extended(proto):
        missing = registry.missing(proto)
        if missing:  # the standard makes many operators of others
            with quiet():
                proto = onnx.inliner.inline_selected_functions(proto, [("", name) for name in missing], False, True)
            proto = _prepared(ir.from_proto(proto))
    with registry.extended(proto):
        missing = registry.missing(proto)
        if missing:
            raise ExportError(f"onnx2torch cannot convert {', '.join(missing)}. Without --emit-torch the ONNX graph can be rewritten.")
        try:
            with quiet():
                module = registry.convert(proto)
        except Exception as error:  # the converter's exceptions share no base class
            raise ExportError(f"onnx2torch could not convert the graph: {type(error).__name__}: {error}") from error
    nodes = {str(node.target): node for node in module.graph.nodes if node.op == "call_module"}
    for node in proto.graph.node:
        if node.domain == DOMAIN:
            properties = {entry.key: entry.value for entry in node.metadata_props}
            site = properties[f"{METADATA}site"]
            module.add_submodule(site, laurels[site])
            _place(module, nodes[f"{DOMAIN}/{node.name}"], Call.from_json(properties[CALL]), site, len(node.output))
    _weights(module, set(model.graph.initializers))
    module.delete_all_unused_submodules()
    module.graph.lint()
    module.recompile()
    return module.train()


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


def _registry() -> _Registry:
    package = onnx2torch()
    registry = importlib.import_module("onnx2torch.node_converters.registry")
    return _Registry(package.convert, registry._CONVERTER_REGISTRY, registry.OperationDescription)


class _Registry:
    """onnx2torch's converters, by operator and version."""

    def __init__(self, convert: Callable[..., fx.GraphModule], converters: dict[Any, Any], key: Callable[..., Any]) -> None:
        self._convert = convert
        self.converters = converters
        self.key = key

    def convert(self, proto: onnx.ModelProto) -> fx.GraphModule:
        return self._convert(proto, attach_onnx_mapping=True)

    @contextlib.contextmanager
    def extended(self, proto: onnx.ModelProto) -> Iterator[None]:
        """With what this graph needs: LAuReL nodes, and newer versions of known operators that it uses as the older ones."""
        before = dict(self.converters)
        opset = _opset(proto)
        for node in proto.graph.node:
            if node.domain == DOMAIN:
                self.converters[self.key(DOMAIN, node.op_type, 1)] = _placeholder
            elif node.domain in ("", "ai.onnx"):
                known = [key.version for key in before if (key.domain, key.operation_type) == ("", node.op_type)]
                schema = _schema(node.op_type, opset)
                if schema is None or schema.since_version in known:
                    continue
                older = max((version for version in known if version < schema.since_version), default=None)
                if older is not None and _fits(node, onnx.defs.get_schema(node.op_type, older, "")):
                    self.converters[self.key("", node.op_type, schema.since_version)] = before[self.key("", node.op_type, older)]
        try:
            yield
        finally:
            self.converters.clear()
            self.converters.update(before)

    def missing(self, proto: onnx.ModelProto) -> list[str]:
        """The operators of a graph that have no converter."""
        opset = _opset(proto)
        names: dict[str, None] = {}
        for node in proto.graph.node:
            schema = _schema(node.op_type, opset) if node.domain in ("", "ai.onnx") else None
            version = schema.since_version if schema is not None else next(o.version for o in proto.opset_import if o.domain == node.domain)
            if self.key(node.domain, node.op_type, version) not in self.converters:
                names[f"{node.domain}::{node.op_type}".removeprefix("::")] = None
        return list(names)


def _opset(proto: onnx.ModelProto) -> int:
    return next(int(entry.version) for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


def _schema(op: str, opset: int) -> Any:
    try:
        return onnx.defs.get_schema(op, max_inclusive_version=opset, domain="")
    except onnx.defs.SchemaError:
        return None


def _fits(node: onnx.NodeProto, schema: Any) -> bool:
    """Whether a node uses nothing that an older version of its operator does not have."""
    inputs = [name for name in node.input if name]
    return {a.name for a in node.attribute} <= set(schema.attributes) and len(inputs) <= schema.max_input


def _placeholder(node: Any, graph: Any) -> Any:
    """A LAuReL node's converter: its parameters go into the module that will take its place."""
    from onnx2torch.utils.common import OnnxMapping, OperationConverterResult

    states = tuple(name for name in node.input_values if name not in graph.initializers)
    return OperationConverterResult(nn.Identity(), OnnxMapping(states, node.output_values))


def _prepared(model: ir.Model) -> onnx.ModelProto:
    """The graph as onnx2torch takes it: constants folded, axes as attributes, no functions, names that attributes may have."""
    import onnxscript.optimizer

    model = model.clone()
    model.functions.clear()
    with quiet():
        onnxscript.optimizer.fold_constants(model, output_size_limit=_FOLDED, should_fold=_makes_weights)
        common.IdentityEliminationPass()(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common.RemoveUnusedNodesPass()(model)
    names: Counter[str] = Counter()
    for node in model.graph:
        _as_older(node)
        name = re.sub(r"\W", "_", node.name or "") or node.op_type
        names[name] += 1
        node.name = f"n_{name}" if names[name] == 1 else f"n_{name}_{names[name]}"
    return ir.to_proto(ir.external_data.load_to_model(model))


def _makes_weights(node: ir.Node) -> bool | None:
    """ConstantOfShape, which the folding leaves alone, is what some graphs have for weights."""
    return True if node.op_type == "ConstantOfShape" else None


def _as_older(node: ir.Node) -> None:
    """Write a node as the versions of its operator that onnx2torch knows have it, where that says the same.

    Reductions have their axes as an operand since opset 18 (ReduceSum, which onnx2torch knows so, since 13); a Split may say the number
    of its outputs since 18; a Reshape may make empty tensors since 14.
    """
    attributes = node.attributes
    if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and len(node.inputs) > 1:
        axes = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
        if axes is not None:
            attributes["axes"] = ir.AttrInt64s("axes", axes.numpy().tolist())
            node.replace_input_with(1, None)
        if not attributes.get_int("noop_with_empty_axes", 0):
            attributes.pop("noop_with_empty_axes", None)
    elif node.op_type == "Split" and "num_outputs" in attributes and node.inputs[0] is not None and node.inputs[0].shape is not None:
        size = node.inputs[0].shape[attributes.get_int("axis", 0) or 0]
        if isinstance(size, int) and node.graph is not None:
            count = len(node.outputs)
            part = -(-size // count)
            parts = [part] * (count - 1) + [size - part * (count - 1)]
            value = ir.Value(name=f"{node.outputs[0].name}_sizes", const_value=ir.tensor(parts, dtype=ir.DataType.INT64))
            value.const_value.name = value.name  # type: ignore[union-attr]  # set in the line above
            node.graph.register_initializer(value)
            node.resize_inputs(2)
            node.replace_input_with(1, value)
            del attributes["num_outputs"]
    elif node.op_type == "Reshape":
        attributes.pop("allowzero", None)


def _place(module: fx.GraphModule, node: fx.Node, call: Call, site: str, outputs: int) -> None:
    """A connection, or what one more branch brings, in the place of a placeholder."""
    operands = list(node.args)
    with module.graph.inserting_before(node):
        if call.part == "branch":
            new = module.graph.call_function(_branch, (module.graph.get_attr(site), operands[0]))
        elif call.part == "read":
            new = module.graph.call_function(_at_end, (module.graph.get_attr(site), *operands))
        elif outputs == 1:
            count = len(operands) - call.states - call.reads
            past: dict[str, Any] = {"past": tuple(operands[count : count + call.states])} if call.states else {}
            past |= {"n": operands[-1]} if call.reads else {}
            new = module.graph.call_module(site, tuple(operands[:count]), past)
        else:
            new = module.graph.call_function(_with_state, (module.graph.get_attr(site), call.states, call.reads, *operands))
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)


def _branch(connection: Connection, f: torch.Tensor) -> torch.Tensor:
    return connection.branch(f)


def _with_state(connection: Connection, states: int, reads: bool, *operands: torch.Tensor) -> Any:
    """The value, and what of the state is no operand: the outputs of a function node."""
    count = len(operands) - states - reads
    value, left = connection.connect(*operands[:count], state=operands[count : count + states], n=operands[-1] if reads else None)
    return _outputs(value, left, operands)


def _at_end(connection: Connection, y: torch.Tensor, *state: torch.Tensor) -> Any:
    """The same of what is read at the end of a link."""
    value, left = connection.connect_behind(y, state)
    return _outputs(value, left, (y, *state))


def _outputs(value: torch.Tensor, left: Sequence[torch.Tensor], operands: Sequence[torch.Tensor]) -> Any:
    computed = [state for state in left if not any(state is operand for operand in operands)]
    return (value, *computed) if computed else value


def _weights(module: fx.GraphModule, initializers: Container[str]) -> None:
    """The graph's initializers as parameters, those that several nodes read as one; constants and masks are buffers."""
    first: dict[str, str] = {}
    for node in module.graph.nodes:
        names = getattr(module.get_submodule(node.target), "onnx_mapping", None) if node.op == "call_module" else None
        for argument, name in zip(node.args, names.inputs if names is not None else (), strict=False):
            if isinstance(argument, fx.Node) and argument.op == "get_attr" and str(argument.target).startswith("initializers."):
                argument.target = first.setdefault(name, str(argument.target))
    read = {str(node.target).partition(".")[2] for node in module.graph.nodes if node.op == "get_attr" and node.users}
    given = {target.partition(".")[2] for name, target in first.items() if name in initializers}
    holder = module.get_submodule("initializers") if read else nn.Module()
    for name, tensor in list(holder.named_buffers()):
        weight = name in given and tensor.is_floating_point() and tensor.numel() > 1 and bool(tensor.abs().max() < _HUGE)
        if name not in read or weight:
            delattr(holder, name)
        if name in read and weight:
            holder.register_parameter(name, nn.Parameter(tensor))
