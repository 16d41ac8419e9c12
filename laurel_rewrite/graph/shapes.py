"""The sizes of an ONNX graph's values: what its inputs say is believed, and everything behind them is inferred anew.

A file's own sizes of inner values come from whatever tools it went through. One of them calls every size that it does not know by a
new name (`unk__0`, `Convoutput_dim_2`), so that x and f(x) seem to differ; another leaves the batch of a former export in them. So the
only names that count are those of the inputs' open sizes, and expressions over them; an inner size of the file is taken where no
inference says anything. Symbolic inference comes first, for it keeps H/2 as H/2; onnx's own knows more operators.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_shape_inference import ShapeInferenceContext, infer_symbolic_shapes, registry

from laurel_rewrite.graph.capture import quiet

Sizes = tuple[int | str, ...]

_CONTRIB = "com.microsoft"
_ALIKE = {"FusedConv": ("Conv", 3), "FusedGemm": ("Gemm", 3)}
"""onnxruntime's fusions that the inference does not know: what the shape is that of, and how many inputs that takes."""
_SIZES = "laurel_rewrite.sizes"  # key in a value's `meta`, which no file holds
_NAME = r"[A-Za-z_][\w.]*"
_EXPRESSION = re.compile(rf"(?=.{{1,200}}$)\s*(?:{_NAME}|\d{{1,9}})(?:\s*(?:\+|-|\*|//)\s*(?:{_NAME}|\d{{1,9}}))*\s*")
_FUNCTIONS = frozenset({"floor", "ceiling", "sqrt", "Max", "Min", "Mod", "max", "min", "mod"})
_NO_NAMES = frozenset({"", "?", "none", "unknown", "unk"})
"""What tools write for a size that has no name."""


def sizes_of(value: ir.Value) -> Sizes | None:
    """A value's shape as `Value.shape` has it: an open size by name, an unknown one as "?" and a number. None where unknown."""
    if _SIZES in value.meta:
        known: Sizes | None = value.meta[_SIZES]
        return known
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else str(dim.value) if dim.value is not None else "?" for dim in value.shape)


def set_sizes(values: Mapping[ir.Value, Sizes | None]) -> None:
    """What `sizes_of` is to say from now on; files stay as they are."""
    for value, sizes in values.items():
        value.meta[_SIZES] = sizes


def clean_sizes(model: ir.Model) -> None:
    """Take what is no size and no name of one ("?", -1, "") out of a model, in place."""
    for value in (*model.graph.inputs, *model.graph.outputs, *_inner(model)):
        if value.shape is not None and any(_is_void(dim) for dim in value.shape):
            value.shape = ir.Shape([None if _is_void(dim) else dim for dim in value.shape])


def completed(model: ir.Model) -> ir.Model:
    """A model that can be read: local functions inlined, nodes named apart, and a shape for each value whose shape can be known.

    Returns:
        The model itself where nothing is to be done, else a copy; tensors are shared, and large ones not read. The shapes of its values
        hold no name but those that the inputs give; `sizes_of` tells unknown sizes apart, too. Inputs and outputs are as they were.

    Raises:
        ValueError, RuntimeError: the nodes are not in topological order.
    """
    if model.functions:
        model = common.InlinePass()(model.clone()).model
    if _is_complete(model) and not twice_named(model):
        return model
    model = model.clone()
    clean_sizes(model)
    for node, name in twice_named(model).items():
        node.name = name
    with quiet():
        _infer_anew(model)
    return model


def twice_named(model: ir.Model) -> dict[ir.Node, str]:
    """Nodes whose name an earlier node has, each with a name of its own."""
    nodes = [node for node in model.graph.all_nodes() if node.name]
    taken: set[str] = {str(node.name) for node in nodes}
    seen: set[str] = set()
    again: dict[ir.Node, str] = {}
    for node in nodes:
        name = str(node.name)
        if name in seen:
            name = next(name for n in range(2, len(nodes) + 2) if (name := f"{node.name}_{n}") not in taken)
            taken.add(name)
            again[node] = name
        seen.add(name)
    return again


def _infer_anew(model: ir.Model) -> None:
    values = list(_inner(model))
    interface = {value: value.shape for value in (*model.graph.inputs, *model.graph.outputs)}
    constants = {value: value.const_value for value in values}
    of_file = [value.shape for value in values]
    given = _name_inputs(model)
    for value in values:
        value.shape = None
    _infer_symbolically(model)
    if any(_is_open(value, given) for value in values):
        _learn(model, _by_onnx(model), given)
    if any(_is_open(value, given) for value in values):
        _learn(model, of_file, given)
    numbers: dict[str, str] = {}
    for value in dict.fromkeys((*interface, *values)):
        sizes = None if value.shape is None else tuple(_size(dim, given, numbers) for dim in value.shape)
        set_sizes({value: sizes})
        value.shape = None if sizes is None else ir.Shape([None if is_unknown(size) else size for size in sizes])
    for value, shape in interface.items():
        value.shape = shape if shape is not None else value.shape
    for value, constant in constants.items():  # the inference leaves what it worked out
        value.const_value = constant
        value.metadata_props.pop("pkg.onnx_shape_inference.sym_data", None)


def _infer_symbolically(model: ir.Model) -> None:
    for op in _ALIKE:
        if registry.get(_CONTRIB, op, 1) is None:
            registry.register(_CONTRIB, op)(_like)
    with contextlib.suppress(Exception):  # the inference's and sympy's; what was inferred up to that node stays
        infer_symbolic_shapes(model, warn_on_missing=False, adopt_declared_symbols=False)


def _by_onnx(model: ir.Model) -> list[ir.Shape | None]:
    """The shapes of the inner values by onnx's own inference."""
    return [value.shape for value in _inner(common.ShapeInferencePass(strict_mode=False)(model.clone()).model)]


def _learn(model: ir.Model, shapes: Sequence[ir.Shape | None], given: frozenset[str]) -> None:
    """Take known sizes from other shapes of the inner values where they are unknown, and infer what follows."""
    merged: list[list[int | ir.SymbolicDim | None] | None] = []
    came = False
    for value, shape in zip(_inner(model), shapes, strict=True):
        mine, theirs = _without_foreign(value.shape, given), _without_foreign(shape, given)
        both = theirs if mine is None else mine
        if mine is not None and theirs is not None and len(mine) == len(theirs):
            both = [b if a is None else a for a, b in zip(mine, theirs, strict=True)]
        came = came or both != mine
        merged.append(both)
    if came:
        for value, dims in zip(_inner(model), merged, strict=True):
            value.shape = None if dims is None else ir.Shape(dims)
        _infer_symbolically(model)


def _name_inputs(model: ir.Model) -> frozenset[str]:
    """Give every open size of an input a name that inference can read, in place; the names."""
    names: dict[str, str] = {}
    for value in _data_inputs(model):
        dims: list[int | str] = []
        for position, dim in enumerate(value.shape or ()):
            if isinstance(dim, int):
                dims.append(dim)
            elif dim.value is not None and _EXPRESSION.fullmatch(dim.value):
                dims.append(dim.value)
            else:
                text = dim.value or f"{value.name}_{position}"
                dims.append(names.setdefault(text, re.sub(r"\W|^(?=\d)", "_", text)))
        if value.shape is not None:
            value.shape = ir.Shape(dims)
    return _given(model)


def _given(model: ir.Model) -> frozenset[str]:
    return frozenset(
        name for value in _data_inputs(model) for dim in value.shape or () if isinstance(dim, ir.SymbolicDim) for name in _names(dim)
    )


def _is_complete(model: ir.Model) -> bool:
    """Whether each value has a shape without foreign names. A file that has lost sight of an open size is none: its shapes are another's."""
    dims = [dim for value in _data_inputs(model) for dim in value.shape or ()]
    if any(_is_void(dim) or not (isinstance(dim, int) or _EXPRESSION.fullmatch(dim.value or "")) for dim in dims):
        return False
    given = _given(model)
    inner = list(_inner(model))
    if any(value.dtype is None or _is_open(value, given) for value in inner):
        return False
    return given <= {name for value in inner for dim in value.shape or () if isinstance(dim, ir.SymbolicDim) for name in _names(dim)}


def _data_inputs(model: ir.Model) -> Iterator[ir.Value]:
    return (value for value in model.graph.inputs if value.name not in model.graph.initializers)


def _inner(model: ir.Model) -> Iterator[ir.Value]:
    """What the graph and its subgraphs compute, and the inputs of these."""
    for node in model.graph.all_nodes():
        yield from (value for graph in subgraphs(node) for value in graph.inputs if value.name)
        yield from (value for value in node.outputs if value.name)


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The sides of an If, the body of a Loop or Scan."""
    yield from (attribute.as_graph() for attribute in node.attributes.values() if attribute.type == ir.AttributeType.GRAPH)


def _is_void(dim: int | ir.SymbolicDim) -> bool:
    """Whether this is no size, nor the name of one, though it stands in the place of one."""
    if isinstance(dim, int):
        return dim < 0
    return dim.value is not None and (dim.value.strip().lower() in _NO_NAMES or re.fullmatch(r"-\s*\d+", dim.value.strip()) is not None)


def _names(dim: ir.SymbolicDim) -> set[str]:
    return set(re.findall(_NAME, dim.value or "")) - _FUNCTIONS


def _is_foreign(dim: int | ir.SymbolicDim, given: frozenset[str]) -> bool:
    """Whether a size is unknown: it has no name, or one that no input gives."""
    return not isinstance(dim, int) and (dim.value is None or not _names(dim) <= given)


def _is_open(value: ir.Value, given: frozenset[str]) -> bool:
    return value.shape is None or any(_is_foreign(dim, given) or _is_void(dim) for dim in value.shape)


def _without_foreign(shape: ir.Shape | None, given: frozenset[str]) -> list[int | ir.SymbolicDim | None] | None:
    return None if shape is None else [None if _is_foreign(dim, given) or _is_void(dim) else dim for dim in shape]


def _size(dim: int | ir.SymbolicDim, given: frozenset[str], numbers: dict[str, str]) -> int | str:
    """A size as `sizes_of` gives it; `numbers` has what unknown ones are called."""
    if isinstance(dim, int):
        return dim
    if not _is_foreign(dim, given):
        return str(dim.value)
    return numbers.setdefault(dim.value or f"unnamed {len(numbers)}", f"?{len(numbers)}")


def is_unknown(size: int | str) -> bool:
    """Whether nobody knows a size of `sizes_of`, not even by name."""
    return isinstance(size, str) and size.startswith("?")


def _like(context: ShapeInferenceContext, node: ir.Node) -> None:
    op, inputs = _ALIKE[node.op_type]
    infer = registry.get("", op, context.opset)
    twin = ir.Node("", op, node.inputs[:inputs], node.attributes.values(), num_outputs=1)
    try:
        if infer is not None:
            infer(context, twin)
        context.set_shape_and_dtype(node.outputs[0], twin.outputs[0].shape, twin.outputs[0].dtype)
    finally:
        for position in range(len(twin.inputs)):
            twin.replace_input_with(position, None)
