"""Modules of torch.nn in an exported program: where the graph shows that one was called, it is made again, so that it knows its mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from laurel_rewrite.private import OpOverload, schema_of


def constructor(kind: str, module: Any) -> str:
    """The call that makes a module of torch.nn as it was, from its graph; "" where it is none, or does more than one of its kind.

    Args:
        kind: full name of its class.
        module: what `torch.export.unflatten` made of it.
    """
    package, _, name = kind.rpartition(".")
    make = _MAKERS.get(name)
    if make is None or not package.startswith("torch.nn."):
        return ""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    ops = [node for node in module.graph.nodes if node.op == "call_function" and not _counts(node)]
    if len(inputs) != 1 or len(ops) != 1 or not isinstance(ops[0].target, OpOverload):
        return ""
    op = ops[0].target.overloadpacket.__name__
    if op not in make[0] or (module.graph.output_node().args[0] is not ops[0] and module.graph.output_node().args[0] != (ops[0],)):
        return ""
    return make[1](name, _Operands(ops[0], module))


def _counts(node: fx.Node) -> bool:
    """Whether a node counts the batches of a batch norm."""
    return "num_batches_tracked" in "".join(str(operand.target) for operand in node.all_input_nodes) or not node.users


class _Operands:
    """The operands of an op by their names in its schema."""

    def __init__(self, node: fx.Node, module: Any) -> None:
        target: Any = node.target
        arguments = schema_of(target).arguments
        self.op = str(target.name()).partition(".")[0]
        self.given: dict[str, Any] = {argument.name: argument.default_value for argument in arguments}
        self.given |= dict(zip((argument.name for argument in arguments), node.args, strict=False)) | dict(node.kwargs)
        self.module = module

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def shape(self, name: str) -> list[int]:
        """Of a parameter."""
        tensor: Any = self.module
        for part in str(self.given[name].target).split("."):
            tensor = getattr(tensor, part)
        return list(tensor.shape)

    def has(self, name: str) -> bool:
        return self.given.get(name) is not None


def _linear(name: str, o: _Operands) -> str:
    out, inner = o.shape("weight")
    return f"nn.Linear({inner}, {out}, bias={o.has('bias')})"


def _embedding(name: str, o: _Operands) -> str:
    count, size = o.shape("weight")
    padding = o["padding_idx"]
    return f"nn.Embedding({count}, {size}{f', padding_idx={padding!r}' if padding not in (None, -1) else ''})"


def _layer_norm(name: str, o: _Operands) -> str:
    return f"nn.LayerNorm({list(o['normalized_shape'])}, eps={o['eps']!r}, elementwise_affine={o.has('weight')}, bias={o.has('bias')})"


def _convolution(name: str, o: _Operands) -> str:
    out, inner, *kernel = o.shape("weight")
    if not all(isinstance(size, int) for size in (*o["stride"], *o["dilation"])):
        return ""
    padding = o["padding"] if isinstance(o["padding"], str) else tuple(o["padding"])
    return (
        f"nn.{name}({inner * int(o['groups'])}, {out}, {tuple(kernel)}, stride={tuple(o['stride'])}, padding={padding!r}, dilation={tuple(o['dilation'])}, "
        f"groups={o['groups']!r}, bias={o.has('bias')})"
    )


def _batch_norm(name: str, o: _Operands) -> str:
    if not o.has("running_mean"):
        return ""
    return f"nn.{name}({o.shape('running_mean')[0]}, eps={o['eps']!r}, momentum={o['momentum']!r}, affine={o.has('weight')})"


def _group_norm(name: str, o: _Operands) -> str:
    return f"nn.GroupNorm({o['num_groups']!r}, {o.shape('weight')[0]}, eps={o['eps']!r})" if o.has("weight") else ""


def _dropout(name: str, o: _Operands) -> str:
    return f"nn.{name}({o['p']!r})"


def _activation(name: str, o: _Operands) -> str:
    return f"nn.{name}({'inplace=True' if o.op.endswith('_') else ''})"


def _pooling(name: str, o: _Operands) -> str:
    return f"nn.{name}({tuple(o['kernel_size'])}, {tuple(o['stride']) or None}, {tuple(o['padding'])}, {tuple(o['dilation'])}, ceil_mode={o['ceil_mode']!r})"


def _adaptive(name: str, o: _Operands) -> str:
    return f"nn.{name}({tuple(o['output_size'])})"


def _plain(*options: str) -> Callable[[str, _Operands], str]:
    def make(name: str, o: _Operands) -> str:
        return f"nn.{name}({', '.join(f'{key}={o[key]!r}' for key in options)})"

    return make


_MAKERS: dict[str, tuple[tuple[str, ...], Callable[[str, _Operands], str]]] = {
    "Linear": (("linear",), _linear), "Embedding": (("embedding",), _embedding), "LayerNorm": (("layer_norm",), _layer_norm),
    **{f"Conv{n}d": ((f"conv{n}d",), _convolution) for n in (1, 2, 3)},
    **{f"BatchNorm{n}d": (("batch_norm",), _batch_norm) for n in (1, 2, 3)},
    "GroupNorm": (("group_norm",), _group_norm),
    **dict.fromkeys(("Dropout", "AlphaDropout"), (("dropout", "alpha_dropout"), _dropout)),
    **{f"Dropout{n}d": (("feature_dropout",), _dropout) for n in (1, 2, 3)},
    "GELU": (("gelu",), _plain("approximate")),
    **{name: ((name.lower(),), _plain()) for name in ("Tanh", "Sigmoid")},
    **{name: ((name.lower(), f"{name.lower()}_"), _activation) for name in ("ReLU", "SiLU", "Mish", "Hardswish", "Hardsigmoid")},
    **{f"MaxPool{n}d": ((f"max_pool{n}d",), _pooling) for n in (1, 2, 3)},
    **{f"AdaptiveAvgPool{n}d": ((f"adaptive_avg_pool{n}d",), _adaptive) for n in (1, 2, 3)},
}  # fmt: skip
"""By class: the op that it runs, and how it is made from that op's operands."""
