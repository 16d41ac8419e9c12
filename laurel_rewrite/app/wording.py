"""What the stages of a job say of what they found."""

from __future__ import annotations

from collections import Counter

from laurel_rewrite import targets
from laurel_rewrite.detection.sites import Sites
from laurel_rewrite.profiling.sessions import has_provider
from laurel_rewrite.report.words import numbered
from laurel_rewrite.verification.checks import Check
from laurel_rewrite.verification.onnx_runs import FLOAT32


def counts(sites: Sites) -> str:
    """The kinds of sites, in words."""
    kinds = Counter(site.kind for site in sites)
    streams = len({site.stream for site in sites})
    found = f"{numbered(len(sites), 'site')} ({', '.join(f'{n} {k}' for k, n in kinds.items()) or 'none'}) in {numbered(streams, 'stream')}"
    return f"{found}, {numbered(len(sites.rejected), 'other addition')}"


def verdict(checks: list[Check]) -> str:
    """How many checks had each outcome, or which failed."""
    failed = [check.name for check in checks if check.failed]
    outcomes = Counter(check.outcome for check in checks)
    words = [f"{numbered(n, 'check')} passed" if outcome == "passed" else f"{n} {outcome}" for outcome, n in outcomes.items()]
    return f"FAILED: {', '.join(failed)}" if failed else ", ".join(words)


def not_timed(target: targets.Target) -> str:
    """Why a graph for a target is not timed here, in a sentence for the user; "" where it is."""
    if has_provider(target.provider):
        return ""
    return f"Not timed: {target.name} is for the {target.provider}, which this onnxruntime has not, and another's times would say nothing of it."


def verified_elsewhere(target: targets.Target) -> list[str]:
    """What the checks leave open of a target that is meant for another provider than they ran on."""
    if target.on_cpu:
        return []
    rtol, atol = target.tolerance or FLOAT32
    return [
        f"Verified on the {targets.CPU}. In float32 the {target.provider} may differ from it by {rtol:g} of a number and {atol:g} of the largest "
        "of its tensor."
    ]
