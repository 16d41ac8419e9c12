"""A trainable PyTorch model from an ONNX graph, rewritten or not.

onnx2torch converts the operators, with ours where it lacks them (`converters`). Sizes are computed in integers (`sizes`). The LAuReL nodes
become connections under their sites' ids.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from operator import getitem
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from torch import fx, nn

from laurel_rewrite.backends.onnx.converters import TAKEN, Registry
from laurel_rewrite.backends.onnx.sizes import mark_sizes
from laurel_rewrite.errors import ExportError
from laurel_rewrite.files.onnx_weights import is_trained, sources
from laurel_rewrite.graph.capture import quiet
from laurel_rewrite.graph.from_onnx import METADATA
from laurel_rewrite.operators.onnx_function import CALL, DOMAIN, Call
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.plan import Plan

_FOLDED = 1 << 30  # bytes; a graph may make its weights by ConstantOfShape
_FILLED = f"{METADATA}filled"  # of an initializer that ConstantOfShape made


def to_torch(model: ir.Model, plan: Plan | None = None) -> fx.GraphModule:
    """Convert a graph.

    Args:
        model: what `GraphRewrite.apply(plan, split=True)` left, with LAuReL as functions; or any graph.
        plan: the plan of a rewritten graph; without one, functions are ordinary nodes.

    Returns:
        A module in train mode whose forward takes the graph's inputs by position, and gives its outputs: a tensor, or a tuple of them. Its
        LAuReL modules lie at the ids of their sites; what trained in the model that was exported is a parameter. Dynamic dimensions stay
        dynamic, for an export of the module too. What an export has removed, such as dropout, does not come back.

    Raises:
        MissingPackageError: onnx2torch is not installed.
        ExportError: the operators that it cannot convert, by name.
    """
    registry = Registry()
    laurels = {row.id: plan.build(row, None) for row in plan.sites} if plan is not None else {}
    for name, laurel in laurels.items():
        for key, parameter in laurel.state_dict(keep_vars=True).items():
            value = model.graph.initializers.get(f"{name}.{key}")
            if value is not None and value.const_value is not None:  # else nothing reads it there
                parameter.data = torch.from_numpy(value.const_value.numpy().copy())
    trained = {str(value.name) for value in model.graph.initializers.values() if is_trained(value)}
    prepared = _with_known_operators(_prepared(model, inline=plan is None), registry)
    trained |= {str(value.name) for value in prepared.graph.initializers.values() if sources(value) & trained}
    trained |= {str(value.name) for value in prepared.graph.initializers.values() if _FILLED in value.metadata_props and is_trained(value)}
    _tie(prepared)
    mark_sizes(prepared, TAKEN)
    proto = _proto(prepared)
    with registry.extended(proto, trained):
        try:
            with quiet():
                module = registry.convert(proto)
        except Exception as error:  # the converter's exceptions share no base class
            raise ExportError(f"onnx2torch could not convert the graph: {type(error).__name__}: {error}") from error
    nodes = {str(node.target): node for node in module.graph.nodes if node.op == "call_module"}
    _outputs_by_name(module, proto, nodes)
    for node in proto.graph.node:
        if node.domain == DOMAIN:
            properties = {entry.key: entry.value for entry in node.metadata_props}
            site = properties[f"{METADATA}site"]
            module.add_submodule(site, laurels[site])
            _place(module, nodes[_target(node)], Call.from_json(properties[CALL]), site, len(node.output))
    _weights(module, trained)
    module.delete_all_unused_submodules()
    module.graph.lint()
    module.recompile()
    return module.train()


def _target(node: onnx.NodeProto) -> str:
    """What onnx2torch calls the module of a node."""
    return f"{node.domain}/{node.name.replace('.', '/')}".lstrip("/")


def _with_known_operators(model: ir.Model, registry: Registry) -> ir.Model:
    """The graph with what the standard makes of others made so, where there is no converter; ExportError where there is none left."""
    proto = _proto(model)
    with registry.extended(proto):
        missing = registry.missing(proto)
    if not missing:
        return model
    with quiet():
        proto = onnx.inliner.inline_selected_functions(proto, [("", name) for name in missing], False, True)
    model = _prepared(ir.from_proto(proto), inline=False)
    proto = _proto(model)
    with registry.extended(proto):
        missing = registry.missing(proto)
    if missing:
        raise ExportError(f"onnx2torch cannot convert {', '.join(missing)}. Without --emit-torch the ONNX graph can be rewritten.")
    return model


def _prepared(model: ir.Model, *, inline: bool) -> ir.Model:
    """The graph as onnx2torch takes it: constants folded, no functions, outputs that nodes compute, names that attributes may have."""
    import onnxscript.optimizer

    model = model.clone()
    if inline:
        common.InlinePass()(model)
    model.functions.clear()
    filled = {value.name for node in model.graph if node.op_type == "ConstantOfShape" for value in node.outputs}
    with quiet():
        onnxscript.optimizer.fold_constants(model, output_size_limit=_FOLDED, should_fold=_makes_weights)
        common.IdentityEliminationPass()(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common.RemoveUnusedNodesPass()(model)
    for name in filled & set(model.graph.initializers):
        model.graph.initializers[str(name)].metadata_props[_FILLED] = ""
    for position, value in enumerate(model.graph.outputs):
        if value.producer() is None:
            node = ir.Node("", "Identity", [value], name=f"{value.name}_output")
            node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = f"{value.name}_output", value.type, value.shape
            model.graph.append(node)
            model.graph.outputs[position] = node.outputs[0]
    names: Counter[str] = Counter()
    for node in model.graph:
        name = re.sub(r"\W", "_", node.name or "") or node.op_type
        names[name] += 1
        node.name = f"n_{name}" if names[name] == 1 else f"n_{name}_{names[name]}"
    return model


def _proto(model: ir.Model) -> onnx.ModelProto:
    return ir.to_proto(ir.external_data.load_to_model(model))


def _makes_weights(node: ir.Node) -> bool | None:
    """ConstantOfShape, which the folding leaves alone, is what some graphs have for weights."""
    return True if node.op_type == "ConstantOfShape" else None


def _tie(model: ir.Model) -> None:
    """Make one parameter again of what was one: an exporter folds a matrix transposed, and once for each time that it is read."""
    initializers = model.graph.initializers
    folded: dict[str, tuple[np.ndarray, ir.Value]] = {}
    for value in list(initializers.values()):
        if len(sources(value)) != 1 or value.const_value is None:
            continue
        (name,), array = sources(value), value.const_value.numpy()
        if name not in folded:
            folded[name] = array, _transposed(model, name, value, array)
        first, stands = folded[name]
        if stands is not value and np.array_equal(array, first):
            value.replace_all_uses_with(stands)


def _transposed(model: ir.Model, name: str, value: ir.Value, array: np.ndarray) -> ir.Value:
    """A matrix as another one transposed, where the graph has that; else as it is."""
    source = model.graph.initializers.get(name)
    if source is None or source.const_value is None or array.ndim != 2 or not np.array_equal(array, source.const_value.numpy().T):
        return value
    node = ir.Node("", "Transpose", [source], [ir.AttrInt64s("perm", [1, 0])], name=f"n_{value.name}_tied")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = f"{value.name}_tied", value.type, value.shape
    model.graph.insert_before(model.graph[0], node)
    return node.outputs[0]


def _outputs_by_name(module: fx.GraphModule, proto: onnx.ModelProto, nodes: dict[str, fx.Node]) -> None:
    """Return the graph's outputs, each of them; onnx2torch returns all that the nodes give that compute one."""
    made = {name: (node, position) for node in proto.graph.node for position, name in enumerate(node.output)}
    returned = module.graph.output_node()
    results: list[fx.Node] = []
    with module.graph.inserting_before(returned):
        for value in proto.graph.output:
            node, position = made[value.name]
            result = nodes[_target(node)]
            results.append(module.graph.call_function(getitem, (result, position)) if len(node.output) > 1 else result)
    returned.args = (results[0] if len(results) == 1 else tuple(results),)


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


def _weights(module: fx.GraphModule, trained: Collection[str]) -> None:
    """The graph's initializers under their names, those that several nodes read as one: what trains is a parameter, the rest are buffers."""
    read: dict[str, str] = {}  # onnx2torch has a buffer for each reading
    for node in module.graph.nodes:
        mapping = getattr(module.get_submodule(node.target), "onnx_mapping", None) if node.op == "call_module" else None
        names = [name for name in mapping.inputs if name] if mapping is not None else []
        for operand, name in zip((*node.args, *node.kwargs.values()), names, strict=False):
            if isinstance(operand, fx.Node) and operand.op == "get_attr":
                read[str(operand.target)] = name
    held: dict[str, str] = {}
    kept = nn.Module()
    for target, name in read.items():
        if name in held:
            continue
        held[name] = _free(re.sub(r"\W", "_", name), kept)
        tensor = module.get_buffer(target)
        if name in trained:
            kept.register_parameter(held[name], nn.Parameter(tensor))
        else:
            kept.register_buffer(held[name], tensor)
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target in read:
            node.target = f"initializers.{held[read[node.target]]}"
    module.add_module("initializers", kept)


def _free(name: str, holder: nn.Module) -> str:
    """A name like this one that nothing in a module has."""
    return _free(f"{name}_", holder) if hasattr(holder, name) else name
