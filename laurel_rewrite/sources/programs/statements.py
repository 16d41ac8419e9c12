"""One node of an exported graph as a line of PyTorch."""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from laurel_rewrite.errors import CaptureError
from laurel_rewrite.private import HigherOrderOperator, OpOverload, schema_of

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "matmul": "@", "pow": "**", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "__and__": "&", "__or__": "|", "bitwise_and": "&", "bitwise_or": "|", "floordiv": "//", "floor_divide": "//", "mod": "%", "remainder": "%", "truediv": "/",
}  # fmt: skip
_FUNCTIONAL = frozenset(
    "linear gelu silu scaled_dot_product_attention pad max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d hardswish hardsigmoid hardtanh elu leaky_relu relu6 mish softplus one_hot pixel_shuffle pixel_unshuffle".split()
)
"""What torch.nn.functional has with the operands of ATen's op, in its order."""
_MAKERS = frozenset("arange zeros ones full empty eye linspace scalar_tensor tril_indices triu_indices rand randn".split())
_IGNORED = frozenset("_assert_tensor_metadata _assert_scalar _assert_async sym_constrain_range sym_constrain_range_for_size".split())
_UNSAID = frozenset({"layout", "device", "pin_memory", "memory_format", "non_blocking"})
"""Of a tensor that is made or copied: what a module that is moved must not say."""
_NUMBER = re.compile(r"(_\d+)+$")
_END = 1 << 62
_REGIONS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")

Writer = Callable[["Lines", fx.Node], str]


class Lines:
    """The body of a forward.

    Args:
        module: whose graph is written.
        path: of a module that the graph calls, as an expression behind "self".
    """

    def __init__(self, module: Any, path: Callable[[str], str]) -> None:
        self.module, self.path = module, path
        self.names: dict[fx.Node, str] = {}
        self.taken: set[str] = {"self", "torch", "nn", "F"}
        self.device = ""
        self.lines: list[str] = []

    def name(self, node: fx.Node) -> str:
        """The variable of a node, by what it is alone: alike modules are to read alike, wherever they stand."""
        if node not in self.names:
            name = _NUMBER.sub("", node.name).strip("_")
            name = name if name.isidentifier() and not keyword.iskeyword(name) else f"value_{name}".rstrip("_")
            self.names[node] = self.free(name)
        return self.names[node]

    def free(self, name: str) -> str:
        """A name that no variable has yet."""
        found, number = name, 0
        while found in self.taken:
            number += 1
            found = f"{name}_{number}"
        self.taken.add(found)
        return found

    def value(self, thing: Any) -> str:
        """An operand."""
        if isinstance(thing, fx.Node):
            return self.name(thing)
        if isinstance(thing, list | tuple):
            inner = ", ".join(map(self.value, thing))
            return f"[{inner}]" if isinstance(thing, list) else f"({inner}{',' * (len(thing) == 1)})"
        if (isinstance(thing, float) and thing != thing) or thing in (float("inf"), float("-inf")):
            return f'float("{thing}")'
        if isinstance(thing, torch.device):
            return repr(str(thing))
        if thing is None or isinstance(thing, bool | int | float | str | torch.dtype | torch.layout | torch.memory_format):
            return repr(thing)
        raise CaptureError(f"a graph with an operand of type {type(thing).__name__} is not written as source")

    def call(self, function: str, args: Any, kwargs: Mapping[str, Any]) -> str:
        given = [*map(self.value, args), *(f"{_key(key)}={self.value(value)}" for key, value in kwargs.items())]
        return f"{function}({', '.join(given)})"

    def add(self, graph: fx.Graph, indent: str = "") -> Any:
        """Write the nodes of a graph; returns what its output is, of nodes."""
        for node in graph.nodes:
            if node.op == "output":
                return node.args[0]
            if node.op == "placeholder":
                self._input(node)
            elif node.op == "get_attr":
                if not isinstance(_attribute(graph.owning_module, str(node.target)), torch.nn.Module):
                    self.names[node] = f"self{self.path(str(node.target))}"
            elif (region := _region(node)) is not None:
                self._region(node, region, indent)
            elif node.op == "call_module":
                self.lines.append(f"{indent}{self.name(node)} = {self.call('self' + self.path(str(node.target)), node.args, node.kwargs)}")
            elif (text := self._op(node)) is not None:
                self.lines.append(f"{indent}{self.name(node)} = {text}" if node.users else f"{indent}{text}")
        return None

    def _input(self, node: fx.Node) -> None:
        tensor = isinstance(node.meta.get("val"), torch.Tensor)
        name = self.names.setdefault(node, "") or self.free("x" if tensor else "size")
        self.names[node] = name
        if not self.device and tensor:
            self.device = f"{name}.device"

    def _region(self, node: fx.Node, region: fx.GraphModule, indent: str) -> None:
        """A region as a with block."""
        kind, args = str(node.target), list(node.args)
        begin = args.index(next(a for a in args if isinstance(a, fx.Node) and a.op == "get_attr"))
        said = args[:begin]
        if "set_grad" in kind:
            self.lines.append(f"{indent}with torch.set_grad_enabled({bool(said[0])}):")
        else:
            device, dtype, enabled, cache = (*said, None, None, None)[:4]
            words = f"{str(device)!r}, dtype={self.value(dtype)}, enabled={self.value(enabled)}, cache_enabled={self.value(cache)}"
            self.lines.append(f"{indent}with torch.autocast({words}):")
        inputs = [inner for inner in region.graph.nodes if inner.op == "placeholder"]
        for inner, outer in zip(inputs, args[begin + 1 :], strict=True):
            self.names[inner] = self.value(outer)
        out = self.add(region.graph, f"{indent}    ")
        self.lines.append(f"{indent}{self.name(node)} = {self.value(tuple(out) if isinstance(out, list | tuple) else out)}")

    def _op(self, node: fx.Node) -> str | None:
        """A call of a function; None where it is not said."""
        target = node.target
        if target is operator.getitem:
            return f"{self.value(node.args[0])}[{self.value(node.args[1])}]"
        if not isinstance(target, OpOverload):
            name = getattr(target, "__name__", str(target))
            if name in _INFIX and len(node.args) == 2:  # of sizes
                return f"{self.value(node.args[0])} {_INFIX[name]} {self.value(node.args[1])}"
            if getattr(target, "__module__", "") in ("math", "_operator", "torch") and name.isidentifier():
                home = {"math": "math", "_operator": "operator", "torch": "torch"}[target.__module__]
                return self.call(f"{home}.{name}", node.args, node.kwargs)
            raise CaptureError(f"the graph calls {target}, which is not written as source")
        name = target.overloadpacket.__name__
        overload = target.name().partition(".")[2] or "default"  # type: ignore[no-untyped-call]  # torch's
        if target.namespace != "aten":
            return self.call(f"torch.ops.{target.namespace}.{name}.{overload}", node.args, node.kwargs)
        if name in _IGNORED:
            return None
        if name in _OWN:
            return _OWN[name](self, node)
        return self._usual(node, name, overload)

    def _usual(self, node: fx.Node, name: str, overload: str) -> str:
        args, kwargs = node.args, {key: value for key, value in node.kwargs.items() if key not in _UNSAID}
        if name in _INFIX and len(args) == 2 and not kwargs:
            return f"{self.value(args[0])} {_INFIX[name]} {self.value(args[1])}"
        if name in _MAKERS:
            return self.call(f"torch.{name}", args, kwargs)[:-1] + (f", device={self.device})" if self.device else ")")
        if name in _FUNCTIONAL:
            return self.call(f"F.{name}", args, kwargs)
        first = schema_of(node.target).arguments[:1]  # type: ignore[arg-type]  # an op
        if args and first and first[0].name == "self" and hasattr(torch.Tensor, name) and not name.startswith("_"):
            return self.call(f"{self.value(args[0])}.{name}", args[1:], kwargs)
        if hasattr(torch, name) and not name.startswith("_"):
            return self.call(f"torch.{name}", args, kwargs)
        return self.call(f"torch.ops.aten.{name}.{overload}", args, dict(node.kwargs))


def _key(name: str) -> str:
    if not name.isidentifier():
        raise CaptureError("a graph with an operand that has no name is not written as source")
    return name


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part, None)
    return module


def _region(node: fx.Node) -> fx.GraphModule | None:
    """The graph of a region that a node calls.

    Raises:
        CaptureError: it is the branch or body of control flow.
    """
    if not isinstance(node.target, HigherOrderOperator):
        return None
    name = str(node.target)
    graph = next(
        (_attribute(node.graph.owning_module, str(a.target)) for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"), None
    )
    if name not in _REGIONS or graph is None:
        raise CaptureError(f"the graph has {name}, which is not written as source")
    found: fx.GraphModule = graph
    return found


# What is written in a way of its own


def _slice(lines: Lines, node: fx.Node) -> str:
    given: list[Any] = [*node.args, *(0, None, None, 1)[len(node.args) - 1 :]]
    x, dim, start, end, step = given
    begin = "" if start in (0, None) else lines.value(start)
    stop = "" if end is None or (isinstance(end, int) and end >= _END) else lines.value(end)
    part = f"{begin}:{stop}" + (f":{lines.value(step)}" if step != 1 else "")
    before = [":"] * dim if isinstance(dim, int) and dim >= 0 else ["..."]
    after = [":"] * (-dim - 1) if isinstance(dim, int) and dim < 0 else []
    return f"{lines.value(x)}[{', '.join([*before, part, *after])}]"


def _index(lines: Lines, node: fx.Node) -> str:
    x, places = node.args
    assert isinstance(places, list | tuple)
    return f"{lines.value(x)}[{', '.join(':' if place is None else lines.value(place) for place in places)}]"


def _to(lines: Lines, node: fx.Node) -> str:
    said = [a for a in node.args[1:] if isinstance(a, torch.dtype)] + [v for v in (node.kwargs.get("dtype"),) if v is not None]
    if not said and len(node.args) > 1 and isinstance(node.args[1], fx.Node):
        return f"{lines.value(node.args[0])}.to({lines.value(node.args[1])})"
    return f"{lines.value(node.args[0])}.to({lines.value(said[0])})" if said else lines.value(node.args[0])


def _dropout(function: str) -> Writer:
    def written(lines: Lines, node: fx.Node) -> str:
        return f"{function}({lines.value(node.args[0])}, {lines.value(node.args[1])}, self.training)"

    return written


def _attention(lines: Lines, node: fx.Node) -> str:
    """Attention dropout follows the mode."""
    args, kwargs = list(node.args), dict(node.kwargs)
    p = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
    if p:
        del args[4:5]
        for name, value in zip(("is_causal",), args[4:], strict=False):
            kwargs[name] = value
        args = args[:4]
        kwargs.pop("dropout_p", None)
    text = lines.call("F.scaled_dot_product_attention", args, kwargs)
    return text[:-1] + f", dropout_p={lines.value(p)} if self.training else 0.0)" if p else text


def _batch_norm(lines: Lines, node: fx.Node) -> str:
    x, weight, bias, mean, variance, *rest = node.args
    momentum, eps = (rest[1], rest[2]) if len(rest) > 2 else rest
    found = f"{lines.value(mean)}, {lines.value(variance)}, {lines.value(weight)}, {lines.value(bias)}"
    text = f"F.batch_norm({lines.value(x)}, {found}, self.training, {lines.value(momentum)}, {lines.value(eps)})"
    return f"({text},)" if node.target.overloadpacket.__name__ != "batch_norm" else text  # type: ignore[union-attr]  # an op


def _first_of(function: str, count: int) -> Writer:
    """An op that gives statistics beside its result, of which only that is read."""

    def written(lines: Lines, node: fx.Node) -> str:
        return f"({lines.call(function, node.args[:count], {})},)"

    return written


def _same(lines: Lines, node: fx.Node) -> str:
    return lines.value(node.args[0])


_OWN: dict[str, Writer] = {
    "slice": _slice, "index": _index, "to": _to, "_to_copy": _to, "dropout": _dropout("F.dropout"), "dropout_": _dropout("torch.dropout_"),
    "feature_dropout": _dropout("torch.feature_dropout"), "alpha_dropout": _dropout("F.alpha_dropout"),
    "scaled_dot_product_attention": _attention, "batch_norm": _batch_norm, "_native_batch_norm_legit_no_training": _batch_norm,
    "native_layer_norm": _first_of("F.layer_norm", 5), "native_dropout": lambda lines, node: f"({_dropout('F.dropout')(lines, node)},)",
    "alias": _same, "lift_fresh_copy": lambda lines, node: f"{lines.value(node.args[0])}.clone()", "_unsafe_view": lambda lines, node: lines.call(f"{lines.value(node.args[0])}.reshape", node.args[1:], {}),
    "_softmax": lambda lines, node: f"{lines.value(node.args[0])}.softmax({lines.value(node.args[1])})",
    "sym_size": lambda lines, node: f"{lines.value(node.args[0])}.size({lines.value(node.args[1])})",
}  # fmt: skip


def reads_statistics(graph: fx.Graph) -> Iterator[fx.Node]:
    """Nodes that read more than the result of an op that gives statistics, too, which the source has not."""
    for node in graph.nodes:
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[1] != 0:
            source = node.args[0].target
            name = source.overloadpacket.__name__ if isinstance(source, OpOverload) else ""
            if name in ("native_layer_norm", "native_dropout", "_native_batch_norm_legit_no_training"):
                yield node
