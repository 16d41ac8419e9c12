"""LAuReL(x, f, states; w)  ->  sum_k alpha_k f_k + sum_m beta_m s_m + U [V_j s_j]_j, with numbers for alpha, beta, U and V.

s_0 = x. alpha = a; beta_0 = b (and b (1 + g_0) where h is the identity); b and g go into U and V. Where the lags share one map,
U V sum_j g_j s_j is U sum_j (g_j V) s_j: all that is added has r features. Where each has its own, their inner features are
concatenated, and one U serves them.

Condition: the parameters are initializers. The result is one `Affine` node a LAuReL node, which the passes after this one simplify and
`ExpandLaurel` writes in standard ops. Only where a weighted branch is a constant itself, the weights of a fused convolution for
instance, is it a constant again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from laurel_rewrite.errors import ExportError
from laurel_rewrite.operators.config import SiteConfig
from laurel_rewrite.operators.onnx_function import BRANCH, DOMAIN, FORM, FunctionForm, parameter_names
from laurel_rewrite.passes.algebra import Editor, bears, constant_of, scaled
from laurel_rewrite.passes.base import PassResult
from laurel_rewrite.passes.onnx_pass import OnnxPass

AFFINE_DOMAIN = "laurel_rewrite.lowering"
AFFINE = "Affine"


@dataclass
class Affine:
    """The numbers of an `Affine` node, whose inputs are the branches f_k and then the states s_m, the skip first.

    Attributes:
        alphas: weights of the branches.
        betas: weights of the states; None where only the low-rank maps read a state.
        downs: (m, V_j): state and map, of shape [r, D].
        up: U, [D, r] where the maps share it (`shared`), else [D, r * number of downs]; None where there is no low-rank map.
        axis: feature axis, -1 or 1.
        ndim: of the stream.
    """

    alphas: list[float] = field(default_factory=list)
    betas: list[float | None] = field(default_factory=list)
    downs: list[tuple[int, np.ndarray]] = field(default_factory=list)
    up: np.ndarray | None = None
    shared: bool = False
    axis: int = -1
    ndim: int = 3

    def multiply(self, factor: float) -> None:
        """Multiply the node's output."""
        self.alphas = [alpha * factor for alpha in self.alphas]
        self.betas = [beta if beta is None else beta * factor for beta in self.betas]
        self.up = self.up * factor if self.up is not None else None


Forms = dict[ir.Node, Affine]


def same(left: float, right: float) -> bool:
    """Equal but for the rounding of float64: weights that are multiplied and divided come back to 1 no nearer."""
    return math.isclose(left, right, rel_tol=1e-9)


class EvaluateLaurel(OnnxPass):
    """Replace LAuReL's function nodes by `Affine` nodes, in place.

    Args:
        forms: receives the linear form of each `Affine` node.

    Raises:
        ExportError: the parameters of a LAuReL node are no initializers, or its function does not say its form.
    """

    def __init__(self, forms: Forms) -> None:
        self.forms = forms

    def requires(self, graph: ir.Model) -> None:
        for node in _laurels(graph):
            function = graph.functions[node.op_identifier()]
            if FORM not in function.metadata_props or any(value is None for value in node.inputs):
                raise ExportError(
                    f"{node.name}: the function {function.name} does not say what it computes. Was another tool at this file?"
                )
            parameters = node.inputs[len(node.inputs) - len(_wanted(node, graph)) :]
            if any(value is None or value.const_value is None for value in parameters):
                raise ExportError(f"{node.name}: the LAuReL parameters are no constants, and cannot be lowered.")

    def call(self, graph: ir.Model) -> PassResult[ir.Model]:
        nodes, editor = _laurels(graph), Editor(graph)
        for node in nodes:
            form, operands = _evaluated(node, graph)
            weights = constant_of(operands[0]) if not form.betas else None
            if weights is not None and bears(weights, form.alphas[0]):
                product = editor.constant(f"{operands[0].name}.scaled", scaled(weights, form.alphas[0]))
                ir.convenience.replace_all_uses_with(node.outputs[0], product)
                graph.graph.remove(node, safe=True)
                continue
            new = ir.Node(AFFINE_DOMAIN, AFFINE, operands, num_outputs=1, name=node.name)
            new.metadata_props.update(node.metadata_props)
            before, after = node.outputs[0], new.outputs[0]
            after.name, after.type, after.shape = before.name, before.type, before.shape
            graph.graph.insert_before(node, new)
            ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
            graph.graph.remove(node, safe=True)
            self.forms[new] = form
        for identifier in [key for key in graph.functions if key[0] == DOMAIN]:
            del graph.functions[identifier]
        graph.opset_imports.pop(DOMAIN, None)
        return PassResult(graph, tuple(str(node.name) for node in nodes))


def _laurels(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == DOMAIN]


def _form(node: ir.Node, model: ir.Model) -> FunctionForm:
    return FunctionForm.from_json(model.functions[node.op_identifier()].metadata_props[FORM])


def _wanted(node: ir.Node, model: ir.Model) -> list[str]:
    return ["mix"] if node.op_type.endswith(BRANCH) else parameter_names(_form(node, model).config)


def _evaluated(node: ir.Node, model: ir.Model) -> tuple[Affine, list[ir.Value]]:
    """The numbers behind a function node, in float64, and its branches and states."""
    form, names = _form(node, model), _wanted(node, model)
    config = form.config
    inputs = [value for value in node.inputs if value is not None]
    operands, given = inputs[: len(inputs) - len(names)], inputs[len(inputs) - len(names) :]
    tensors = {name: value.const_value for name, value in zip(names, given, strict=True)}
    parameters = {name: np.asarray(tensor.numpy(), np.float64) for name, tensor in tensors.items() if tensor is not None}
    a, b = _weights(config, parameters.get("mix"))
    result = Affine(axis=config.axis, ndim=config.ndim)
    if node.op_type.endswith(BRANCH):
        result.alphas = [a]
        return result, operands
    skip, branches, past = operands[0], operands[1 : 1 + form.branches], operands[1 + form.branches :]
    result.alphas, result.betas = [a] * len(branches), [b] + [None] * len(past)

    def matrix(name: str) -> np.ndarray:
        return parameters[name].reshape(parameters[name].shape[:2])

    if config.lags and not config.maps:
        result.betas = [b * float(parameters["g"][lag]) + (0.0 if m else b) for m, lag in enumerate(form.lags)]
    elif {"lr", "pa"} <= config.terms:
        result.downs = [(m, matrix(f"down.{lag}.weight")) for m, lag in enumerate(form.lags)]
        result.up = np.concatenate([b * parameters["g"][lag] * matrix(f"up.{lag}.weight") for lag in form.lags], axis=1)
    elif config.maps:
        scales = parameters["g"] if config.lags else np.ones(1)
        result.downs = [(m, scales[lag] * matrix("down.weight")) for m, lag in enumerate(form.lags)]
        result.up, result.shared = b * matrix("up.weight"), True
    return result, [*branches, skip, *past]


def _weights(config: SiteConfig, mix: np.ndarray | None) -> tuple[float, float]:
    """a and b; see `laurel_rewrite.operators.laurel.weights`."""
    if mix is None:
        return 1.0, 1.0
    if config.normalize == "sigmoid":
        a = 2 / (1 + np.exp(-mix[0]))
        return float(a), float(2 - a)
    both = 1 + mix
    if config.normalize != "none":
        both = np.exp(mix - mix.max())
        both *= (2 if config.normalize == "softmax" else 1) / both.sum()
    return float(both[0]), float(both[1])
