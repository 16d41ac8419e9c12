"""The sums of an ONNX graph made ready for LAuReL: each becomes one node whose place a LAuReL node takes, also inside a fused one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from laurel_rewrite.detection.residuals import Residual
from laurel_rewrite.errors import RewriteError
from laurel_rewrite.graph.from_onnx import OnnxSum
from laurel_rewrite.graph.ops.onnx import PRODUCT_SUMS
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.passes.insert_laurel_onnx import Feed, OnnxSite

_ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "Relu": (), "Tanh": (), "Sigmoid": (), "LeakyRelu": ("alpha",), "Elu": ("alpha",), "HardSigmoid": ("alpha", "beta"),
    "Clip": ("min", "max"),
}  # fmt: skip
"""Activations inside onnxruntime's fused products, with the attributes that their parameters are."""


class SumRewriter:
    """Prepares a graph so that each site's function node only has to take the place of one node."""

    def __init__(self, sums: Mapping[int, OnnxSum], *, split: bool) -> None:
        self.sums = sums
        self.split = split
        self.sites: list[OnnxSite] = []
        self.values: dict[str, str] = {}
        self.exact = True

    def site(
        self,
        name: str,
        residual: Residual,
        connection: Connection,
        before: str,
        reads: ir.Value | None = None,
        feeds: tuple[Feed, ...] = (),
    ) -> None:
        """A connection where the skip is added; the branches that are added further out are weighted there, so that the order of rounding stays.
        One that is not additive takes the place of the outermost add instead."""
        sums = [output for index, _ in residual.adds for output in self.sums[index].node.outputs]
        self.values |= {output.name: name for output in sums if output.name and (output.uses() or output.is_graph_output())}
        if not connection.additive:
            self._outermost(name, residual, connection, before, reads, feeds)
            return
        (inner, side), *outer = residual.adds
        place = self.sums[inner]
        if place.inside is not None and (self.split or place.inside == side):
            place = _split(place, name)
            self.exact = False
        skip = _operand(place.node, place.terms[side][0])
        if place.plain:
            self.sites.append(OnnxSite(name, place.node, skip, _branches(place.node, side), connection, before=before, reads=reads))
        else:
            holder = _placeholder(place.node, place.terms[side][0])
            self.sites.append(OnnxSite(name, holder, skip, (), connection, before=before, reads=reads))
            outer.insert(0, (inner, side))
        for index, carried in outer:
            self._weight(self.sums[index], carried, name, connection)

    def at_end(self, name: str, connection: Connection, end: ir.Value) -> ir.Value:
        """The same connection at the end of the link behind it; returns what stands for that end from there on."""
        node = end.producer()
        assert node is not None
        assert node.graph is not None
        holder = ir.Node("", "Identity", [end], num_outputs=1)
        output = holder.outputs[0]
        output.type, output.shape = end.type, end.shape
        node.graph.insert_after(node, holder)
        if end.is_graph_output():
            output.name, end.name = end.name, f"{end.name}.link"
        ir.convenience.replace_all_uses_with(end, output, replace_graph_outputs=True)
        holder.replace_input_with(0, end)
        self.sites.append(OnnxSite(name, holder, end, (), connection, before=name, link=True))
        return output

    def _outermost(
        self, name: str, residual: Residual, connection: Connection, before: str, reads: ir.Value | None, feeds: tuple[Feed, ...]
    ) -> None:
        (inner, side), (last, carried) = residual.adds[0], residual.adds[-1]
        skip = _operand(self.sums[inner].node, self.sums[inner].terms[side][0])
        branches: list[ir.Value] = []
        for index, held in residual.adds[:-1]:
            place = self.sums[index]
            branches += [_operand(place.node, p) for operand, term in enumerate(place.terms) if operand != held for p in term]
            branches += [_operand(place.node, p) for p in place.rest]
        place = self.sums[last]
        if place.inside is not None:
            inside = place.inside == carried
            place = _split(place, name)
            skip = _operand(place.node, carried) if inside and last == inner else skip
            self.exact = False
        if not place.plain:
            raise RewriteError(
                f"{name}: its sum is computed inside the {place.node.op_type} {place.node.name!r}, and {connection.config.variant} takes its "
                "place as a whole. Give the graph from before it was optimised."
            )
        branches += _branches(place.node, carried)
        self.exact = self.exact and len(branches) == 1
        self.sites.append(OnnxSite(name, place.node, skip, tuple(branches), connection, before=before, reads=reads, feeds=feeds))

    def _weight(self, place: OnnxSum, carried: int, name: str, connection: Connection) -> None:
        """What a branch brings, for every operand but the one that carries the skip."""
        if connection.keeps_branches:
            return
        positions = [position for operand, term in enumerate(place.terms) if operand != carried for position in term]
        for position in (*positions, *place.rest):
            value = _operand(place.node, position)
            holder = _placeholder(place.node, position)
            self.sites.append(OnnxSite(name, holder, None, (value,), connection))


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
