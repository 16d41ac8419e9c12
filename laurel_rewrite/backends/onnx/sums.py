"""The sums of an ONNX graph made ready for LAuReL: each becomes one node whose place a LAuReL node takes, also inside a fused one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from laurel_rewrite.detection.residuals import Residual
from laurel_rewrite.errors import RewriteError
from laurel_rewrite.graph.from_onnx import OnnxSum
from laurel_rewrite.graph.ops.onnx import PRODUCT_SUMS
from laurel_rewrite.operators.config import SiteConfig
from laurel_rewrite.passes.insert_laurel_onnx import OnnxSite

_ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "Relu": (), "Tanh": (), "Sigmoid": (), "LeakyRelu": ("alpha",), "Elu": ("alpha",), "HardSigmoid": ("alpha", "beta"),
    "Clip": ("min", "max"),
}  # fmt: skip
"""Activations inside onnxruntime's fused products, with the attributes that their parameters are."""


class SumRewriter:
    """Prepares a graph so that each site's LAuReL node only has to take the place of one node."""

    def __init__(self, sums: Mapping[int, OnnxSum], *, split: bool) -> None:
        self.sums = sums
        self.split = split
        self.sites: list[OnnxSite] = []
        self.skips: dict[str, ir.Value] = {}
        self.values: dict[str, str] = {}
        self.exact = True

    def site(
        self, name: str, residual: Residual, config: SiteConfig, past: Sequence[str], parameters: Mapping[str, ir.TensorProtocol]
    ) -> None:
        """LAuReL where the skip is added; the branches that are added further out are weighted there, so that the order of rounding stays."""
        (inner, side), *outer = residual.adds
        sums = [output for index, _ in residual.adds for output in self.sums[index].node.outputs]
        self.values |= {output.name: name for output in sums if output.name and (output.uses() or output.is_graph_output())}
        place = self.sums[inner]
        if place.inside is not None and (self.split or place.inside == side):
            place = _split(place, name)
            self.exact = False
        skip = _operand(place.node, place.terms[side][0])
        window = tuple((lag, _shaped(self.skips[earlier], skip, place.node)) for lag, earlier in enumerate(past, start=1))
        self.skips[name] = skip
        if place.plain:
            branches = _branches(place.node, side)
            self.sites.append(OnnxSite(name, place.node, skip, branches, window, config, parameters))
        else:
            holder = _placeholder(place.node, place.terms[side][0])
            self.sites.append(OnnxSite(name, holder, skip, (), window, config, parameters))
            outer.insert(0, (inner, side))
        if config.weights:
            for index, carried in outer:
                self._weight(self.sums[index], carried, name, config, parameters)

    def _weight(self, place: OnnxSum, carried: int, name: str, config: SiteConfig, parameters: Mapping[str, ir.TensorProtocol]) -> None:
        """a f for every operand but the one that carries the skip."""
        positions = [position for operand, term in enumerate(place.terms) if operand != carried for position in term]
        for position in (*positions, *place.rest):
            value = _operand(place.node, position)
            holder = _placeholder(place.node, position)
            self.sites.append(OnnxSite(name, holder, None, (value,), (), config, parameters))


def _operand(node: ir.Node, position: int) -> ir.Value:
    value = node.inputs[position]
    assert value is not None
    return value


def _branches(node: ir.Node, side: int) -> tuple[ir.Value, ...]:
    """The other operands of an Add or Sum, which adds from the left: what stands before the skip, if more than one, is added first."""
    operands = [value for value in node.inputs if value is not None]
    before, after = operands[:side], operands[side + 1 :]
    if len(before) > 1:
        before = [_before(node, "Sum", before, like=node.outputs[0])]
    return (*before, *after)


def _placeholder(node: ir.Node, position: int) -> ir.Node:
    """A node on the way into an input, for a LAuReL node to take its place."""
    value = _operand(node, position)
    output = _before(node, "Identity", [value], like=value)
    node.replace_input_with(position, output)
    producer = output.producer()
    assert producer is not None
    return producer


def _shaped(state: ir.Value, skip: ir.Value, node: ir.Node) -> ir.Value:
    """An earlier state in the shape of the skip: a stream keeps the order of its elements, not its shape."""
    if state.shape is not None and skip.shape is not None and state.shape == skip.shape:
        return state
    size = _before(node, "Shape", [skip])
    shaped = _before(node, "Reshape", [state, size], like=skip)
    shaped.type = state.type
    return shaped


def _before(node: ir.Node, op: str, inputs: Sequence[ir.Value], *, like: ir.Value | None = None, **attributes: Any) -> ir.Value:
    """The output of a new node in front of another."""
    new = ir.Node("", op, inputs, ir.convenience.convert_attributes(attributes), num_outputs=1)
    output, graph = new.outputs[0], node.graph
    if like is not None:
        output.type, output.shape = like.type, like.shape
    assert graph is not None
    graph.insert_before(node, new)
    return output


def _split(place: OnnxSum, site: str) -> OnnxSum:
    """Product, sum and activation of a fused node in nodes of their own: the skip is the product, which LAuReL has to read."""
    node = place.node
    _, added = PRODUCT_SUMS[node.op_type]
    kept = {a.name: a for a in node.attributes.values() if not a.name.startswith("activation")}
    if node.op_type.endswith("Gemm") and (kept.pop("beta").as_float() if "beta" in kept else 1.0) != 1.0:
        raise RewriteError(f"{site}: the skip of this sum is computed inside the {node.op_type} {node.name!r}, which weights its operands.")
    output = node.outputs[0]
    product = ir.Node("", node.op_type.removeprefix("Fused"), [*node.inputs[:added]], kept.values(), num_outputs=1, name=node.name)
    total = ir.Node("", "Add", [product.outputs[0], node.inputs[added]], num_outputs=1)
    for value in (product.outputs[0], total.outputs[0]):
        value.type, value.shape = output.type, output.shape
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, [product, total])
    result = _activated(node, total.outputs[0], site)
    result.type, result.shape, result.name = output.type, output.shape, output.name
    ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return OnnxSum(total, ((0,), (1,)))


def _activated(node: ir.Node, value: ir.Value, site: str) -> ir.Value:
    """The activation of a fused node behind a value, in front of that node; the value itself where it has none."""
    name = node.attributes.get_string("activation")
    if not name:
        return value
    if name not in _ACTIVATIONS:
        raise RewriteError(f"{site}: the activation {name} of {node.name!r} is unknown; give the graph before it was optimised.")
    given = list(node.attributes.get_floats("activation_params") or ())
    given += [node.attributes[key].as_float() for key in ("activation_alpha", "activation_beta") if key in node.attributes]
    parameters: dict[str, Any] = dict(zip(_ACTIVATIONS[name], given, strict=False))
    if name == "Clip":  # its bounds are operands since opset 11; these two always were
        for op, bound in (("Max", parameters["min"]), ("Min", parameters["max"])):
            constant = _before(node, "Constant", [], value=ir.tensor(bound, dtype=value.dtype))
            value = _before(node, op, [value, constant])
        return value
    return _before(node, name, [value], **parameters)
