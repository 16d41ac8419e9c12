"""From LAuReL nodes to the ordinary ops that run fastest in onnxruntime on a CPU.

    EvaluateLaurel -> RescaleStream -> FoldBranch -> ExpandLaurel

Each pass is a file in `passes/`, with its algebra, its conditions and its refusals. What comes out has no trainable parameter and no
function: a graph to deploy. The model's `metadata_props` say what was done.

Skip and normalisation of a pre-norm net stay two ops, as onnxruntime leaves them in the baseline: its SkipLayerNormalization is slower on a CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import onnx_ir as ir
import onnx_ir.passes.common as common

from laurel_rewrite.errors import ConfigError, nearest
from laurel_rewrite.graph.from_onnx import METADATA
from laurel_rewrite.passes.evaluate_laurel import EvaluateLaurel, Forms
from laurel_rewrite.passes.expand_laurel import ExpandLaurel
from laurel_rewrite.passes.fold_branch import FoldBranch
from laurel_rewrite.passes.rescale_stream import RescaleStream
from laurel_rewrite.verification.checks import require
from laurel_rewrite.verification.onnx import check_lowering

NOTES = f"{METADATA}lowering"
"""Where a lowered model says what was done."""
SKIPPABLE = ("rescale-stream", "fold-branch", "pad-rank")


@dataclass
class Lowering:
    """What the lowering did.

    Attributes:
        sites: number of LAuReL nodes.
        folded: branches whose weight went into what computes them.
        refused: nodes where it did not, and why.
        rescaled: what became of the skips' weights, in words.
        scales: c of every value that is 1/c of what it was, by name.
    """

    sites: int = 0
    folded: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    rescaled: str = ""
    scales: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """In sentences for the user."""
        lines = [f"{self.folded} branches have their weight in what computes them."] if self.folded else []
        lines += [f"{count} branches keep their weight as a Mul: {why}." for why, count in Counter(self.refused.values()).most_common(4)]
        return " ".join([*lines, f"Streams: {self.rescaled}."] if self.rescaled else lines)


def lower(model: ir.Model, *, skip: Collection[str] = (), verify: bool = True) -> Lowering:
    """Lower a model's LAuReL nodes, in place. What comes out computes what went in, or the model is left as it was.

    Args:
        model: with LAuReL as functions, as `rewrite_onnx` and the export leave them.
        skip: names of passes to leave out, from `SKIPPABLE`.
        verify: whether to compare both in onnxruntime first, on inputs that are drawn; where that cannot be done here, a warning is logged.

    Raises:
        ConfigError: there is no such pass.
        ExportError: a LAuReL node whose parameters are no constants.
        VerificationError: what comes out does not compute what went in; the message names the first site.
    """
    if verify:
        trial = model.clone()
        done = lower(trial, skip=skip, verify=False)
        require(check_lowering(model, trial, done.scales) if done.sites else [])
    for name in skip:
        if name not in SKIPPABLE:
            raise ConfigError(f"There is no pass {name!r} to skip. {nearest(name, SKIPPABLE)}")
    forms: Forms = {}
    result = Lowering(sites=len(EvaluateLaurel(forms)(model).changed))
    if "rescale-stream" not in skip:
        rescale = RescaleStream(forms)
        rescale(model)
        result.rescaled, result.scales = rescale.note, rescale.scales
    if "fold-branch" not in skip:
        fold = FoldBranch(forms)
        result.folded, result.refused = len(fold(model).changed), fold.refused
        result.scales |= {name: c * result.scales.get(name, 1.0) for name, c in fold.scales.items()}
    ExpandLaurel(forms, pad="pad-rank" not in skip)(model)
    common.RemoveUnusedNodesPass()(model)
    if result.sites:
        model.metadata_props[NOTES] = str(result)
    return result
