"""FLOPs of ops with products, two a multiply-add, from the shapes of what they read and write.

A trace names the shapes of an op's inputs without those that are left out and those whose weights onnxruntime has packed, so that they
stand at other positions. The shapes are therefore those of the values: of weights from the file, of others from the op that gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from laurel_rewrite.profiling.traces import CONTAINERS, Trace

Shape = Sequence[int]
Formula = Callable[[Sequence[Shape], Sequence[Shape], ir.Node], int]
"""Shapes of inputs and outputs by position, and the node. A shape that is missing or does not fit raises IndexError or ValueError."""

_MISSING: Shape = ()


def count_flops(graph: ir.Model, trace: Trace, feeds: Mapping[str, np.ndarray]) -> dict[str, int | None]:
    """FLOPs of each op with products that ran, by the name in the trace; None where they are not known.

    Args:
        graph: as onnxruntime ran it.
        trace: of these runs.
        feeds: inputs of the runs.
    """
    shapes: dict[str, Shape] = {name: array.shape for name, array in feeds.items()}
    for value in graph.graph.initializers.values():
        if value.const_value is not None:
            shapes[str(value.name)] = value.const_value.shape.numpy()
    nodes = {node.name: node for node in graph.graph}
    for name, traced in trace.nodes.items():
        given = [output.name for output in nodes[name].outputs if output.name] if name in nodes else []
        if len(given) == len(traced.outputs):
            shapes |= {str(output): shape for output, shape in zip(given, traced.outputs, strict=True)}
    return {
        name: _count(nodes.get(name), traced.op, shapes) for name, traced in trace.nodes.items() if _multiplies(nodes.get(name), traced.op)
    }


def _multiplies(node: ir.Node | None, op: str) -> bool:
    """Whether an op has products, or may have: of those of other domains than ONNX's, only these are known to have none."""
    if op in PRODUCTS or op in _UNKNOWN:
        return True
    if node is None:
        return False
    if op in CONTAINERS:
        return any(_multiplies(inner, inner.op_type) for inner in _inside(node))
    return node.domain not in ("", "ai.onnx") and op not in _PLAIN


def _count(node: ir.Node | None, op: str, shapes: Mapping[str, Shape]) -> int | None:
    if node is None or op not in PRODUCTS:
        return None
    inputs = [shapes.get(str(value.name), _MISSING) if value is not None else _MISSING for value in node.inputs]
    outputs = [shapes.get(str(value.name), _MISSING) for value in node.outputs]
    try:
        return PRODUCTS[op](inputs, outputs, node)
    except (IndexError, ValueError, KeyError):  # a shape or an attribute is missing, or does not fit
        return None


def _inside(node: ir.Node) -> list[ir.Node]:
    """The nodes in a node's subgraphs, at any depth."""
    graphs = [attribute.as_graph() for attribute in node.attributes.values() if attribute.type == ir.AttributeType.GRAPH]
    return [inner for graph in graphs for inner in graph.all_nodes()]


# Products of matrices


def _matmul(inputs: Sequence[Shape], outputs: Sequence[Shape], node: ir.Node) -> int:
    """[..., K] by a matrix, or [..., K, M] where the first is transposed."""
    return 2 * math.prod(outputs[0]) * inputs[0][-2 if node.attributes.get_int("transA", 0) else -1]


def _gemm(inputs: Sequence[Shape], outputs: Sequence[Shape], node: ir.Node) -> int:
    return 2 * math.prod(_given(inputs[0])) * outputs[0][1]  # whichever way the first is stored


def _einsum(inputs: Sequence[Shape], outputs: Sequence[Shape], node: ir.Node) -> int:
    """One product of two operands; where no letter is summed over, it is none of matrices."""
    terms, _, result = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    letters = terms.split(",")
    if len(letters) == 1:
        return 0
    if len(letters) > 2 or "." in terms or not result:
        raise ValueError
    sizes = {letter: size for term, shape in zip(letters, inputs, strict=True) for letter, size in zip(term, _given(shape), strict=True)}
    return 2 * math.prod(sizes.values()) if set(sizes) - set(result) else 0


def _recurrent(inputs: Sequence[Shape], outputs: Sequence[Shape], node: ir.Node) -> int:
    """[S, batch, D] by the weights of inputs and of states, [directions, gates, D] and [directions, gates, H], at every position."""
    if len(inputs) > 4 and node.inputs[4] is not None:  # some sequences are shorter
        raise ValueError
    steps = math.prod(_given(inputs[0])[:2])
    return 2 * steps * (math.prod(_given(inputs[1])) + math.prod(_given(inputs[2])))


# Convolutions


def _conv(weight: int) -> Formula:
    """A weight [C_out, C_in / groups, ...] at every number of the output."""

    def count(inputs: Sequence[Shape], outputs: Sequence[Shape], node: ir.Node) -> int:
        return 2 * math.prod(_given(outputs[0])) * math.prod(_given(inputs[weight])[1:])

    return count


def _conv_transpose(inputs: Sequence[Shape], outputs: Sequence[Shape], node: ir.Node) -> int:
    return 2 * math.prod(_given(inputs[0])) * math.prod(_given(inputs[1])[1:])


# Attention: the product of queries and keys, and that of its result and the values. Masked pairs count as the others.


def _attention(inputs: Sequence[Shape], outputs: Sequence[Shape], node: ir.Node) -> int:
    """ONNX's: queries [..., S, features]; keys and values with those of `past_key`, [..., T, features], before them."""
    if len(_given(inputs[1])) == 2:
        return _projected(4)(inputs, outputs, node)
    keys = inputs[1][-2] + _length(inputs, node, 4)
    return 2 * keys * (math.prod(_given(inputs[0])) + math.prod(_given(outputs[0])))


def _projected(past: int) -> Formula:
    """onnxruntime's own: [batch, S, D] by [D, D_q + D_k + D_v], whose result attends to itself and to `past`, [2, batch, heads, T, size]."""

    def count(inputs: Sequence[Shape], outputs: Sequence[Shape], node: ir.Node) -> int:
        (batch, length, _), (_, width) = inputs[0], inputs[1]
        values = outputs[0][-1]
        queries = (width - values) // 2
        if node.attributes.get_int("past_present_share_buffer", 0):  # of the cache, an unknown part is used
            raise ValueError
        pairs = batch * length * (length + _length(inputs, node, past))
        return 2 * math.prod(inputs[0]) * width + 2 * pairs * (queries + values)

    return count


def _multi_head(inputs: Sequence[Shape], outputs: Sequence[Shape], node: ir.Node) -> int:
    """Queries [batch, S, D], or [batch, S, heads, 3, size] with keys and values; keys [batch, T, D], [batch, heads, T, size] or
    [batch, T, heads, 2, size] with values; `past_key` before them, [batch, heads, T, size]."""
    query = _given(inputs[0])
    batch, length = query[:2]
    width = math.prod(query) // (batch * length * (3 if len(query) == 5 else 1))
    keys = length if len(query) == 5 else inputs[1][2 if len(inputs[1]) == 4 else 1]
    if len(node.inputs) > 8 and node.inputs[8] is not None:  # of the cache, a part that this value says is used
        raise ValueError
    return 2 * batch * length * (keys + _length(inputs, node, 6)) * (width + outputs[0][-1])


def _grouped(inputs: Sequence[Shape], outputs: Sequence[Shape], node: ir.Node) -> int:
    """Every query [batch, S, heads * size] to all of `present_key`, [batch, key heads, T, size], which must be the past and the new."""
    batch, length, width = outputs[0]
    keys, past = outputs[1][2], _length(inputs, node, 3)
    window = node.attributes.get_int("local_window_size", -1)
    if keys != past + length or 0 < (window or 0) < keys:
        raise ValueError
    return 4 * batch * length * keys * width


def _given(shape: Shape) -> Shape:
    """A shape that is known, of a value that is no scalar."""
    if not shape:
        raise ValueError
    return shape


def _length(inputs: Sequence[Shape], node: ir.Node, position: int) -> int:
    """Length of an optional cache, [..., T, size]."""
    if position >= len(node.inputs) or node.inputs[position] is None:
        return 0
    return inputs[position][-2]


PRODUCTS: Mapping[str, Formula] = {
    **dict.fromkeys("MatMul FusedMatMul FusedMatMulActivation TransposeMatMul GemmFastGelu".split(), _matmul),
    **dict.fromkeys("MatMulInteger MatMulInteger16 MatMulIntegerToFloat DynamicQuantizeMatMul QLinearMatMul".split(), _matmul),
    **dict.fromkeys("MatMulNBits MatMulBnb4 MatMulFpQ4".split(), _matmul),
    **dict.fromkeys("Gemm FusedGemm QGemm".split(), _gemm),
    **dict.fromkeys("Conv FusedConv NhwcConv NhwcFusedConv ConvInteger DeformConv".split(), _conv(1)),
    "QLinearConv": _conv(3), "ConvTranspose": _conv_transpose,
    "Einsum": _einsum, **dict.fromkeys("LSTM GRU RNN DynamicQuantizeLSTM".split(), _recurrent),
    "Attention": _attention, "QAttention": _projected(8), "MultiHeadAttention": _multi_head, "GroupQueryAttention": _grouped,
}  # fmt: skip
_UNKNOWN = frozenset("LinearAttention CausalConvWithState SVMClassifier SVMRegressor".split())
"""Ops with products whose FLOPs are not known here; so are those of other domains than ONNX's that are in neither list."""
_PLAIN = frozenset(
    "BiasAdd BiasDropout BiasGelu BiasSoftmax BiasSplitGelu BitmaskBiasDropout BitmaskDropout BranchwiseRMSNorm ComplexMul ComplexMulConj "
    "CropAndResize DequantizeBFP DequantizeLinear DequantizeWithOrder EmbedLayerNormalization ExpandDims FastGelu GatedAdd GatedRMSNorm "
    "GatherBlockQuantized GatherND Gelu GemmaRotaryEmbedding GridSample GroupNorm Irfft IsAllFinite MRotaryEmbedding MaxpoolWithMask MulInteger "
    "MurmurHash3 NGramRepeatBlock NhwcMaxPool Pad QEmbedLayerNormalization QLinearAdd QLinearAveragePool QLinearConcat QLinearGlobalAveragePool "
    "QLinearLeakyRelu QLinearMul QLinearReduceMean QLinearSigmoid QLinearSoftmax QLinearWhere QOrderedGelu QOrderedLayerNormalization QuantizeBFP "
    "QuantizeLinear QuantizeWithOrder QuickGelu Range ReduceSumInteger RelativePositionBias RemovePadding RestorePadding Rfft RotaryEmbedding "
    "ScaledSiLU SkipGroupNorm SkipLayerNormalization SkipSimplifiedLayerNormalization Tokenizer Trilu UnfoldTensor Unique".split()
)
"""Ops of onnxruntime's own that have no products of matrices."""
