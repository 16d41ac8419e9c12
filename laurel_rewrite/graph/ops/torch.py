"""Op table of PyTorch graphs: ATen ops, functions of `torch`, tensor methods and `torch.nn` leaves share their base names.

What is not listed is pointwise (shape kept, positions apart), and an unknown leaf module is mixing.
"""

from __future__ import annotations

from laurel_rewrite.graph.dataflow import OpKind
from laurel_rewrite.graph.ops.rules import (
    ATTENTION,
    BATCH_NORM,
    CHANNEL_NORM,
    CHOICE,
    CONV,
    DETACH,
    DIFFERENCE,
    GATE,
    LAYER_NORM,
    LINEAR,
    MAX_POOL,
    MIXING,
    NOISE,
    POOL,
    PRODUCT,
    ROUND,
    ROUTING,
    SCATTER,
    SLICE,
    SOFTMAX,
    STRUCTURE,
    SUBGRAPH,
    SUM,
    TRANSPARENT,
    UPSAMPLE,
)

VIEWS = frozenset(
    """
    view _unsafe_view reshape reshape_as view_as permute transpose t numpy_T T mT adjoint squeeze unsqueeze flatten unflatten ravel
    swapaxes swapdims movedim moveaxis alias detach detach_ expand expand_as slice select narrow split split_with_sizes chunk unbind
    tensor_split unsafe_split unsafe_chunk unfold_copy getitem identity diagonal
    """.split()
)
"""Ops whose result may share memory with their operand."""

MAYBE_OPERAND = frozenset(
    """
    contiguous to type_as type float half bfloat16 double lift_fresh requires_grad_ cuda cpu
    dropout dropout_ dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout
    """.split()
)
"""Ops whose result is their operand itself where there is nothing to do."""

_COPIES = """
    clone copy _to_copy lift_fresh_copy positive native_dropout
"""
_SLICES = """
    slice select narrow split split_with_sizes chunk unbind tensor_split unsafe_split unsafe_chunk diagonal
"""
_MIXING = """
    matmul mm bmm addmm addbmm baddbmm addmv mv dot einsum tensordot bilinear log_softmax softmin _log_softmax
    sum mean var std var_mean std_mean prod amax amin max min median logsumexp norm linalg_vector_norm linalg_norm cumsum cumprod
    logcumsumexp sort fft_fft fft_ifft fft_fft2 fft_ifft2 fft_rfft fft_irfft fft_rfft2 fft_irfft2 fft_fftn
    fft_ifftn fft_rfftn fft_irfftn stft istft roll flip gather index index_select take take_along_dim
    grid_sampler grid_sample affine_grid lstm gru rnn_tanh rnn_relu
    rnn lstm_cell gru_cell rnn_cell im2col col2im fold unfold pixel_shuffle pixel_unshuffle channel_shuffle cdist diff normalize
    cosine_similarity embedding embedding_bag local_response_norm lp_pool2d glu associative_scan scan while_loop cond map_impl
"""
_ATTENTIONS = """
    scaled_dot_product_attention multi_head_attention_forward multihead_attention _native_multi_head_attention
    _transformer_encoder_layer_fwd flex_attention
"""
_MAX_POOLS = """
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
"""
_POOLS = """
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
"""
_UPSAMPLES = """
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
    upsample_linear1d _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact2d interpolate upsample conv_transpose1d
    conv_transpose2d conv_transpose3d
"""
_SCATTERS = """
    index_put index_copy index_add scatter scatter_add scatter_reduce slice_scatter select_scatter diagonal_scatter masked_scatter
    index_fill masked_index_put
"""
_ROUNDS = "round floor ceil trunc fix sign sgn heaviside floor_divide bernoulli binomial poisson"
_CHOICES = "argmax argmin argsort bucketize multinomial nonzero one_hot searchsorted"
_NOISES = """
    rand rand_like randn randn_like normal normal_functional uniform exponential cauchy log_normal geometric random
"""
_STRUCTURES = "cat concat concatenate stack pad constant_pad_nd neg setitem"

SHAPE_ONLY = frozenset(
    """
    ones_like zeros_like full_like empty_like rand_like randn_like randint_like new_empty new_ones new_zeros new_full new_tensor
    size shape sym_size sym_numel numel dim arange zeros ones full empty rand randn scalar_tensor
    """.split()
)
"""Ops that read at most the shape of their operands: their results do not depend on data."""

DRAWS = frozenset("dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout native_dropout".split())
"""Views and copies that draw random numbers: two of one value differ."""

PICKS = frozenset("index gather index_select take take_along_dim".split())
"""Ops that take elements at given places: two of one value, at the same places, are one value."""

LIKE = frozenset("type_as to expand_as view_as reshape_as".split())
"""Ops that take only the type or the shape of their further operands."""

IGNORED = frozenset("_assert_tensor_metadata _assert_async _assert_scalar sym_constrain_range_for_size _set_grad_enabled".split())
"""Ops without a result."""

PRODUCTS = frozenset({"mul", "multiply", "imul"})
SCALES = PRODUCTS | {"div", "true_divide", "divide", "truediv", "itruediv"}
"""Transparent with a constant scalar, pointwise otherwise."""

SUMS = frozenset({"add", "iadd"})

OPS: dict[str, OpKind] = {
    **dict.fromkeys(VIEWS, TRANSPARENT),
    **dict.fromkeys([*MAYBE_OPERAND, *_COPIES.split()], TRANSPARENT),
    **dict.fromkeys(_SLICES.split(), SLICE),
    **dict.fromkeys(_MIXING.split(), MIXING),
    **dict.fromkeys(_ATTENTIONS.split(), ATTENTION),
    "topk": ROUTING,
    **dict.fromkeys(_POOLS.split(), POOL),
    **dict.fromkeys(_MAX_POOLS.split(), MAX_POOL),
    **dict.fromkeys(_UPSAMPLES.split(), UPSAMPLE),
    **dict.fromkeys(_STRUCTURES.split(), STRUCTURE),
    **dict.fromkeys(("softmax", "_softmax"), SOFTMAX),
    **dict.fromkeys(SUMS, SUM),
    "sum_in_subgraph": SUBGRAPH,
    **dict.fromkeys(_SCATTERS.split(), SCATTER),
    **dict.fromkeys(_ROUNDS.split(), ROUND),
    **dict.fromkeys(_CHOICES.split(), CHOICE),
    **dict.fromkeys(_NOISES.split(), NOISE),
    **dict.fromkeys(("detach", "detach_"), DETACH),
    **dict.fromkeys(PRODUCTS, PRODUCT),
    **dict.fromkeys(("sub", "subtract", "rsub", "isub"), DIFFERENCE),
    **dict.fromkeys(("addcmul", "addcdiv", "lerp"), GATE),
    **dict.fromkeys(("linear", "addmm"), LINEAR),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), CONV),
    **dict.fromkeys(("layer_norm", "rms_norm", "native_layer_norm"), LAYER_NORM),
    **dict.fromkeys(("batch_norm", "instance_norm", "_native_batch_norm_legit"), BATCH_NORM),  # may divide by statistics that it keeps
    **dict.fromkeys(("group_norm", "native_group_norm"), CHANNEL_NORM),
}
"""Base name of an op to its row."""

LEAF_MODULES: dict[str, str] = {
    "Identity": "identity",
    "BatchNorm1d": "batch_norm",
    "BatchNorm2d": "batch_norm",
    "BatchNorm3d": "batch_norm",
    "SyncBatchNorm": "batch_norm",
    "InstanceNorm2d": "instance_norm",
    "GroupNorm": "group_norm",
    "LayerNorm": "layer_norm",
    "RMSNorm": "rms_norm",
    "Conv1d": "conv1d",
    "Conv2d": "conv2d",
    "Conv3d": "conv3d",
    "ConvTranspose2d": "conv_transpose2d",
    "Linear": "linear",
    "Dropout": "dropout",
    "Dropout1d": "dropout1d",
    "Dropout2d": "dropout2d",
    "Dropout3d": "dropout3d",
    "AlphaDropout": "alpha_dropout",
    "Flatten": "flatten",
    "Unflatten": "unflatten",
    "Softmax": "softmax",
    "MaxPool1d": "max_pool1d",
    "MaxPool2d": "max_pool2d",
    "MaxPool3d": "max_pool3d",
    "AdaptiveMaxPool1d": "adaptive_max_pool1d",
    "AdaptiveMaxPool2d": "adaptive_max_pool2d",
    "AvgPool1d": "avg_pool1d",
    "AvgPool2d": "avg_pool2d",
    "AdaptiveAvgPool1d": "adaptive_avg_pool1d",
    "AdaptiveAvgPool2d": "adaptive_avg_pool2d",
    "Upsample": "upsample",
    "ZeroPad2d": "pad",
}
"""Class of a `torch.nn` leaf to the op it stands for."""

POINTWISE_MODULES = frozenset(
    """
    ReLU ReLU6 GELU SiLU Mish Sigmoid Tanh Hardswish Hardsigmoid Hardtanh LeakyReLU ELU CELU SELU PReLU Softplus Softsign LogSigmoid
    Softshrink Hardshrink Tanhshrink Threshold RReLU
    """.split()
)
