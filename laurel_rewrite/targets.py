"""What an ONNX graph is made for: a table, which the command, the export and the lowering read.

Nothing heavy is imported here: the command builds its help from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from laurel_rewrite.errors import ConfigError, nearest

CPU = "CPUExecutionProvider"
"""Where everything is verified, for every onnxruntime has it."""


@dataclass(frozen=True)
class Target:
    """One kind of graph.

    Attributes:
        name: as `--target` and the arguments called `target` take it.
        help: what becomes of LAuReL, in one line.
        form: "lowered" to ops without parameters, left as "functions" of standard ops, or written as ordinary "nodes".
        passes: of the lowering, in order; see `laurel_rewrite.lowering`.
        skippable: those of them that can be left out.
        provider: the execution provider of onnxruntime that the graph is meant for, and is timed on.
        tolerance: rtol and atol within which that provider's numbers are those of the CPU, in float32 and by its defaults; None where they
            are within those that verification asks for.
    """

    name: str
    help: str
    form: Literal["lowered", "functions", "nodes"]
    passes: tuple[str, ...] = ()
    skippable: tuple[str, ...] = ()
    provider: str = CPU
    tolerance: tuple[float, float] | None = None

    @property
    def lowers(self) -> bool:
        """Whether no parameter of LAuReL is left."""
        return self.form == "lowered"

    @property
    def keeps_functions(self) -> bool:
        """Whether LAuReL is left as functions, unless they are asked to be inlined."""
        return self.form == "functions"

    @property
    def writes_nodes(self) -> bool:
        """Whether LAuReL becomes the ordinary nodes that PyTorch executes."""
        return self.form == "nodes"

    @property
    def on_cpu(self) -> bool:
        """Whether it is meant for the provider that verifies it."""
        return self.provider == CPU


DEFAULT = "ort-cpu"
"""Of the command, of `export_onnx` and of `lower`."""
PORTABLE = "portable"
"""Of `rewrite_onnx`, whose result may still be trained."""

_TARGETS = {
    target.name: target
    for target in (
        Target(
            DEFAULT,
            "lowered to the ops that run fastest in onnxruntime on a CPU",
            "lowered",
            passes=("evaluate-laurel", "rescale-stream", "fold-branch", "pad-rank", "expand-laurel", "tighten-functions"),
            skippable=("rescale-stream", "fold-branch", "pad-rank", "tighten-functions"),
        ),
        # CUDA has no layout in blocks of channels, so that zeros in a rank would be work for nothing, and a SkipLayerNormalization that is fast. Its kernels for products round the
        # operands of float32 to 10 bits (TF32) unless they are told not to.
        Target(
            "ort-cuda",
            "the same for its CUDA provider, without the padding of ranks",
            "lowered",
            passes=("evaluate-laurel", "rescale-stream", "fold-branch", "expand-laurel"),
            skippable=("rescale-stream", "fold-branch"),
            provider="CUDAExecutionProvider",
            tolerance=(1e-3, 1e-3),
        ),
        Target(PORTABLE, "functions with parameters, which run anywhere", "functions"),
        Target("none", "ordinary nodes with parameters, nothing folded", "nodes"),
    )
}


def target(name: str) -> Target:
    """The target of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in _TARGETS:
        raise ConfigError(f"Unknown target {name!r}. {nearest(name, _TARGETS)} There are {', '.join(_TARGETS)}.")
    return _TARGETS[name]


def targets() -> tuple[Target, ...]:
    """All of them, the default first."""
    return tuple(_TARGETS.values())
