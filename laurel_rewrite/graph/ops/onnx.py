"""Op table of ONNX graphs: the standard operators and onnxruntime's contrib operators share one table, by name.

What is not listed is mixing: an unknown operator may do anything.
"""

from __future__ import annotations

from laurel_rewrite.graph.dataflow import OpKind, Role
from laurel_rewrite.graph.ops.rules import (
    ATTENTION,
    BATCH_NORM,
    CHANNEL_NORM,
    CHOICE,
    CONV,
    DIFFERENCE,
    LAYER_NORM,
    LINEAR,
    MAX_POOL,
    NOISE,
    POINTWISE,
    POOL,
    PRODUCT,
    ROUND,
    ROUTING,
    SCATTER,
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
    Abs Acos Acosh And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Celu Clip Cos Cosh Elu Equal Erf
    Exp Gelu Greater GreaterOrEqual HardSigmoid HardSwish IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod
    Div Not Or PRelu Pow Reciprocal Relu Selu Shrink Sigmoid Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu Where
    Xor BiasGelu FastGelu QuickGelu BiasDropout
"""
_ROUNDS = "Ceil Floor Round Sign Bernoulli"
_CHOICES = "ArgMax ArgMin Multinomial NonZero OneHot"
_NOISES = "RandomNormal RandomNormalLike RandomUniform RandomUniformLike"
_SCATTERS = "ScatterElements ScatterND Scatter TensorScatter"
_ATTENTIONS = """
    Attention MultiHeadAttention GroupQueryAttention PackedAttention PackedMultiHeadAttention DecoderMaskedMultiHeadAttention
    DecoderMaskedSelfAttention QAttention SparseAttention PagedAttention LongformerAttention
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

PRODUCT_SUMS = {"FusedConv": ((1, 2), 3), "Gemm": ((1,), 2), "FusedGemm": ((1,), 2)}
"""A product with a further operand added to it, in one node: the inputs that the product is linear in (weights, bias), and the input
that is added. What is added is mostly a bias; where it depends on data, the node is a sum."""

QUANTISED_SUMS = frozenset({"QLinearAdd"})
"""A sum of integers that stand for numbers: its operands are the inputs 0 and 3."""

SPLIT_LAYOUT = "com.microsoft.nchwc"
"""Domain of operators that hold channels in blocks, as onnxruntime's optimiser writes them for one machine."""

SUMS = frozenset({"Add", "Sum"})

OPS: dict[str, OpKind] = {
    **dict.fromkeys(_VIEWS.split(), TRANSPARENT),
    **dict.fromkeys(_SLICES.split(), SLICE),
    **dict.fromkeys(_POINTWISE.split(), POINTWISE),
    **dict.fromkeys(_ATTENTIONS.split(), ATTENTION),
    "TopK": ROUTING,
    **dict.fromkeys(_POOLS.split(), POOL),
    **dict.fromkeys(_MAX_POOLS.split(), MAX_POOL),
    **dict.fromkeys(_UPSAMPLES.split(), UPSAMPLE),
    **dict.fromkeys(_ROUNDS.split(), ROUND),
    **dict.fromkeys(_CHOICES.split(), CHOICE),
    **dict.fromkeys(_NOISES.split(), NOISE),
    **dict.fromkeys(_SCATTERS.split(), SCATTER),
    **dict.fromkeys(("Concat", "Pad", "Expand", "Neg"), STRUCTURE),
    "Mul": PRODUCT,
    "Sub": DIFFERENCE,
    **dict.fromkeys(SUMS | QUANTISED_SUMS, SUM),
    "Softmax": SOFTMAX,
    **dict.fromkeys(("Gemm", "FusedGemm"), LINEAR),
    **dict.fromkeys(("Conv", "ConvInteger", "QLinearConv", "FusedConv"), CONV),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", *SKIP_NORMS), LAYER_NORM),
    "BatchNormalization": BATCH_NORM,
    **dict.fromkeys(("GroupNormalization", "InstanceNormalization"), CHANNEL_NORM),
    "GroupNorm": OpKind(Role.MIXING, linear=True, norm=True, axis=-1, vote=3),  # contrib: channels last
}
"""Operator to its row."""
