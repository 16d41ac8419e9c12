"""Op table of ONNX graphs: the standard operators and onnxruntime's contrib operators share one table, by name.

What is not listed is mixing: an unknown operator may do anything.
"""

from __future__ import annotations

from laurel_rewrite.dataflow import OpKind, Role
from laurel_rewrite.dialects.rules import (
    CHANNEL_NORM,
    CONV,
    LAYER_NORM,
    LINEAR,
    MAX_POOL,
    POINTWISE,
    POOL,
    SLICE,
    SOFTMAX,
    STRUCTURE,
    SUM,
    TRANSPARENT,
    UPSAMPLE,
)

_VIEWS = "Identity Cast CastLike Reshape Transpose Squeeze Unsqueeze Flatten Dropout QuantizeLinear DequantizeLinear"
_SLICES = "Slice Split"
_POINTWISE = """
    Abs Acos Acosh And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Ceil Celu Clip Cos Cosh Elu Equal Erf
    Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Div
    Not Or PRelu Pow Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu Where
    Xor BiasGelu FastGelu QuickGelu BiasDropout
"""
_POOLS = "AveragePool GlobalAveragePool"
_MAX_POOLS = "MaxPool GlobalMaxPool"
_UPSAMPLES = "Resize Upsample ConvTranspose"

SHAPE_ONLY = frozenset("Shape Size ConstantOfShape Range RandomNormalLike RandomUniformLike EyeLike".split())
"""Operators that read at most the shape of their operands."""

LIKE = frozenset({"CastLike"})
"""Operators that take only the type of their further operands."""

PRODUCTS = frozenset({"Mul", "Div"})
"""Transparent with a constant scalar."""

SKIP_NORMS = frozenset({"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"})
"""A sum of the first two operands and its normalisation in one node; output 3 is the sum."""

FUSED_CONV = "FusedConv"
"""A convolution, with operand 3 added to it, and an activation in one node."""

SUMS = frozenset({"Add", "Sum"})

OPS: dict[str, OpKind] = {
    **dict.fromkeys(_VIEWS.split(), TRANSPARENT),
    **dict.fromkeys(_SLICES.split(), SLICE),
    **dict.fromkeys(_POINTWISE.split(), POINTWISE),
    **dict.fromkeys(_POOLS.split(), POOL),
    **dict.fromkeys(_MAX_POOLS.split(), MAX_POOL),
    **dict.fromkeys(_UPSAMPLES.split(), UPSAMPLE),
    **dict.fromkeys(("Concat", "Pad", "Expand", "Sub", "Neg"), STRUCTURE),
    **dict.fromkeys(SUMS, SUM),
    "Softmax": SOFTMAX,
    "Gemm": LINEAR,
    **dict.fromkeys(("Conv", "ConvInteger", "QLinearConv", FUSED_CONV), CONV),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", *SKIP_NORMS), LAYER_NORM),
    **dict.fromkeys(("BatchNormalization", "GroupNormalization", "InstanceNormalization"), CHANNEL_NORM),
    "GroupNorm": OpKind(Role.MIXING, linear=True, norm=True, axis=-1, vote=3),  # contrib: channels last
}
"""Operator to its row."""
