"""Affine  ->  standard ops, written so that onnxruntime's fusions find every sum.

z = f_1 + (U V x + x): the last op is a plain Add of two full tensors (so SkipLayerNormalization, and Conv with Add, still fuse); U V x is two
1x1 convolutions where the features are axis 1, whose second takes + x into itself, and two skinny products elsewhere. With NCHW the
rank is padded with zeros to a multiple of 16, the block of onnxruntime's blocked layout: a smaller rank falls out of it. A weight that is
still not 1 becomes one Mul, by a [1, C, 1, 1] constant in NCHW, which keeps the convolutions fused, and by a scalar elsewhere.
A map that is still 0, at its start, stays: the graph has the ops that the trained one will have.

(U k) (V / k): where U or V leaves the range of its type, in which b, g and the scale of the stream went into them, they share the excess.
In float64, for which onnxruntime has no convolution, the maps of axis 1 are products with [B, C, positions].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from laurel_rewrite.errors import ExportError
from laurel_rewrite.operators.affine import Affine, Weight, same
from laurel_rewrite.passes.algebra import Editor, fits
from laurel_rewrite.passes.base import PassResult
from laurel_rewrite.passes.evaluate_laurel import AFFINE_DOMAIN, Forms
from laurel_rewrite.passes.onnx_pass import OnnxPass

BLOCK = 16  # channels


class ExpandLaurel(OnnxPass):
    """Write `Affine` nodes in standard ops, in place.

    Args:
        forms: the linear form of each.
        pad: whether to pad ranks to the block size.
    """

    def __init__(self, forms: Forms, *, pad: bool = True) -> None:
        self.forms = forms
        self.pad = pad

    def call(self, graph: ir.Model) -> PassResult[ir.Model]:
        changed, editor = [], Editor(graph)
        for node, form in list(self.forms.items()):
            writer = _Writer(editor, node, form, pad=self.pad)
            output, before = writer.write(), node.outputs[0]
            if output.producer() in writer.written and output is not before:
                output.name, output.type, output.shape = before.name, before.type, before.shape
            elif before.is_graph_output():  # nothing is left to compute, and a graph's output has its own name
                output = writer.op("Identity", output)
                output.name, output.type, output.shape = before.name, before.type, before.shape
            ir.convenience.replace_all_uses_with(before, output, replace_graph_outputs=True)
            assert node.graph is not None
            node.graph.remove(node, safe=True)
            del self.forms[node]
            changed.append(str(node.name))
        return PassResult(graph, tuple(changed))

    def ensures(self, result: PassResult[ir.Model]) -> None:
        super().ensures(result)
        if any(node.domain == AFFINE_DOMAIN for node in result.graph_module.graph.all_nodes()):
            raise ExportError("A LAuReL node was left behind by the lowering.")


class _Writer:
    def __init__(self, editor: Editor, node: ir.Node, form: Affine, *, pad: bool) -> None:
        self.editor, self.node, self.form, self.pad = editor, node, form, pad
        self.written: list[ir.Node] = []
        operands = [value for value in node.inputs if value is not None]
        self.branches, self.states = operands[: len(form.alphas)], operands[len(form.alphas) :]
        self.like = operands[0]
        self.dtype = self.like.dtype or ir.DataType.FLOAT
        self.flat = form.axis == 1 and self.dtype == ir.DataType.DOUBLE

    def write(self) -> ir.Value:
        form = self.form
        kept = [self.weighted(value, weight) for value, weight in zip(self.states, form.betas, strict=True) if weight is not None]
        total = kept[0] if kept else None
        if form.up is not None:
            low = self.low_rank(form.up)
            total = self.op("Add", low, total) if total is not None else low
        for value in kept[1:]:
            assert total is not None
            total = self.op("Add", total, value)
        for value, weight in zip(self.branches, form.alphas, strict=True):
            branch = self.weighted(value, weight)
            total = self.op("Add", branch, total) if total is not None else branch
        assert total is not None
        return total

    def weighted(self, value: ir.Value, weight: Weight) -> ir.Value:
        if same(weight, 1.0):
            return value
        if isinstance(weight, np.ndarray):
            ones = (1,) * (self.form.ndim - 2) if self.form.axis == 1 else ()
            return self.op("Mul", value, self.constant("weight", weight.reshape(-1, *ones)))
        size = value.shape[1] if self.form.axis == 1 and value.shape is not None else None
        shape = (1, size, *(1 for _ in range(self.form.ndim - 2))) if isinstance(size, int) else ()
        return self.op("Mul", value, self.constant("weight", np.full(shape, weight)))

    def low_rank(self, up: np.ndarray) -> ir.Value:
        """U [V_j s_j]_j."""
        form = self.form
        rank = form.downs[0][1].shape[0]
        padding = -rank % BLOCK if self.pad and form.axis == 1 and not self.flat else 0
        blocks = [up] if form.shared else np.split(up, len(form.downs), axis=1)
        downs = [down for _, down in form.downs]
        if form.shared:
            blocks, downs = self.balanced(blocks, downs)
        else:
            pairs = [self.balanced([block], [down]) for block, down in zip(blocks, downs, strict=True)]
            blocks, downs = [pair[0][0] for pair in pairs], [pair[1][0] for pair in pairs]
        blocks = [np.pad(block, ((0, 0), (0, padding))) for block in blocks]
        downs = [np.pad(down, ((0, padding), (0, 0))) for down in downs]
        states = [self.flattened(self.states[m]) for m, _ in form.downs]
        parts = [self.product(state, down, f"down.{m}") for state, down, (m, _) in zip(states, downs, form.downs, strict=True)]
        inner = parts[0]
        if form.shared:
            for part in parts[1:]:
                inner = self.op("Add", part, inner)
        elif len(parts) > 1:
            inner = self.op("Concat", *parts, axis=form.axis)
        result = self.product(inner, np.concatenate(blocks, axis=1), "up")
        return self.op("Reshape", result, self.shape_of(self.like), like=self.like) if self.flat else result

    def balanced(self, ups: list[np.ndarray], downs: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """U k and V / k, with a power of two for k, where one of them does not fit its type."""
        if all(fits(matrix, self.dtype) for matrix in (*ups, *downs)):
            return ups, downs
        up, down = (max(float(np.abs(matrix).max(initial=0.0)) for matrix in side) for side in (ups, downs))
        k = 2.0 ** round(math.log2(down / up) / 2) if up and down else 1.0
        return [matrix * k for matrix in ups], [matrix / k for matrix in downs]

    def product(self, value: ir.Value, matrix: np.ndarray, name: str) -> ir.Value:
        """matrix times the features of a value."""
        if self.flat:
            return self.op("MatMul", self.constant(name, matrix), value, like=value)
        if self.form.axis == 1:
            return self.op("Conv", value, self.constant(name, matrix.reshape(*matrix.shape, *(1 for _ in range(self.form.ndim - 2)))))
        return self.op("MatMul", value, self.constant(name, matrix.T))

    def flattened(self, value: ir.Value) -> ir.Value:
        """[B, C, positions] where products need it."""
        return self.op("Reshape", value, self.editor.constant(f"{self.node.name}.flat", np.array([0, 0, -1]))) if self.flat else value

    def shape_of(self, value: ir.Value) -> ir.Value:
        size = self.op("Shape", value)
        size.dtype, size.shape = ir.DataType.INT64, ir.Shape([self.form.ndim])
        return size

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(np.ascontiguousarray(array.astype(self.dtype.numpy())), dtype=self.dtype)
        return self.editor.constant(f"{self.node.name}.{name}", tensor)

    def op(self, kind: str, *inputs: ir.Value, like: ir.Value | None = None, **attributes: int) -> ir.Value:
        name = f"{self.node.name}/{kind}_{len(self.written)}"
        output = self.editor.insert(self.node, kind, inputs, name, like=like or self.like, attributes=attributes)
        output.shape = self._shape(kind, inputs) if like is None else like.shape
        node = output.producer()
        assert node is not None
        node.metadata_props.update(self.node.metadata_props)
        self.written.append(node)
        return output

    def _shape(self, kind: str, inputs: Sequence[ir.Value]) -> ir.Shape | None:
        """Of what an op gives, which other tools' fusions ask for: that of its first operand, but for the features of a product."""
        if inputs[0].shape is None or kind in ("Reshape", "Shape"):
            return None
        shape = list(inputs[0].shape)
        if kind == "Concat":
            shape[self.form.axis] = sum(value.shape[self.form.axis] for value in inputs)  # type: ignore[index,misc]  # ranks, which are known
        elif kind in ("Conv", "MatMul"):
            weights = inputs[1].shape
            assert weights is not None
            shape[self.form.axis] = weights[0 if kind == "Conv" else 1]
        return ir.Shape(shape)
