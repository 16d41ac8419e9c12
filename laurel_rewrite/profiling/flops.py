"""FLOPs of ops with products, two a multiply-add, from the shapes of what they read and write."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

Shape = Sequence[int]


def _matmul(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    return 2 * math.prod(outputs[0]) * inputs[0][-1]


def _gemm(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    return 2 * math.prod(inputs[0]) * outputs[0][1]  # whichever way the first is stored


def _conv(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    return 2 * math.prod(outputs[0]) * math.prod(inputs[1][1:])


def _conv_transpose(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    return 2 * math.prod(inputs[0]) * math.prod(inputs[1][1:])


def _attention(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """Two products of queries and keys, [..., S, features]; in onnxruntime's own, of [batch, S, D] and [D, 3 D], the projection too."""
    first, second = inputs[0], inputs[1]
    if len(second) == 2:
        return 2 * math.prod(first) * second[1] + 4 * math.prod(outputs[0]) * first[1]
    return 4 * math.prod(first) * second[-2]


PRODUCTS: Mapping[str, Callable[[Sequence[Shape], Sequence[Shape]], int]] = {
    "MatMul": _matmul, "FusedMatMul": _matmul, "MatMulInteger": _matmul, "QLinearMatMul": _matmul, "MatMulNBits": _matmul,
    "Gemm": _gemm, "FusedGemm": _gemm,
    "Conv": _conv, "FusedConv": _conv, "ConvInteger": _conv, "ConvTranspose": _conv_transpose,
    "QLinearConv": lambda inputs, outputs: _conv((inputs[0], inputs[3]), outputs),
    "MultiHeadAttention": _attention, "Attention": _attention,
}  # fmt: skip
UNKNOWN = frozenset("LSTM GRU RNN Einsum QAttention GroupQueryAttention QGemm".split())
"""Ops with products whose FLOPs are not known here."""
