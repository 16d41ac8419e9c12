"""From LAuReL nodes to the ordinary ops that run fastest in onnxruntime, by the passes that a target names.

    EvaluateLaurel -> RescaleStream -> FoldBranch -> ExpandLaurel -> TightenFunctions

Each pass is a file in `passes/`, with its algebra, its conditions and its refusals. What comes out has no
function but those of operators that are not linear: a graph to deploy. The model's `metadata_props` say what was done.

Skip and normalisation of a pre-norm net stay two ops, as onnxruntime leaves them in the baseline: its SkipLayerNormalization is slower on a CPU.
For CUDA, where it is faster, the tools that make it find as many as in the baseline: the last op of a sum is an Add of two full tensors, with the
branch first, whose bias they take in as well. Attention they make only where the skip is the very value that is normalised, so that a low-rank
term hides it: fuse the baseline first, and rewrite what comes out, whose fused nodes stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import onnx_ir as ir
import onnx_ir.passes.common as common

from laurel_rewrite import targets
from laurel_rewrite.errors import ConfigError, nearest
from laurel_rewrite.graph.from_onnx import METADATA
from laurel_rewrite.operators.affine import Weight
from laurel_rewrite.passes.evaluate_laurel import EvaluateLaurel, Forms
from laurel_rewrite.passes.expand_laurel import ExpandLaurel
from laurel_rewrite.passes.fold_branch import FoldBranch
from laurel_rewrite.passes.rescale_stream import RescaleStream
from laurel_rewrite.passes.tighten_functions import TightenFunctions
from laurel_rewrite.verification.checks import require
from laurel_rewrite.verification.onnx import check_lowering

NOTES = f"{METADATA}lowering"
"""Where a lowered model says what was done."""
SKIPPABLE = targets.target(targets.DEFAULT).skippable


@dataclass
class Lowering:
    """What the lowering did.

    Attributes:
        sites: number of LAuReL nodes that were lowered.
        kept: nodes that stay functions, for what they compute is not linear.
        folded: branches whose weight went into what computes them.
        refused: nodes where it did not, and why.
        rescaled: what became of the skips' weights, in the words of the pass.
        unweighted: skips whose weight is gone.
        multiplied: multiplications that this left, or brought in.
        scales: c of every value that is 1/c of what it was, by name; one number, or an array that goes with the value, one a feature.
    """

    sites: int = 0
    kept: list[str] = field(default_factory=list)
    folded: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    rescaled: str = ""
    unweighted: int = 0
    multiplied: int = 0
    scales: dict[str, Weight] = field(default_factory=dict)

    def __str__(self) -> str:
        """In sentences for the user."""
        weighted = self.folded + len(self.refused)
        lines = [
            f"the weight of f(x) costs nothing at {self.folded} of the {weighted} connections that have one: the layer that computes f(x) has it"
        ]
        lines += [f"at {count} it is a multiplication ({why})" for why, count in Counter(self.refused.values()).most_common(4)]
        left = f", but for {self.multiplied} multiplication{'s' * (self.multiplied > 1)}" if self.multiplied else ""
        lines += (
            [f"the weight of x costs nothing at {self.unweighted}{left}: the layers that read the sum have it"] if self.unweighted else []
        )
        lines += (
            ["the weights of x stay, for without them there would be more multiplications"] if self.rescaled and not self.unweighted else []
        )
        lines += [f"{len(self.kept)} are not linear, and stay functions"] if self.kept else []
        return "; ".join(lines if self.folded else lines[1:])


@dataclass
class _Work:
    """A model between two passes.

    Attributes:
        forms: the linear form of each `Affine` node.
        pad: whether ranks are to be padded.
    """

    model: ir.Model
    result: Lowering = field(default_factory=Lowering)
    forms: Forms = field(default_factory=dict)
    pad: bool = False


def _evaluate(work: _Work) -> None:
    evaluate = EvaluateLaurel(work.forms)
    work.result.sites = len(evaluate(work.model).changed)
    work.result.kept = evaluate.kept


def _rescale(work: _Work) -> None:
    rescale = RescaleStream(work.forms)
    rescale(work.model)
    work.result.rescaled, work.result.scales = rescale.note, rescale.scales
    work.result.unweighted, work.result.multiplied = rescale.saved, rescale.resets + rescale.readers


def _fold(work: _Work) -> None:
    fold, result = FoldBranch(work.forms), work.result
    result.folded, result.refused = len(fold(work.model).changed), fold.refused
    result.scales |= {name: c * result.scales.get(name, 1.0) for name, c in fold.scales.items()}


def _pad(work: _Work) -> None:
    work.pad = True


def _expand(work: _Work) -> None:
    ExpandLaurel(work.forms, pad=work.pad)(work.model)


def _tighten(work: _Work) -> None:
    TightenFunctions()(work.model)


_PASSES: dict[str, Callable[[_Work], None]] = {
    "evaluate-laurel": _evaluate,
    "rescale-stream": _rescale,
    "fold-branch": _fold,
    "pad-rank": _pad,
    "expand-laurel": _expand,
    "tighten-functions": _tighten,
}
"""By the names that targets have for them."""


def lower(model: ir.Model, *, target: str = targets.DEFAULT, skip: Collection[str] = (), verify: bool = True) -> Lowering:
    """Lower a model's LAuReL nodes, in place. What comes out computes what went in, or the model is left as it was.

    Args:
        model: with LAuReL as functions, as `rewrite_onnx` and the export leave them.
        target: whose passes are run.
        skip: names of passes to leave out, from those that the target can do without.
        verify: whether to compare both in onnxruntime first, on inputs that are drawn; where that cannot be done here, a warning is logged.

    Raises:
        ConfigError: there is no such target, it lowers nothing, or has no such pass.
        ExportError: a LAuReL node whose parameters are no constants.
        VerificationError: what comes out does not compute what went in; the message names the first site.
    """
    chosen = targets.target(target)
    if not chosen.lowers:
        raise ConfigError(f"The target {target} keeps LAuReL as it is, and nothing is lowered for it.")
    if verify:
        trial = model.clone()
        done = lower(trial, target=target, skip=skip, verify=False)
        require(check_lowering(model, trial, done.scales) if done.sites else [])
    for name in skip:
        if name not in chosen.skippable:
            raise ConfigError(f"There is no pass {name!r} to skip. {nearest(name, chosen.skippable)}")
    work = _Work(model)
    for name in chosen.passes:
        if name not in skip:
            _PASSES[name](work)
    common.RemoveUnusedNodesPass()(model)
    if work.result.sites or work.result.kept:
        model.metadata_props[NOTES] = str(work.result)
    return work.result
