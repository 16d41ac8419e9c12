"""ONNX operators as functions of tensors: those that onnx2torch lacks, or has for other sizes, defaults or attributes than the standard.

A function takes an operator's operands by position, None for one that is left out, and its attributes by name. What became an operand
in a later version of the operator has the name that it had as an attribute, so that one function serves all versions. `device` is for
those that make tensors from no tensor, and `outputs` is how many results a node has.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnx_ir.tensor_adapters as tensor_adapters
import torch
import torch.nn.functional as F
from torch import Tensor

from laurel_rewrite.backends.onnx.torch_attention import attention, rotary_embedding
from laurel_rewrite.backends.onnx.torch_resize import resize

Sizes = Tensor | Sequence[int] | int
"""Integers, where the graph computes them from shapes or has them as constants; else the tensor that holds them."""
Number = Tensor | float


@dataclass(frozen=True)
class Operator:
    """How an operator is computed.

    Attributes:
        compute: the function.
        sizes: positions of the operands that it takes as numbers.
        since: the first version that it serves.
    """

    compute: Callable[..., Any]
    sizes: tuple[int, ...] = ()
    since: int = 1


OPERATORS: dict[str, Operator] = {}
"""By their names in ONNX."""


def _operator(*names: str, sizes: tuple[int, ...] = (), since: int = 1) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(compute: Callable[..., Any]) -> Callable[..., Any]:
        OPERATORS.update({name: Operator(compute, sizes, since) for name in names})
        return compute

    return add


def _integers(sizes: Sizes) -> list[int]:
    if isinstance(sizes, Tensor):
        return [int(size) for size in sizes.reshape(-1).tolist()]
    return list(sizes) if isinstance(sizes, Sequence) else [sizes]


def _number(value: Number | Sequence[Any]) -> Any:
    return value.item() if isinstance(value, Tensor) else value[0] if isinstance(value, Sequence) else value


def _axes(axes: Sizes, rank: int) -> list[int]:
    return sorted(axis % rank for axis in _integers(axes))


# Shapes and indices


@_operator("Reshape", sizes=(1,))
def _reshape(x: Tensor, shape: Sizes, *, allowzero: int = 0) -> Tensor:
    sizes = _integers(shape)
    kept = [x.shape[i] if isinstance(size, int) and size == 0 and not allowzero else size for i, size in enumerate(sizes)]
    return x.reshape(kept)


@_operator("Expand", sizes=(1,))
def _expand(x: Tensor, shape: Sizes) -> Tensor:
    sizes = _integers(shape)
    have = [1] * (len(sizes) - x.ndim) + list(x.shape)
    want = [1] * (x.ndim - len(sizes)) + sizes
    return x.expand([a if isinstance(b, int) and b == 1 else b for a, b in zip(have, want, strict=True)])


@_operator("Squeeze", sizes=(1,))
def _squeeze(x: Tensor, axes: Sizes | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(_axes(axes, x.ndim))


@_operator("Unsqueeze", sizes=(1,))
def _unsqueeze(x: Tensor, axes: Sizes) -> Tensor:
    for axis in _axes(axes, x.ndim + len(_integers(axes))):
        x = x.unsqueeze(axis)
    return x


@_operator("Flatten")
def _flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis % x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@_operator("Slice", sizes=(1, 2, 3, 4))
def _slice(x: Tensor, starts: Sizes, ends: Sizes, axes: Sizes | None = None, steps: Sizes | None = None) -> Tensor:
    begins, stops = _integers(starts), _integers(ends)
    dims = range(len(begins)) if axes is None else _integers(axes)
    for begin, stop, axis, step in zip(begins, stops, dims, [1] * len(begins) if steps is None else _integers(steps), strict=True):
        if step < 0:  # which torch does not take: the same from the other end
            size, step, x = x.shape[axis], -step, x.flip(axis)
            begin, stop = (max(0, size - 1 - at) if at >= 0 else -at - 1 for at in (begin, stop))
        x = x[(slice(None),) * (axis % x.ndim) + (slice(begin, stop, step),)]
    return x


@_operator("Split", sizes=(1,))
def _split(x: Tensor, split: Sizes | None = None, *, axis: int = 0, num_outputs: int = 0, outputs: int) -> Any:
    sizes = -(-x.shape[axis] // outputs) if split is None else _integers(split)
    parts = x.split(sizes, axis)  # type: ignore[no-untyped-call]  # torch types it not
    return parts if outputs > 1 else parts[0]


@_operator("Tile", sizes=(1,), since=6)
def _tile(x: Tensor, repeats: Sizes) -> Tensor:
    return x.repeat(_integers(repeats))


@_operator("ConstantOfShape", sizes=(0,))
def _constant_of_shape(shape: Sizes, *, value: Tensor | None = None, device: torch.device) -> Tensor:
    value = torch.zeros(1) if value is None else value
    return torch.full(_integers(shape), value.item(), dtype=value.dtype, device=device)


@_operator("Range", sizes=(0, 1, 2))
def _range(start: Number, limit: Number, delta: Number, *, device: torch.device) -> Tensor:
    tensors = [value for value in (start, limit, delta) if isinstance(value, Tensor)]
    floats = any(isinstance(value, float) for value in (start, limit, delta))
    dtype = tensors[0].dtype if tensors else torch.float32 if floats else torch.int64
    return torch.arange(_number(start), _number(limit), _number(delta), dtype=dtype, device=device)


@_operator("Trilu", sizes=(1,))
def _trilu(x: Tensor, k: Sizes = 0, *, upper: int = 1) -> Tensor:
    diagonal = _integers(k)[0]
    return x.triu(diagonal) if upper else x.tril(diagonal)


@_operator("Pad", sizes=(1, 2, 3), since=2)
def _pad(
    x: Tensor, pads: Sizes, constant_value: Number | None = None, axes: Sizes | None = None, *, mode: str = "constant", value: float = 0.0
) -> Tensor:
    sizes = _integers(pads)
    dims = list(range(x.ndim)) if axes is None else _integers(axes)
    begins, ends = sizes[: len(dims)], sizes[len(dims) :]
    if mode == "constant":
        around = {axis % x.ndim: (begin, end) for axis, begin, end in zip(dims, begins, ends, strict=True)}
        flat = [size for axis in reversed(range(x.ndim)) for size in around.get(axis, (0, 0))]
        return F.pad(x, flat, value=value if constant_value is None else _number(constant_value))
    for axis, begin, end in zip(dims, begins, ends, strict=True):
        if isinstance(begin, int) and isinstance(end, int) and begin == end == 0:
            continue
        size = x.shape[axis]
        at = torch.arange(-begin, size + end, device=x.device)
        if mode == "reflect":
            period = max(2 * (size - 1), 1)
            at = (at % period).minimum(-at % period)
        x = x.index_select(axis, at % size if mode == "wrap" else at.clamp(0, size - 1))
    return x


def _from_the_start(indices: Tensor, size: int) -> Tensor:
    """ONNX counts negative indices from the end."""
    return torch.where(indices < 0, indices + size, indices).long()


@_operator("GatherElements")
def _gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return x.gather(axis, _from_the_start(indices, x.shape[axis]))


@_operator("GatherND")
def _gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    places = indices.ndim - 1
    batch = [torch.arange(x.shape[d], device=x.device).reshape([-1] + [1] * (places - 1 - d)) for d in range(batch_dims)]
    found: Tensor = x[(*batch, *indices.long().unbind(-1))]
    return found


_REDUCED = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@_operator("ScatterElements")
def _scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    at = _from_the_start(indices, x.shape[axis])
    return x.scatter(axis, at, updates) if reduction == "none" else x.scatter_reduce(axis, at, updates, _REDUCED[reduction])


@_operator("ScatterND")
def _scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    if reduction in ("none", "add"):
        return x.index_put(tuple(indices.long().unbind(-1)), updates, accumulate=reduction == "add")
    depth = indices.shape[-1]
    row = indices.new_zeros(indices.shape[:-1])
    for axis in range(depth):
        row = row * x.shape[axis] + _from_the_start(indices[..., axis], x.shape[axis])
    flat, new = x.reshape(math.prod(x.shape[:depth]), -1), updates.reshape(row.numel(), -1)
    return flat.scatter_reduce(0, row.reshape(-1, 1).expand_as(new), new, _REDUCED[reduction]).reshape(x.shape)


@_operator("TopK", sizes=(1,))
def _top_k(x: Tensor, k: Sizes, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    values, indices = x.topk(_integers(k)[0], axis, bool(largest), bool(sorted))
    return values, indices


@_operator("NonZero")
def _non_zero(x: Tensor) -> Tensor:
    return x.nonzero().T


@_operator("CumSum", sizes=(1,))
def _cum_sum(x: Tensor, axis: Sizes, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    dim = _integers(axis)[0]
    x = x.flip(dim) if reverse else x
    total = x.cumsum(dim, dtype=x.dtype) - (x if exclusive else 0)
    return total.flip(dim) if reverse else total


def _product(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    for axis in reversed(axes):
        x = x.prod(axis, keepdim)
    return x


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keep),
    "ReduceProd": _product,
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: x.logsumexp(axes, keep),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep),
}


def _reduce(name: str, x: Tensor, axes: Sizes | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    dims = [] if axes is None else _axes(axes, x.ndim)
    if not dims and noop_with_empty_axes:
        return x
    return _REDUCTIONS[name](x, dims or list(range(x.ndim)), bool(keepdims))


for _name in _REDUCTIONS:
    _operator(_name, sizes=(1,))(functools.partial(_reduce, _name))


# Elements


def _elementwise(name: str, x: Tensor) -> Tensor:
    result: Tensor = getattr(torch, name)(x)
    return result


for _name in ("Acosh", "Asinh", "Atanh", "Cosh", "Sinh"):
    _operator(_name)(functools.partial(_elementwise, _name.lower()))


@_operator("Mish")
def _mish(x: Tensor) -> Tensor:
    return F.mish(x)


@_operator("Clip", sizes=(1, 2), since=6)
def _clip(x: Tensor, min: Number | None = None, max: Number | None = None) -> Tensor:
    x = x if min is None else x.clamp_min(min)
    return x if max is None else x.clamp_max(max)


@_operator("Cast", since=6)
def _cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return x.to(tensor_adapters.to_torch_dtype(ir.DataType(to)))


@_operator("CastLike")
def _cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return x.to(like.dtype)


@_operator("IsInf")
def _is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    return (x.isposinf() & bool(detect_positive)) | (x.isneginf() & bool(detect_negative))


@_operator("Gelu")
def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


@_operator("Swish")
def _swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return x * (alpha * x).sigmoid()


# Products and normalisations


@_operator("Gemm", since=7)
def _gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0
) -> Tensor:
    product = (a.T if transA else a) @ (b.T if transB else b)
    product = product if alpha == 1 else product * alpha
    return product if c is None else product + (c if beta == 1 else c * beta)


@_operator("Conv")
def _conv(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, auto_pad: str = "NOTSET", dilations: Sequence[int] = (), group: int = 1,
    kernel_shape: Sequence[int] = (), pads: Sequence[int] = (), strides: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    rank = w.ndim - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    begins, ends = list(pads[:rank]) or [0] * rank, list(pads[rank:]) or [0] * rank
    if auto_pad.startswith("SAME"):
        for i in range(rank):
            reach = (-(-x.shape[2 + i] // strides[i]) - 1) * strides[i] + (w.shape[2 + i] - 1) * dilations[i] + 1
            missing = max(reach - x.shape[2 + i], 0)
            less = missing // 2
            begins[i], ends[i] = (less, missing - less) if auto_pad == "SAME_UPPER" else (missing - less, less)
    if begins != ends:
        x = F.pad(x, [size for i in reversed(range(rank)) for size in (begins[i], ends[i])])
        begins = [0] * rank
    return torch.convolution(x, w, b, strides, begins, dilations, False, [0] * rank, group)


def _scaled(x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x * scale if bias is None else x * scale + bias


@_operator("LayerNormalization")
def _layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    shape = x.shape[axis:]
    if scale.shape == shape and (bias is None or bias.shape == shape):
        return F.layer_norm(x, shape, scale, bias, epsilon)
    return _scaled(F.layer_norm(x, shape, None, None, epsilon), scale, bias)


@_operator("RMSNormalization")
def _rms_norm(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    return F.rms_norm(x, x.shape[axis:], None, epsilon) * scale


@_operator("InstanceNormalization", since=6)
def _instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


@_operator("GroupNormalization")
def _group_norm(x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    repeated = x.shape[1] // scale.numel()  # until version 21 there was one scale for each group
    return F.group_norm(x, num_groups, scale.repeat_interleave(repeated), bias.repeat_interleave(repeated), epsilon)


_operator("Attention")(attention)
_operator("RotaryEmbedding")(rotary_embedding)
_operator("Resize", sizes=(2, 3), since=11)(resize)
