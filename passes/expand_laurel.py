"""Affine  ->  standard ops, written so that onnxruntime's fusions find every sum.

z = f_1 + (U V x + x): the last op is a plain Add of two full tensors (so SkipLayerNormalization, and Conv with Add, still fuse); U V x is two
1x1 convolutions where the features are axis 1, whose second takes + x into itself, and two skinny products elsewhere. With NCHW the
rank is padded with zeros to a multiple of 16, the block of onnxruntime's blocked layout: a smaller rank falls out of it. A weight that is
still not 1 becomes one Mul, by a [1, C, 1, 1] constant in NCHW, which keeps the convolutions fused, and by a scalar elsewhere.
A map that is still 0, at its start, stays: the graph has the ops that the trained one will have.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from laurel_rewrite.errors import ExportError
from laurel_rewrite.passes.algebra import constant
from laurel_rewrite.passes.base import Pass, PassResult
from laurel_rewrite.passes.evaluate_laurel import AFFINE_DOMAIN, Affine, Forms, same

BLOCK = 16  # channels


class ExpandLaurel(Pass[ir.Model]):
    """Write `Affine` nodes in standard ops, in place.

    Args:
        forms: the linear form of each.
        pad: whether to pad ranks to the block size.
    """

    def __init__(self, forms: Forms, *, pad: bool = True) -> None:
        self.forms = forms
        self.pad = pad

    def call(self, graph: ir.Model) -> PassResult[ir.Model]:
        changed = []
        for node, form in list(self.forms.items()):
            writer = _Writer(graph, node, form, pad=self.pad)
            output, before = writer.write(), node.outputs[0]
            if output.producer() in writer.written and output is not before:
                output.name, output.type, output.shape = before.name, before.type, before.shape
            elif before.is_graph_output():  # nothing is left to compute, and a graph's output has its own name
                output = writer.op("Identity", output)
                output.name, output.type, output.shape = before.name, before.type, before.shape
            ir.convenience.replace_all_uses_with(before, output, replace_graph_outputs=True)
            graph.graph.remove(node, safe=True)
            del self.forms[node]
            changed.append(str(node.name))
        return PassResult(graph, tuple(changed))

    def ensures(self, result: PassResult[ir.Model]) -> None:
        if any(node.domain == AFFINE_DOMAIN for node in result.graph_module.graph):
            raise ExportError("A LAuReL node was left behind by the lowering.")


class _Writer:
    def __init__(self, model: ir.Model, node: ir.Node, form: Affine, *, pad: bool) -> None:
        self.model, self.node, self.form, self.pad = model, node, form, pad
        self.written: list[ir.Node] = []
        operands = [value for value in node.inputs if value is not None]
        self.branches, self.states = operands[: len(form.alphas)], operands[len(form.alphas) :]
        self.like = operands[0]
        self.dtype = (self.like.dtype or ir.DataType.FLOAT).numpy()

    def write(self) -> ir.Value:
        form = self.form
        kept = [self.weighted(value, weight) for value, weight in zip(self.states, form.betas, strict=True) if weight is not None]
        total = kept[0] if kept else None
        if form.up is not None:
            low = self.low_rank()
            total = self.op("Add", low, total) if total is not None else low
        for value in kept[1:]:
            assert total is not None
            total = self.op("Add", total, value)
        for value, weight in zip(self.branches, form.alphas, strict=True):
            branch = self.weighted(value, weight)
            total = self.op("Add", branch, total) if total is not None else branch
        assert total is not None
        return total

    def weighted(self, value: ir.Value, weight: float) -> ir.Value:
        if same(weight, 1.0):
            return value
        size = value.shape[1] if self.form.axis == 1 and value.shape is not None else None
        shape = (1, size, *(1 for _ in range(self.form.ndim - 2))) if isinstance(size, int) else ()
        return self.op("Mul", value, self.constant("weight", np.full(shape, weight)))

    def low_rank(self) -> ir.Value:
        """U [V_j s_j]_j."""
        form = self.form
        assert form.up is not None
        rank = form.downs[0][1].shape[0]
        padding = -rank % BLOCK if self.pad and form.axis == 1 else 0
        parts = [self.product(self.states[m], np.pad(down, ((0, padding), (0, 0))), f"down.{m}") for m, down in form.downs]
        if form.shared:
            inner = parts[0]
            for part in parts[1:]:
                inner = self.op("Add", part, inner)
            return self.product(inner, np.pad(form.up, ((0, 0), (0, padding))), "up")
        inner = parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=form.axis)
        blocks = np.split(form.up, len(parts), axis=1)
        return self.product(inner, np.concatenate([np.pad(block, ((0, 0), (0, padding))) for block in blocks], axis=1), "up")

    def product(self, value: ir.Value, matrix: np.ndarray, name: str) -> ir.Value:
        """matrix times the features of a value."""
        if self.form.axis == 1:
            return self.op("Conv", value, self.constant(name, matrix.reshape(*matrix.shape, *(1 for _ in range(self.form.ndim - 2)))))
        return self.op("MatMul", value, self.constant(name, matrix.T))

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        return constant(self.model, f"{self.node.name}.{name}", np.ascontiguousarray(array.astype(self.dtype)))

    def op(self, kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        new = ir.Node("", kind, inputs, ir.convenience.convert_attributes(attributes), num_outputs=1)
        new.name = f"{self.node.name}/{kind}_{len(self.written)}"
        new.metadata_props.update(self.node.metadata_props)
        new.outputs[0].type, new.outputs[0].shape = self.like.type, self._shape(kind, inputs)
        graph = self.node.graph
        assert graph is not None
        graph.insert_before(self.node, new)
        self.written.append(new)
        return new.outputs[0]

    def _shape(self, kind: str, inputs: Sequence[ir.Value]) -> ir.Shape | None:
        """Of what an op gives, which other tools' fusions ask for: that of its first operand, but for the features of a product."""
        if inputs[0].shape is None:
            return None
        shape = list(inputs[0].shape)
        if kind == "Concat":
            shape[self.form.axis] = sum(value.shape[self.form.axis] for value in inputs)  # type: ignore[index,misc]  # ranks, which are known
        elif kind in ("Conv", "MatMul"):
            weights = inputs[1].shape
            assert weights is not None
            shape[self.form.axis] = weights[0 if kind == "Conv" else 1]
        return ir.Shape(shape)
