"""Sizes in a graph on its way to PyTorch: what is computed from the shapes of tensors is computed in integers, and not in tensors of them.

A module with its sizes in tensors runs at any size, too. But torch.export does not look into tensors: its graph would have the sizes of
the example, and another ONNX file of the trained module could serve no other batch or sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

DOMAIN = "laurel_rewrite_size"
"""Of the operators that compute with sizes. A size is an integer, or a list of them."""
_LONGEST = 64  # numbers in a list of sizes; a longer constant is data

Size = int | list[int]
"""Or torch.SymInt, which computes as an int does."""


def mark_sizes(model: ir.Model, taken: Mapping[str, Collection[int]]) -> None:
    """Move the nodes that compute sizes into the domain of these; a node AsTensor stands between a size and who wants a tensor.

    Args:
        model: is changed. Its constants are initializers.
        taken: positions of operands that an operator takes as sizes, by its name.
    """
    ranks: dict[str, int] = {}
    for node in list(model.graph):
        rank = _rank(node, ranks)
        if rank is not None:
            node.domain = DOMAIN
            ranks[str(node.outputs[0].name)] = rank
    tensors: dict[str, ir.Value] = {}

    def tensor_of(value: ir.Value) -> ir.Value:
        name = str(value.name)
        if name not in tensors:
            producer = value.producer()
            assert producer is not None  # an initializer alone is no size
            made = ir.Node(DOMAIN, "AsTensor", [value], name=f"{producer.name}_tensor")
            made.outputs[0].name, made.outputs[0].type, made.outputs[0].shape = f"{name}_tensor", value.type, value.shape
            model.graph.insert_after(producer, made)
            tensors[name] = made.outputs[0]
        return tensors[name]

    for node in list(model.graph):
        computes = node.domain == DOMAIN and node.op_type not in _FROM_TENSORS
        for position, value in enumerate(node.inputs):
            if value is not None and value.name in ranks and not computes and position not in taken.get(node.op_type, ()):
                node.replace_input_with(position, tensor_of(value))
    for position, value in enumerate(model.graph.outputs):
        if value.name in ranks:
            model.graph.outputs[position] = tensor_of(value)
    if ranks:
        model.opset_imports[DOMAIN] = 1


def _rank(node: ir.Node, ranks: Mapping[str, int]) -> int | None:
    """The rank of what a node computes, where that is a size: 0 or 1."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
        return None
    if node.op_type in _FROM_TENSORS:
        return _FROM_TENSORS[node.op_type]
    operands = [value for value in node.inputs if value is not None]
    given = [ranks[str(value.name)] if value.name in ranks else _constant_rank(value) for value in operands]
    if None in given or not any(value.name in ranks for value in operands):
        return None
    first, *rest = [rank for rank in given if rank is not None]
    match node.op_type:
        case "Gather":
            return rest[0] if first == 1 else None
        case "Concat" | "Slice":
            return 1 if set(given) == {1} else None
        case "Squeeze":
            return 0 if first == 0 or _count(node.outputs[0], 0) else None
        case "Unsqueeze":
            return 1 if first == 0 and _count(node.outputs[0], 1) else None
        case "Reshape":
            wanted = operands[1].const_value
            return int(wanted.size) if wanted is not None and wanted.size <= 1 else None
        case "ReduceProd":
            return first if node.attributes.get_int("keepdims", 1) else 0
        case "Cast":
            return first if node.attributes.get_int("to", 0) == ir.DataType.INT64 else None
    return max(first, *rest) if rest else first


def _count(value: ir.Value, rank: int) -> bool:
    return value.shape is None or len(value.shape) == rank


def _constant_rank(value: ir.Value) -> int | None:
    tensor = value.const_value if value.is_initializer() else None
    if tensor is None or tensor.dtype != ir.DataType.INT64 or len(tensor.shape) > 1 or tensor.size > _LONGEST:
        return None
    return len(tensor.shape)


def _shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Size:
    return list(x.shape[start:end])


def _size(x: Tensor) -> Size:
    return x.numel()


def _gather(sizes: list[int], index: Size, *, axis: int = 0) -> Size:
    return [sizes[i] for i in index] if isinstance(index, list) else sizes[index]


def _concat(*parts: list[int], axis: int) -> Size:
    return [size for part in parts for size in part]


def _slice(sizes: list[int], starts: list[int], ends: list[int], axes: Size = 0, steps: Sequence[int] = (1,)) -> Size:
    return sizes[starts[0] : ends[0] : steps[0]]


def _squeeze(sizes: Size, axes: Size = 0) -> Size:
    return sizes[0] if isinstance(sizes, list) else sizes


def _listed(sizes: Size, axes: Size = 0) -> Size:
    return sizes if isinstance(sizes, list) else [sizes]


def _reshape(sizes: Size, shape: list[int], *, allowzero: int = 0) -> Size:
    return _listed(sizes) if shape else _squeeze(sizes)


def _product(sizes: Size, axes: Size = 0, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Size:
    product = 1
    for size in sizes if isinstance(sizes, list) else [sizes]:
        product = product * size
    return [product] if keepdims and isinstance(sizes, list) else product


def _same(sizes: Size, **attributes: Any) -> Size:
    return sizes


def _quotient(a: int, b: int) -> int:
    """Rounded towards zero."""
    return -(-a // b) if isinstance(a, int) and isinstance(b, int) and (a < 0) != (b < 0) else a // b


def _remainder(a: int, b: int) -> int:
    return a % b


def _each(function: Callable[..., Any]) -> Callable[..., Size]:
    """A function of integers for lists of them, too, which are as long as each other, or of one number."""

    def of(*operands: Size, **attributes: Any) -> Size:
        length = max((len(operand) for operand in operands if isinstance(operand, list)), default=None)
        if length is None:
            return function(*operands)  # type: ignore[no-any-return]
        rows = [operand * (length // len(operand)) if isinstance(operand, list) else [operand] * length for operand in operands]
        return [function(*row) for row in zip(*rows, strict=True)]

    return of


def _folded(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def of(first: Any, *rest: Any) -> Any:
        for value in rest:
            first = function(first, value)
        return first

    return of


def _as_tensor(sizes: Size, *, device: torch.device) -> Tensor:
    if not isinstance(sizes, list):
        return torch.scalar_tensor(sizes, dtype=torch.int64, device=device)
    if all(isinstance(size, int) for size in sizes):
        return torch.tensor(sizes, dtype=torch.int64, device=device)
    return torch.stack([torch.scalar_tensor(size, dtype=torch.int64, device=device) for size in sizes])


_FROM_TENSORS = {"Shape": 1, "Size": 0}
OPERATORS: Mapping[str, Callable[..., Any]] = {
    "Shape": _shape, "Size": _size, "Gather": _gather, "Concat": _concat, "Slice": _slice, "Squeeze": _squeeze, "Unsqueeze": _listed,
    "Reshape": _reshape, "ReduceProd": _product, "Cast": _same, "Identity": _same, "AsTensor": _as_tensor,
    "Add": _each(lambda a, b: a + b), "Sub": _each(lambda a, b: a - b), "Mul": _each(lambda a, b: a * b), "Div": _each(_quotient),
    "Mod": _each(_remainder), "Neg": _each(lambda a: -a), "Min": _each(_folded(torch.sym_min)), "Max": _each(_folded(torch.sym_max)),
}  # fmt: skip
"""What each computes. Slice's and the reductions' axis is the only one."""
