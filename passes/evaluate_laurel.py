"""A function node(x, f, states; w)  ->  sum_k alpha_k f_k + sum_m beta_m s_m + U [V_j s_j]_j, with numbers for alpha, beta, U and V.

That it is linear the ops of the function say; the numbers are what the operator's own module gives with these parameters
(`laurel_rewrite.operators.probing`). What is not linear, or leaves a state behind that it computes, stays the function that it is.

Condition: the parameters are initializers. The result is one `Affine` node a function node, which the passes after this one simplify and
`ExpandLaurel` writes in standard ops. Only where a weighted branch is a constant itself, the weights of a fused convolution for
instance, is it a constant again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from laurel_rewrite.errors import ConfigError, ExportError
from laurel_rewrite.graph.from_onnx import METADATA
from laurel_rewrite.operators.affine import Affine
from laurel_rewrite.operators.onnx_function import CALL, DOMAIN, Call
from laurel_rewrite.operators.probing import linear_form
from laurel_rewrite.operators.registry import operator
from laurel_rewrite.passes.algebra import Editor, bears, constant_of, scaled
from laurel_rewrite.passes.base import PassResult
from laurel_rewrite.passes.onnx_pass import OnnxPass

AFFINE_DOMAIN = "laurel_rewrite.lowering"
AFFINE = "Affine"
Forms = dict[ir.Node, Affine]
_SUMS = frozenset("Add Sub Sum Concat".split())
_FIRST = frozenset("Identity Neg Reshape Flatten Transpose Squeeze Unsqueeze Expand Slice Gather ReduceSum ReduceMean Div".split())
_ONE_FACTOR = frozenset("Mul MatMul Gemm Conv".split())


class EvaluateLaurel(OnnxPass):
    """Replace function nodes that are linear by `Affine` nodes, in place.

    Args:
        forms: receives the linear form of each `Affine` node.

    Attributes:
        kept: nodes that stay functions.

    Raises:
        ExportError: the parameters of a node are no initializers, it does not say what it computes, or its operator is not registered here.
    """

    def __init__(self, forms: Forms) -> None:
        self.forms = forms
        self.kept: list[str] = []

    def requires(self, graph: ir.Model) -> None:
        for node in _calls(graph):
            if CALL not in node.metadata_props or any(value is None for value in node.inputs):
                raise ExportError(f"{node.name}: the node does not say what it computes. Was another tool at this file?")
            try:
                call = Call.from_json(node.metadata_props[CALL])
                operator(call.config.variant)
            except ConfigError as error:
                raise ExportError(f"{node.name}: {error}") from error
            if any(value is None or value.const_value is None for value in node.inputs[call.operand_count :]):
                raise ExportError(f"{node.name}: the LAuReL parameters are no constants, and cannot be lowered.")

    def call(self, graph: ir.Model) -> PassResult[ir.Model]:
        changed, editor = [], Editor(graph)
        for node in _calls(graph):
            call, place = Call.from_json(node.metadata_props[CALL]), node.graph
            assert place is not None
            linear = len(node.outputs) == 1 and is_linear(graph.functions[node.op_identifier()], call.operand_count)
            form = linear_form(_connection(node, call), call) if linear else None
            if form is None:
                self.kept.append(str(node.name))
                continue
            changed.append(str(node.name))
            skips = call.part != "branch"
            inputs: list[Any] = list(node.inputs[: call.operand_count])
            operands = [*inputs[skips : skips + call.branches], *inputs[:skips], *inputs[skips + call.branches :]]
            weights = constant_of(operands[0]) if not form.betas else None
            if weights is not None and isinstance(form.alphas[0], float) and bears(weights, form.alphas[0]):
                product = editor.constant(f"{operands[0].name}.scaled", scaled(weights, form.alphas[0]))
                ir.convenience.replace_all_uses_with(node.outputs[0], product)
                place.remove(node, safe=True)
                continue
            new = ir.Node(AFFINE_DOMAIN, AFFINE, operands, num_outputs=1, name=node.name)
            new.metadata_props.update({key: value for key, value in node.metadata_props.items() if key != CALL})
            before, after = node.outputs[0], new.outputs[0]
            after.name, after.type, after.shape = before.name, before.type, before.shape
            place.insert_before(node, new)
            ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
            place.remove(node, safe=True)
            self.forms[new] = form
        used = {node.op_identifier() for node in _calls(graph)}
        for identifier in [key for key in graph.functions if key[0] == DOMAIN and key not in used]:
            del graph.functions[identifier]
        if not used:
            graph.opset_imports.pop(DOMAIN, None)
        return PassResult(graph, tuple(changed))


def is_linear(function: ir.Function, operands: int) -> bool:
    """Whether all that a function does with its first inputs are sums and products with what does not depend on them."""
    data = set(function.inputs[:operands])
    for node in function:
        places = [place for place, value in enumerate(node.inputs) if value in data]
        if not places or node.op_type == "Shape":
            continue
        if node.op_type == "Cast":
            fits = ir.DataType(node.attributes["to"].as_int()).is_floating_point()
        elif node.op_type in _FIRST:
            fits = places == [0]
        else:
            fits = node.op_type in _SUMS or (node.op_type in _ONE_FACTOR and len(places) == 1)
        if not fits:
            return False
        data.update(node.outputs)
    return True


def _calls(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if node.domain == DOMAIN]


def _connection(node: ir.Node, call: Call) -> Any:
    """The module of a node with its parameters, in float64."""
    connection = operator(call.config.variant).connection(call.config, device="cpu").double().eval()
    site = node.metadata_props[f"{METADATA}site"]
    own = dict(connection.state_dict(keep_vars=True))
    for value in node.inputs[call.operand_count :]:
        assert value is not None
        assert value.const_value is not None
        name = str(value.name).removeprefix(f"{site}.")
        array = np.asarray(value.const_value.numpy())
        own[name].data = torch.from_numpy(array.astype(np.float64) if own[name].is_floating_point() else array.copy())
    return connection
