"""Which ops onnxruntime makes of a graph, and which of the baseline's fusions a rewritten graph keeps."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterable

_LAYOUT = frozenset("ReorderInput ReorderOutput Transpose Reshape Squeeze Unsqueeze Cast Identity Concat Slice Gather Shape".split())
"""What the optimiser adds besides fusions, and moves about."""
ADDEND = 3
"""Position of what onnxruntime's convolutions add to their result."""


@dataclass(frozen=True)
class Ops:
    """Ops of a graph by type, as it is in the file (functions inlined) and as onnxruntime runs it; and the ops that it fused."""

    before: Counter[str]
    after: Counter[str]
    fused: Counter[str]

    def against(self, baseline: Ops) -> Fusions:
        """This graph's fusions beside the baseline's."""
        return Fusions(baseline.fused & self.fused, baseline.fused - self.fused, self.fused - baseline.fused)


@dataclass(frozen=True)
class Fusions:
    """Fused ops that both graphs have, that only the baseline has, and that only the other has."""

    kept: Counter[str]
    lost: Counter[str]
    gained: Counter[str]

    def __str__(self) -> str:
        def some(fused: Counter[str]) -> str:
            kinds = ", ".join(f"{count} {kind}" for kind, count in fused.most_common())
            return f"{fused.total()}" + (f" ({kinds})" if kinds else "")

        return f"{self.kept.total()} kept, {some(self.lost)} lost, {some(self.gained)} gained"


def count_ops(model: ir.Model, optimised: ir.Model) -> Ops:
    """Count the ops of a file, whose functions are inlined, and of what onnxruntime makes of it."""
    before, after = list(_nodes(model)), list(_nodes(optimised))
    fused = Counter(map(_kind, after)) - Counter(map(_kind, before))
    return Ops(
        Counter(node.op_type for node in before),
        Counter(node.op_type for node in after),
        Counter({kind: count for kind, count in fused.items() if kind not in _LAYOUT}),
    )


def _nodes(model: ir.Model) -> Iterable[ir.Node]:
    return (node for node in model.graph.all_nodes() if node.op_type != "Constant")


def _kind(node: ir.Node) -> str:
    """The op with what was fused into it."""
    kind = node.op_type.removeprefix("Fused") if node.op_type == "FusedConv" else node.op_type
    if kind == "Conv" and len(node.inputs) > ADDEND and node.inputs[ADDEND] is not None:
        kind += "+Add"
    activation = node.attributes.get_string("activation")
    return f"{kind}+{activation}" if activation else kind
